"""Selection of a subject's hyperparameters on the fixed selection cases, which no published table contains; and the effects, on the
same cases, of the released program's defects and of learning the end of text after the target.

The criterion is the harmonic mean of effectiveness and specificity: exact match of the target, and the share of
neighbours unchanged, each averaged over the datasets. A grid is ordered by distance from the paper's setting, and the first
setting whose criterion reaches 0.95 is chosen, to stay as close to the paper as possible; if none reaches it, the best is chosen.
A specificity below 0.05 counts as 0.05: among settings that change nearly all neighbours, effectiveness decides.

How far from its prompt an edit acts (a codebook's deferral radius, the margin of an encoder) does not affect the answer to the prompt
itself. It is therefore selected for each dataset by generalization instead of effectiveness, with the subject's other values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from ...datasets.base import dataset_title
from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import selection_cases
from ...editors.base import EDITORS
from ...editors.registry import get_editor, load_editor, resolve_hparams
from ...evaluation.evaluate import evaluate
from ...evaluation.records import finite
from ...metrics.base import get_metric
from ...subjects.settings import Preset, list_subjects, load_settings
from ...subjects.subject import Subject
from ...support.display import Markup, inline
from ...support.errors import StudyError
from ...support.journal import Journal, journal_beside
from ...support.seeds import seed_of
from ..tables import Table, cells, editor_name, in_order, percent, table, write_csv


def selection_table(measured: pd.DataFrame, label: str) -> Table:
    """An editor's grid in its order, the chosen setting in bold, from the file that ``clme measure selection`` writes (:func:`select`)."""
    rows = []
    for row in measured.itertuples():
        of_dataset = {"Data": dataset_title(row.dataset)} if "dataset" in measured else {}
        shown = of_dataset | _score_cells(row) | {"Criterion": percent(row.criterion)}
        rows.append({title: Markup(f"**{inline(cell)}**") if row.chosen else cell for title, cell in shown.items()})
    (editor,) = measured["editor"].unique()
    return Table(cells(rows), f"{editor_name(editor)} on the selection cases; the chosen setting in bold.", label)


@table
def budget_table(measured: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, str]]:
    """Each editor's selection budget: the number of settings, and the number of cases on which each was tried.

    Args:
        measured: by editor, the table that ``clme measure selection`` writes.
    """
    for editor in in_order(measured):
        # A grid that is chosen from separately for each dataset has a row per dataset.
        tried = measured[editor].groupby("setting", sort=False)["cases"].sum()
        each = sorted(set(tried))
        yield {
            "Editor": editor_name(editor),
            "Settings": str(len(tried)),
            "Cases each": " to ".join(map(str, dict.fromkeys((each[0], each[-1])))),
            "Edits": str(tried.sum()),
            "Chosen by": CHOSEN_BY[get_editor(editor).selects_reach] if editor in EDITORS else "–",
        }


def differing_values(paper: str = "codellama-7b", own: str = "smollm2-135m") -> pd.DataFrame:
    """The hyperparameters in which two registered subjects differ, a row each."""
    papers, owns = (load_settings(name).editors for name in (paper, own))
    rows = []
    for editor in in_order({**papers, **owns}):
        of_paper, of_own = (resolve_hparams(editor, name).model_dump() for name in (paper, own))
        for name in {**papers.get(editor, {}), **owns.get(editor, {})}:
            if of_paper[name] != of_own[name]:
                values = {f"{paper} (the paper's or its program's)": _value(of_paper[name]), own: _value(of_own[name])}
                rows.append({"Editor": editor_name(editor), "Value": f"`{name}`", **values})
    return pd.DataFrame(rows)


def all_values() -> pd.DataFrame:
    """Every hyperparameter of the library's editors, a row each, with its values for the registered subjects; subjects with the same
    values share a column. Layers in the paper's values that a subject lacks are moved, as when the subject is loaded."""
    rows = []
    for editor in in_order(name for name in EDITORS.names() if EDITORS[name].__module__.startswith("clme_lib.")):
        fields = get_editor(editor).Hyperparameters.model_fields
        values = {name: resolve_hparams(editor, name, load_settings(name).subject.blocks) for name in list_subjects()}
        for field in fields:
            of_subjects = {name: _value(getattr(chosen, field)) for name, chosen in values.items()}
            rows.append({"Editor": editor_name(editor), "Hyperparameter": f"`{field}`", **of_subjects})
    whole = pd.DataFrame(rows)
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in list_subjects():
        alike.setdefault(tuple(whole[name]), []).append(name)
    columns = {", ".join(names): column for column, names in alike.items()}
    return whole[["Editor", "Hyperparameter"]].assign(**columns)


