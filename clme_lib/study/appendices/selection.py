"""Selection of a subject's hyper-parameters on the fixed selection cases, which no published table contains; and what the
released program's defects do, measured on the same cases.

The criterion is the harmonic mean of effectiveness and specificity: exact match of the target, and the share of
neighbours left unchanged, each averaged over the data sets. A grid is ordered by distance from the paper's setting, and
the first entry whose criterion reaches 0.95 is chosen: no further from the paper than it takes. If none does, the best is.
A specificity below 0.05 counts as 0.05: among settings that all break their neighbours, effectiveness decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from ...datasets.cases import DATASETS, Case
from ...datasets.registry import selection_cases
from ...editors.registry import get_editor, load_editor, registered_editors, resolve_hparams
from ...evaluation.evaluate import evaluate
from ...evaluation.records import finite
from ...subjects.settings import Preset, load_settings
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ...support.journal import append_rows, read_rows
from ...support.seeds import seed_of
from ..tables import Table, dataset_name, editor_name, in_order


def selection_table(measured: pd.DataFrame) -> Table:
    """An editor's grid in its order, the chosen setting in bold.

    Args:
        measured: what ``clme select`` writes (:func:`clme_lib.study.appendices.selection.select`).
    """
    (editor,) = measured["editor"].unique()
    rows = []
    for _, one in measured.iterrows():
        cells = {
            "Setting": one["setting"],
            "n": str(one["cases"]),
            **_scores(one),
            "Loss": f"{one['loss']:.3f}",
            "Criterion": _percent(one["criterion"]),
        }
        rows.append({name: f"**{cell}**" for name, cell in cells.items()} if one["chosen"] else cells)
    caption = f"{editor_name(editor)} on the selection cases; the chosen setting in bold."
    return Table(pd.DataFrame(rows), caption, f"tab-selection-{editor}")


def values_table(paper: str = "codellama-7b", own: str = "smollm2-135m") -> Table:
    """The hyper-parameters in which two registered subjects differ, a row each."""
    settings = {name: load_settings(name).editors for name in (paper, own)}
    rows = []
    for editor in in_order({**settings[paper], **settings[own]}):
        theirs, ours = (resolve_hparams(editor, subject).model_dump() for subject in (paper, own))
        overridden = {**settings[paper].get(editor, {}), **settings[own].get(editor, {})}
        differing = [name for name in overridden if theirs[name] != ours[name]]
        rows += [
            {
                "Editor": editor_name(editor),
                "Value": f"`{name}`",
                f"{paper} (the paper's)": _value(theirs[name]),
                own: _value(ours[name]),
            }
            for name in differing
        ]
    caption = (
        f"Hyper-parameters of {own} that are not those of {paper}; layers are zero-based. All others are the same."
    )
    return Table(pd.DataFrame(rows), caption, "tab-values")


def _value(value: object) -> str:
    if value is None:
        return "all"  # of the records there are
    if isinstance(value, dict):
        return ", ".join(f"{dataset_name(name)} {_value(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return f"{value[0]}–{value[-1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def preset_table(measured: Mapping[str, pd.DataFrame]) -> Table:
    """What the released program's defects do, alone and together; each data set's first row has none of them.

    Args:
        measured: by editor, what ``clme presets`` writes (:func:`clme_lib.study.appendices.selection.compare_presets`).
    """
    rows = []
    for editor in in_order(measured):
        for dataset, mine in measured[editor].groupby("dataset", sort=False):
            for _, one in mine.iterrows():
                rows.append(
                    {
                        "Editor": editor_name(editor),
                        "Data": dataset_name(str(dataset)),
                        "Setting": one["setting"],
                        "n": str(one["cases"]),
                        **_scores(one),
                        "Loss": f"{one['loss']:.3f}",
                        "Eff., released budget": _percent(one["released_budget_em"]),
                    }
                )
    caption = (
        "Exact match (times 100) of effectiveness and generalization, the share of neighbours left unchanged, the loss at the end, and effectiveness "
        "when a text may only have as many tokens as the released program grants it."
    )
    return Table(pd.DataFrame(rows), caption, "tab-presets")


def _scores(one: pd.Series) -> dict[str, str]:
    return {
        "Eff.": _percent(one["effectiveness_em"]),
        "Gen.": _percent(one["generalization_em"]),
        "Neighbours unchanged": _percent(one["specificity_rate"]),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


GOOD_ENOUGH = 0.95
LEAST_SPECIFICITY = 0.05
SCORES = ["effectiveness_em", "generalization_em", "specificity_rate", "loss"]


def select(
    subject: Subject, editor: str, file: Path, cases: int | None = None, datasets: Sequence[str] = DATASETS
) -> pd.DataFrame:
    """Try an editor's grid and write the table ``file`` (CSV, one row a setting, in the grid's order); returns it.

    Args:
        cases: of each data set's 30 selection cases, the first so many (None: all).
        datasets: an editor that trains for each data set may be tried on one of them alone.

    Raises:
        StudyError: the editor has no grid.
    """
    grid = get_editor(editor).selection_grid
    if not grid:
        known = [name for name, known in registered_editors().items() if known.selection_grid]
        raise StudyError(f"no grid to select {editor!r} from; known: {', '.join(known)}")
    measured = measure(subject, editor, grid, file, values="transferred", cases=cases, datasets=datasets)
    settings = measured.groupby(["editor", "setting"], sort=False)
    table = settings["cases"].sum().to_frame().join(settings[SCORES].mean()).reset_index()
    reached = [criterion(*one) for one in zip(table["effectiveness_em"], table["specificity_rate"])]
    table = choose(table.assign(criterion=reached))
    _write(table, file)
    return table


def compare_presets(subject: Subject, editor: str, file: Path, cases: int | None = None) -> pd.DataFrame:
    """Measure what each of the released program's defects does to an editor, alone and together, on each data set; written
    like :func:`select`.

    The defects are the editor's ``compat`` values, every combination of them (of a trained editor none and all, since each
    would train anew); ``released_budget_em`` is effectiveness
    when a text may only be as long as its target tokenised alone (also part of ``compat``).

    Raises:
        StudyError: the editor has no defects to compare.
    """
    of, defects = get_editor(editor), get_editor(editor).compat
    if not defects:
        known = [name for name, known in registered_editors().items() if known.compat]
        raise StudyError(f"{editor!r} has no presets to compare; known: {', '.join(known)}")
    clean = {name: of.Hyperparameters.model_fields[name].default for name in defects}
    settings = [dict(zip(defects, chosen)) for chosen in product(*((clean[name], defects[name]) for name in defects))]
    settings = [settings[0], settings[-1]] if of.needs_training else settings
    table = measure(subject, editor, settings, file, values="subject", cases=cases, budgets=("clean", "compat"))
    _write(table, file)
    return table


def measure(
    subject: Subject,
    editor: str,
    settings: Sequence[dict[str, Any]],
    file: Path,
    *,
    values: Literal["subject", "transferred"],
    cases: int | None = None,
    datasets: Sequence[str] = DATASETS,
    budgets: Sequence[Preset] = ("clean",),
) -> pd.DataFrame:
    """Mean scores over a data set's selection cases, one row a setting and data set; a trained editor learns from the other
    cases.

    Args:
        file: the table to be; what has been measured is kept beside it, so that an interrupted command goes on.
        cases: only the first so many of each data set's (None: all 30).
    """
    kept = file.with_name(f"{file.name}.part")
    done = {(row["identity"], row["dataset"]): row for row in read_rows(kept)}
    rows = []
    for setting in tqdm(settings, desc=f"measure {editor}", unit="setting"):
        for dataset in datasets:
            chosen, others = selection_cases(dataset, cases)
            made = load_editor(editor, subject, values=values, **setting)
            identity = seed_of(subject.fingerprint, subject.dtype_name, editor, made.hparams, budgets, _digest(chosen))
            if (identity, dataset) not in done:
                if made.needs_training:
                    made.fit(others, edited=chosen)
                edits = made.edit(chosen)
                mean = evaluate(subject, chosen, edits)[SCORES].mean()
                if "compat" in budgets:
                    released = evaluate(subject, chosen, edits, preset="compat")
                    mean["released_budget_em"] = released["effectiveness_em"].mean()
                scores = {name: finite(one) for name, one in mean.items()}
                done[identity, dataset] = {"identity": identity, "dataset": dataset, "scores": scores}
                append_rows(kept, [done[identity, dataset]])
            rows.append(
                {
                    "editor": editor,
                    "setting": ", ".join(f"{name} {_shown(value)}" for name, value in setting.items()),
                    "dataset": dataset,
                    "cases": len(chosen),
                    **{
                        name: float("nan") if one is None else one
                        for name, one in done[identity, dataset]["scores"].items()
                    },
                }
            )
    return pd.DataFrame(rows)


def _digest(cases: Sequence[Case]) -> str:
    return "".join(case.sha256 for case in cases)


def _shown(value: Any) -> str:
    """Numbers without trailing zeros."""
    return format(value, "g") if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _write(table: pd.DataFrame, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    file.with_name(f"{file.name}.part").unlink(missing_ok=True)


def choose(measured: pd.DataFrame) -> pd.DataFrame:
    """Mark the chosen setting of a grid in its order: the first good enough, else the best."""
    reached = measured.index[measured["criterion"] >= GOOD_ENOUGH]
    best = reached[0] if len(reached) else measured["criterion"].idxmax()
    return measured.assign(chosen=measured.index == best)


def criterion(effectiveness: float, specificity: float) -> float:
    """Their harmonic mean, with specificity taken as at least 0.05."""
    specificity = max(specificity, LEAST_SPECIFICITY)
    return 2 * effectiveness * specificity / (effectiveness + specificity)
