"""A-GRACE's encoder by setting and by training size: the measurement and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ...datasets.cases import DATASETS, folds, sample_cases
from ...datasets.registry import load_cases
from ...editors.contrastive_encoder import Pairs, balanced_accuracy, make_pairs
from ...edits.encoder import Encoder
from ...subjects.subject import Subject
from ...support.seeds import DEFAULT_SEED
from ..rq3.radius import MARGINS, fitted_editor
from ..tables import Table, dataset_name, editor_name


def encoder_tables(measured: pd.DataFrame) -> tuple[Table, Table]:
    """Encoders by setting (trained on all of the other half), and by training size; means over both halves.

    Args:
        measured: what ``clme encoders`` writes (:func:`clme_lib.study.appendices.encoder_settings.compare_encoders`).
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


SIZES = (50, 100, 200)


def encoder_settings(margin: float) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """(editor, hyper-parameters, training cases) of every encoder compared; the paper's own is the first.

    Args:
        margin: of the settings that differ in something else.
    """
    for one in MARGINS:
        yield "a-grace", {"margin": one}, None
    yield "a-grace", {"margin": 1.0, "patience": 30}, None
    for architecture_margin in (1.0, margin):
        yield "a-grace", {"margin": architecture_margin, "architecture": "paper"}, None
    yield "a-grace", {"margin": margin, "selection": "edited"}, None
    for one in (1.0, margin):
        yield "a-grace-wo-mean", {"margin": one}, None
    for size in SIZES:
        yield "a-grace", {"margin": margin}, size


def compare_encoders(subject: Subject, file: Path, margin: float = 2.0) -> pd.DataFrame:
    """Train encoders on each half of each data set and ask them about the other; written as CSV, a row an encoder.

    Columns: ``cases`` (trained on, with those held out to choose the epoch), ``epochs``, ``chosen`` (the epoch that was),
    ``held_out`` (its balanced accuracy there), ``accuracy`` (on the other half, at the editor's radius), ``inside`` and
    ``neighbours_inside`` (shares of the rephrased and of the neighbour prompts within it), ``best`` and ``best_radius``
    (the accuracy that the best radius would have on that half). 0.5 is what no encoder, or any constant, gets.

    A finished part of the table is kept: the command resumes.
    """
    done = pd.read_csv(file) if file.is_file() else pd.DataFrame()
    rows = done.to_dict("records")
    known = {_key(row) for row in rows}
    settings = list(encoder_settings(margin))
    work = [(d, fold, *setting) for d in DATASETS for fold in (0, 1) for setting in settings]
    for dataset, fold, editor, setting, size in tqdm(work, desc="encoders", unit="encoder"):
        cases = {case.case_id: case for case in load_cases(dataset)}
        halves = folds(list(cases.values()), DEFAULT_SEED)
        learnt, edited = ([cases[n] for n in halves[part]] for part in (1 - fold, fold))
        learnt = sample_cases(learnt, size, 0) if size else learnt
        row = {"dataset": dataset, "fold": fold, "editor": editor, **_shown(setting), "cases": len(learnt)}
        if _key(row) in known:
            continue
        options = {**setting, "margin": {dataset: setting["margin"]}}
        fitted = fitted_editor(subject, editor, learnt, edited, **options)
        log = fitted.trained.header["log"]
        pairs = make_pairs(subject, edited, fitted.hparams.layer, fitted.query)
        rows.append({**row, **_found(pairs, fitted.trained.encoder, fitted.hparams.radius), "epochs": len(log),
                     "chosen": 1 + int(np.argmax([epoch["accuracy"] for epoch in log])),
                     "held_out": max(epoch["accuracy"] for epoch in log)})  # fmt: skip
        known.add(_key(row))
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(4).to_csv(file, index=False)
    return pd.DataFrame(rows)


def _shown(setting: dict[str, Any]) -> dict[str, Any]:
    defaults = {"architecture": "released", "selection": "training", "patience": 5}
    return {"margin": setting["margin"], **{name: setting.get(name, one) for name, one in defaults.items()}}


def _key(row: dict) -> tuple:
    names = ("dataset", "fold", "editor", "margin", "architecture", "selection", "patience", "cases")
    return tuple(row[name] for name in names)


def _found(pairs: Pairs, encoder: Encoder, radius: float) -> dict[str, float]:
    distance = pairs.distances(encoder)
    inside = (distance <= radius).double()
    radii = torch.linspace(0, float(distance.max()), 400).tolist()
    scores = balanced_accuracy(distance, pairs.positive, radii)
    best = int(np.argmax(scores))
    return {
        "accuracy": balanced_accuracy(distance, pairs.positive, radius)[0],
        "inside": inside[pairs.positive].mean().item(),
        "neighbours_inside": inside[~pairs.positive].mean().item(),
        "best": scores[best],
        "best_radius": radii[best],
    }