def _value(value: object) -> str:
    if value is None:
        return "all"  # all available records
    if isinstance(value, dict):
        return ", ".join(f"{dataset_title(name)} {_value(of_dataset)}" for name, of_dataset in value.items())
    if isinstance(value, list | tuple):
        return f"{value[0]}–{value[-1]}" if len(value) > 1 else str(value[0])
    return f"{value:g}" if isinstance(value, float) else str(value)  # without trailing zeros


@table
def preset_table(measured: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, str]]:
    """The effects of the released program's defects, alone and together; each dataset's first row has none of them.

    Args:
        measured: by editor, the table that ``clme measure presets`` writes (:func:`compare_presets`).
    """
    for editor in in_order(measured):
        for dataset, rows in measured[editor].groupby("dataset", sort=False):
            named = {"Editor": editor_name(editor), "Data": dataset_title(str(dataset))}
            for row in rows.itertuples():
                yield named | _score_cells(row) | {"Eff., released budget": percent(row.released_budget_em)}


def _score_cells(row: Any) -> dict[str, str]:
    return {
        "Setting": row.setting,
        "n": str(row.cases),
        "Eff.": percent(row.effectiveness_em),
        "Gen.": percent(row.generalization_em),
        "Neighbours unchanged": percent(row.specificity_rate),
        "Loss": "–" if pd.isna(row.loss) else f"{row.loss:.3f}",  # an edit of the prompt has none
    }


CHOSEN_BY = {False: "effectiveness and specificity", True: "generalization and specificity, for each dataset"}
GOOD_ENOUGH = 0.95
LEAST_SPECIFICITY = 0.05
SCORES = ["effectiveness_em", "generalization_em", "specificity_rate", "loss"]
END_SCORES = ["effectiveness_em", "free_effectiveness_em", "stops", "overrun", "generalization_em", "free_generalization_em",
              "specificity_rate"]  # fmt: skip
# of the tables that select, compare_presets and compare_ends write: numbers, and other columns
COLUMNS = (["cases", *SCORES, "criterion"], ["editor", "setting", "chosen"])
PRESET_COLUMNS = (["cases", *SCORES, "released_budget_em"], ["editor", "setting", "dataset"])
END_COLUMNS = (["cases", *END_SCORES], ["editor", "setting", "dataset"])
_done_beside = partial(journal_beside, key=lambda row: (row["identity"], row["dataset"]))


def select(
    subject: Subject, editor: str, file: Path, cases: int | None = None, datasets: Sequence[str] = PAPER_DATASET_NAMES
) -> pd.DataFrame:
    """Try an editor's grid; written as CSV, one row per setting, in the grid's order.

    Args:
        cases: use this many of each dataset's 30 selection cases, from the first (None: all).
        datasets: the datasets to try it on; one may be enough for an editor that trains for each dataset.

    Raises:
        StudyError: the editor has no grid.
    """
    described = get_editor(editor)
    if not (grid := described.selection_grid):
        known = [name for name in EDITORS if EDITORS[name].selection_grid]
        raise StudyError(f"{editor!r} has no grid of hyperparameters; editors that have one: {', '.join(known)}")
    values: Literal["subject", "transferred"] = "subject" if described.selects_reach else "transferred"
    with _done_beside(file) as done:
        measured = measure(subject, editor, grid, done, values=values, cases=cases, datasets=datasets)
        if described.selects_reach:
            of_datasets = [choose(rows, "generalization_em") for _, rows in measured.groupby("dataset", sort=False)]
            return write_csv(pd.concat(of_datasets, ignore_index=True), file)
        settings = measured.groupby(["editor", "setting"], sort=False)
        means = settings["cases"].sum().to_frame().join(settings[SCORES].mean()).reset_index()
        return write_csv(choose(means, "effectiveness_em"), file)


def compare_presets(subject: Subject, editor: str, file: Path, cases: int | None = None) -> pd.DataFrame:
    """Measure the effects of the released program's defects on an editor, alone and together; written like :func:`select`.

    The defects are the editor's ``compat`` values, in every combination (for a trained editor, only none and all, since each combination
    needs its own training); ``released_budget_em`` is effectiveness when a text may only be as long as its target tokenised alone.

    Raises:
        StudyError: the editor has no defects to compare.
    """
    described = get_editor(editor)
    if not (defects := described.compat):
        known = [name for name in EDITORS if EDITORS[name].compat]
        raise StudyError(f"{editor!r} has no presets to compare; editors that have some: {', '.join(known)}")
    clean = {name: described.Hyperparameters.model_fields[name].default for name in defects}
    settings = [dict(zip(defects, chosen)) for chosen in product(*((clean[name], defects[name]) for name in defects))]
    settings = [settings[0], settings[-1]] if described.needs_training else settings
    budgets: tuple[Preset, ...] = ("clean", "compat")
    with _done_beside(file) as done:
        measured = measure(subject, editor, settings, done, values="subject", cases=cases, budgets=budgets)
        return write_csv(measured, file)


