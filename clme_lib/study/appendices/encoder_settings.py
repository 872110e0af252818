"""A-GRACE's encoder by setting and by number of training cases: the measurement and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ...datasets.base import dataset_title
from ...datasets.cases import sample_cases, split_cases
from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import load_cases
from ...editors.contrastive_encoder import Pairs, balanced_accuracy, make_pairs
from ...edits.encoder import Encoder
from ...subjects.subject import Subject
from ...support.seeds import DEFAULT_SEED
from ..paper import A_GRACE
from ..rq3.measurements import MARGINS, fitted_editor
from ..tables import editor_name, read_csv, table, write_csv

SIZES = (50, 100, 200)
# the released program's values, except for the cases that choose the epoch
_USUAL: dict[str, Any] = {"margin": 1.0, "architecture": "released", "selection": "training", "patience": 5}
_SETTINGS = ["dataset", "editor", *_USUAL]
# of the table that compare_encoders writes: numbers, and other columns
COLUMNS = (
    ["margin", "patience", "cases", "held_out", "accuracy", "best", "best_radius", "inside", "neighbours_inside"],
    ["dataset", "editor", "architecture", "selection"],
)


@table
def setting_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Encoders by setting, trained on the whole of one half (:func:`compare_encoders`); means over both halves."""
    chosen_by = {"training": "held-out training cases", "edited": "the edited cases"}
    for keys, halves in measured[_on_whole_half(measured)].groupby(_SETTINGS, sort=False):
        dataset, editor, margin, architecture, selection, patience = keys
        yield {
            "Data": dataset_title(dataset),
            "Editor": editor_name(editor),
            "Layers": architecture,
            "Epoch chosen by": chosen_by[selection],
            "Patience": str(patience),
            "Margin": f"{margin:g}",
            **_score_cells(halves),
        }


@table
def size_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The encoder by number of training cases (:func:`compared_sizes`); means over both halves."""
    grown = compared_sizes(measured)
    # the halves of a dataset of odd size differ by one case
    largest = grown.groupby("dataset")["cases"].transform("max")
    grown = grown.assign(cases=grown["cases"].mask(_on_whole_half(grown), largest))
    for (dataset, count), halves in grown.groupby(["dataset", "cases"]):
        yield {"Data": dataset_title(dataset), "Training cases": str(count), **_score_cells(halves)}


def compared_sizes(measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of the setting that was trained on several numbers of cases."""
    return measured.groupby(_SETTINGS).filter(lambda rows: rows["cases"].nunique() > 2)


def _on_whole_half(measured: pd.DataFrame) -> pd.Series:
    return measured.groupby(_SETTINGS)["cases"].transform("max") // 10 * 10 <= measured["cases"]


def _score_cells(halves: pd.DataFrame) -> dict[str, str]:
    means = halves[["held_out", "accuracy", "best", "best_radius", "inside", "neighbours_inside"]].mean()
    return {
        "Held out": f"{means['held_out']:.3f}",
        "Other half": f"{means['accuracy']:.3f}",
        "At its best radius": f"{means['best']:.3f} ({means['best_radius']:.2f})",
        "Rephrased inside": f"{100 * means['inside']:.0f}%",
        "Neighbours inside": f"{100 * means['neighbours_inside']:.0f}%",
    }


def encoder_settings(margin: float) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """(editor, hyperparameters, training cases) of every encoder compared; the paper's own is the first.

    Args:
        margin: margin of the settings that vary something else.
    """
    yield from ((A_GRACE, {"margin": compared}, None) for compared in MARGINS)
    yield A_GRACE, {"margin": 1.0, "patience": 30}, None
    yield from ((A_GRACE, {"margin": compared, "architecture": "paper"}, None) for compared in (1.0, margin))
    yield A_GRACE, {"margin": margin, "selection": "edited"}, None
    yield from (("a-grace-wo-mean", {"margin": compared}, None) for compared in (1.0, margin))
    yield from ((A_GRACE, {"margin": margin}, size) for size in SIZES)


def compare_encoders(subject: Subject, file: Path, margin: float = 2.0) -> pd.DataFrame:
    """Train encoders on each half of each dataset and test them on the other half; written as CSV, a row for each encoder.

    Columns: ``cases`` (number of training cases, including those held out to choose the epoch), ``epochs``, ``chosen`` (the chosen
    epoch), ``held_out`` (its balanced accuracy on these), ``accuracy`` (on the other half, at the editor's radius), ``inside`` and
    ``neighbours_inside`` (shares of rephrased prompts and of neighbours within this radius), ``best`` and ``best_radius`` (the
    highest accuracy on the other half, and its radius). A constant answer has an accuracy of 0.5.

    Finished rows are kept, so that an interrupted command resumes.
    """
    rows = read_csv(file, *COLUMNS).to_dict("records") if file.is_file() else []
    known = set(map(_key, rows))
    settings = list(encoder_settings(margin))
    work = [(d, fold, *setting) for d in PAPER_DATASET_NAMES for fold in (0, 1) for setting in settings]
    for dataset, fold, editor, setting, size in tqdm(work, desc="encoders", unit="encoder"):
        halves = split_cases(load_cases(dataset), DEFAULT_SEED)
        edited, learnt = halves[fold], halves[1 - fold]
        learnt = sample_cases(learnt, size, 0) if size else learnt
        row = {"dataset": dataset, "fold": fold, "editor": editor, **_USUAL, **setting, "cases": len(learnt)}
        if _key(row) in known:
            continue
        made = fitted_editor(subject, editor, learnt, edited, **{**setting, "margin": {dataset: setting["margin"]}})
        log = made.trained.header["log"]
        pairs = make_pairs(subject, edited, made.hparams.layer, made.query)
        held_out = [epoch["accuracy"] for epoch in log]
        row |= _scores(pairs, made.trained.encoder, made.hparams.radius)
        row |= {"epochs": len(log), "chosen": 1 + int(np.argmax(held_out)), "held_out": max(held_out)}
        rows.append(row)
        known.add(_key(row))
        write_csv(pd.DataFrame(rows), file)
    return pd.DataFrame(rows)


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("fold", "cases", *_SETTINGS))


def _scores(pairs: Pairs, encoder: Encoder, radius: float) -> dict[str, float]:
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
