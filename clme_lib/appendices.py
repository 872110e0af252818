"""The appendices' tables: what was measured to choose hyper-parameters, and to tell method, model and code apart.

Each is a function of a small table (CSV) that a command of the study writes into ``results/``.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from .editors import EDITORS
from .hyperparameters import load_settings
from .report import Table, dataset_name, editor_name

_VALUES = {"transferred": "the paper's", "subject": "selected"}


def selection_table(measured: pd.DataFrame) -> Table:
    """An editor's grid in its order, the chosen setting in bold.

    Args:
        measured: what ``clme select`` writes (:func:`clme_lib.selection.select`).
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
    for editor in (name for name in EDITORS if name in settings[paper]):
        theirs, ours = settings[paper][editor], settings[own][editor]
        differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        rows += [
            {
                "Editor": editor_name(editor),
                "Value": f"`{name}`",
                f"{paper} (the paper's)": _value(theirs.get(name)),
                own: _value(ours.get(name)),
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
        measured: by editor, what ``clme presets`` writes (:func:`clme_lib.selection.compare_presets`).
    """
    rows = []
    for editor in (name for name in EDITORS if name in measured):
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


def diagnosis_table(measured: pd.DataFrame) -> Table:
    """Losses, size and reach of updates.

    Args:
        measured: what ``clme diagnose`` writes (:func:`clme_lib.diagnosis.diagnose_editors`).
    """
    rows = [
        {
            "Editor": editor_name(one["editor"]),
            "Values": _VALUES[one["values"]],
            "n": str(one["cases"]),
            "Learnt": f"{one['learnt']:.2f}",
            "NLL": f"{one['nll_before']:.2f} → {one['nll_after']:.2f}",
            "First": f"{one['first_before']:.2f} → {one['first_after']:.2f}",
            "Norm": f"{one['norm']:.2f}",
            "Reach": f"{100 * one['reach']:.0f} %",
        }
        for _, one in measured.iterrows()
    ]
    return Table(pd.DataFrame(rows), "Updates on selection cases of smollm2-135m, means over cases.", "tab-diagnosis")


def pmet_table(measured: pd.DataFrame) -> Table:
    """PMET's steps taken apart.

    Args:
        measured: what ``clme pmet-parts`` writes (:func:`clme_lib.diagnosis.take_pmet_apart`).
    """
    rows = [
        {
            "Attention's vector": "learnt beside" if one["attention learnt"] else "none",
            "Written": f"block {one['layers']}" if one["layers"].isdigit() else f"blocks {one['layers']}",
            "Weight": f"{one['weight']:g}",
            "n": str(one["cases"]),
            "Learnt": f"{one['learnt']:.2f}",
            "NLL": f"{one['nll_before']:.2f} → {one['nll_after']:.2f}",
            "First after": f"{one['first_after']:.2f}",
            "Norm": f"{one['norm']:.2f}",
        }
        for _, one in measured.astype({"layers": str}).iterrows()
    ]
    caption = (
        "PMET's vectors learnt without the KL term, written at the last layers of its window; CNLE selection cases."
    )
    return Table(pd.DataFrame(rows), caption, "tab-pmet-parts")


def statistics_table(measured: pd.DataFrame) -> Table:
    """MEMIT's writes under more and more statistics.

    Args:
        measured: what ``clme statistics`` writes (:func:`clme_lib.diagnosis.compare_statistics`).
    """
    rows = [
        {
            "Tokens": f"{one['tokens']:,}",
            "Layer": str(one["layer"]),
            "n": str(one["cases"]),
            "Cosine": f"{one['cosine']:.3f}",
            "Share": _percent(one["share"]),
            "of four times as many": _percent(one["share_of_four"]),
            "Difference": f"{100 * one['difference']:.1f} %",
        }
        for one in measured.to_dict("records")
    ]
    return Table(
        pd.DataFrame(rows),
        "The same keys under statistics of so many tokens, and of four times as many.",
        "tab-statistics",
    )


def encoder_tables(measured: pd.DataFrame) -> tuple[Table, Table]:
    """Encoders by setting (trained on all of the other half), and by training size; means over both halves.

    Args:
        measured: what ``clme encoders`` writes (:func:`clme_lib.radius.compare_encoders`).
    """
    settings = ["dataset", "editor", "architecture", "selection", "patience", "margin"]
    sizes = measured.groupby(settings)["cases"].transform("max") // 10 * 10 <= measured["cases"]
    whole = measured[sizes].groupby(settings, sort=False)
    by_setting = [{**_encoder_setting(keys), **_encoder_scores(mine)} for keys, mine in whole]
    grown = measured.groupby(settings).filter(lambda mine: mine["cases"].nunique() > 2)
    # the halves of a data set of odd size differ by one case
    grown = grown.assign(cases=grown["cases"].where(~sizes, grown.groupby("dataset")["cases"].transform("max")))
    by_size = [
        {"Data": dataset_name(dataset), "Training cases": str(count), **_encoder_scores(mine)}
        for (dataset, count), mine in grown.groupby(["dataset", "cases"])
    ]
    caption = (
        "Balanced accuracy of *within the radius* on the half that was not trained on, means of both halves (0.5 is what any constant gets), at "
        "the editors' radius and at the radius that would be best there; and the shares of rephrased and neighbour prompts within the radius."
    )
    one = Table(pd.DataFrame(by_setting), f"Encoders by setting. {caption}", "tab-encoders")
    margin = ", ".join(f"{value:g}" for value in grown["margin"].unique())
    return one, Table(
        pd.DataFrame(by_size), f"A-GRACE's encoder (margin {margin}) by training size.", "tab-encoder-sizes"
    )


def _encoder_setting(keys: tuple) -> dict[str, str]:
    dataset, editor, architecture, selection, patience, margin = keys
    chosen_by = {"training": "held-out training cases", "edited": "the edited cases"}[selection]
    return {
        "Data": dataset_name(dataset),
        "Editor": editor_name(editor),
        "Layers": architecture,
        "Epoch chosen by": chosen_by,
        "Patience": str(patience),
        "Margin": f"{margin:g}",
    }


def _encoder_scores(mine: pd.DataFrame) -> dict[str, str]:
    means = mine[["held_out", "accuracy", "best", "best_radius", "inside", "neighbours_inside"]].mean()
    return {
        "Held out": f"{means['held_out']:.3f}",
        "Other half": f"{means['accuracy']:.3f}",
        "At its best radius": f"{means['best']:.3f} ({means['best_radius']:.2f})",
        "Rephrased inside": f"{100 * means['inside']:.0f} %",
        "Neighbours inside": f"{100 * means['neighbours_inside']:.0f} %",
    }