def compare_ends(
    subject: Subject, editor: str, file: Path, cases: int | None = None, datasets: Sequence[str] = PAPER_DATASET_NAMES
) -> pd.DataFrame:
    """Measure an editor that learns targets without and with the end of text after them; written like :func:`select`.

    Raises:
        StudyError: the editor learns no target.
    """
    if "end_of_target" not in get_editor(editor).Hyperparameters.model_fields:
        raise StudyError(f"{editor!r} learns no target that an end of text could follow; choose another editor")
    settings = [{"end_of_target": learnt} for learnt in (False, True)]
    options: dict[str, Any] = {"values": "subject", "cases": cases, "datasets": datasets, "scores": END_SCORES}
    with _done_beside(file) as done:
        return write_csv(measure(subject, editor, settings, done, **options), file)


@table
def end_table(measured: Mapping[str, pd.DataFrame]) -> Iterator[dict[str, str]]:
    """Each editor without and with the end of text as the target's last token.

    Args:
        measured: by editor, the table that ``clme measure end-of-target`` writes (:func:`compare_ends`).
    """
    for editor in in_order(measured):
        for dataset, rows in measured[editor].groupby("dataset", sort=False):
            for row in rows.to_dict("records"):
                learnt = "learnt" if row["setting"].endswith("True") else "–"
                named = {"Editor": editor_name(editor), "Data": dataset_title(str(dataset)), "End of text": learnt}
                shown = {name: percent(row[name]) for name in END_SCORES} | {"overrun": f"{row['overrun']:.1f}"}
                yield named | {"n": str(row["cases"])} | {get_metric(name).title: shown[name] for name in END_SCORES}


def measure(
    subject: Subject,
    editor: str,
    settings: Sequence[dict[str, Any]],
    done: Journal,
    *,
    values: Literal["subject", "transferred"],
    cases: int | None = None,
    datasets: Sequence[str] = PAPER_DATASET_NAMES,
    budgets: Sequence[Preset] = ("clean",),
    scores: Sequence[str] = SCORES,
) -> pd.DataFrame:
    """Mean ``scores`` over selection cases, a row for each setting and dataset; a trained editor learns from the other cases.

    Args:
        done: what is finished, by identity and dataset; finished measurements are added, so that an interrupted command resumes.
        cases: use this many of each dataset's selection cases, from the first (None: all 30).
    """
    rows = []
    for setting in tqdm(settings, desc=f"measure {editor}", unit="setting"):
        for dataset in datasets:
            chosen, others = selection_cases(dataset, cases)
            made = load_editor(editor, subject, values=values, **setting)
            digest = "".join(case.sha256 for case in chosen)
            identity = seed_of(subject.fingerprint, subject.dtype_name, editor, made.hparams, budgets, digest)
            row = {"identity": identity, "dataset": dataset}
            if row not in done:
                if made.needs_training:
                    made.fit(others, edited=chosen)
                edits = made.edit(chosen)
                mean = evaluate(subject, chosen, edits)[list(scores)].mean()
                if "compat" in budgets:
                    released = evaluate(subject, chosen, edits, preset="compat")
                    mean["released_budget_em"] = released["effectiveness_em"].mean()
                done.append({**row, "scores": {name: finite(score) for name, score in mean.items()}})
            means = {name: float("nan") if score is None else score for name, score in done[row]["scores"].items()}
            shown = describe_setting(setting, dataset)
            rows.append({"editor": editor, "setting": shown, "dataset": dataset, "cases": len(chosen), **means})
    return pd.DataFrame(rows)


def describe_setting(setting: Mapping[str, Any], dataset: str) -> str:
    """Hyperparameters as the tables name them, with the value for one dataset if there is one for each."""
    of_dataset = {name: value[dataset] if isinstance(value, dict) else value for name, value in setting.items()}
    return ", ".join(f"{name} {_value(value)}" for name, value in of_dataset.items())


def choose(measured: pd.DataFrame, score: str) -> pd.DataFrame:
    """A grid in its order, with each setting's criterion, made of ``score`` and specificity, and the chosen setting marked:
    the first that is good enough, else the best."""
    criteria = pd.Series(list(map(criterion, measured[score], measured["specificity_rate"])), measured.index)
    # idxmax takes the first of equal values; means that differ by rounding alone are equal
    best = criteria.clip(upper=GOOD_ENOUGH).round(9).idxmax()
    return measured.assign(criterion=criteria, chosen=measured.index == best)


def criterion(score: float, specificity: float) -> float:
    """The harmonic mean of a score and specificity, with specificity taken as at least 0.05."""
    specificity = max(specificity, LEAST_SPECIFICITY)
    return 2 * score * specificity / (score + specificity)
