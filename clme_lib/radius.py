"""Whether an edit can be found again by other wordings of its prompt, and not by its neighbours: A-GRACE's encoder and radius.

:func:`compare_encoders` asks the encoders alone. :func:`sweep_radius` asks what the radius does to the study's
measures: what a prompt's continuation becomes *if* the codebook fires does not depend on the encoder, so the texts of a
few edits with an infinite radius, and the distances under each encoder, give every radius at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .datasets import folds, load_cases, sample_cases, selection_cases
from .datasets.cases import Case
from .editors import load_editor
from .editors.a_grace import EncodedGRACE
from .editors.encoder_training import Pairs, make_pairs
from .encoder import Encoder, balanced_accuracy
from .evaluation import evaluate
from .prompts import DATASETS
from .seeds import DEFAULT_SEED
from .subjects import Subject
from .unedited import answers_for

MARGINS = (1.0, 1.5, 2.0, 3.0, 4.0)
SIZES = (50, 100, 200)
RADII = 61  # how many the sweep takes, from nothing to the largest distance
_EVERYTHING = 1e9

Setting = dict[str, Any]


def encoder_settings(margin: float) -> Iterator[tuple[str, Setting, int | None]]:
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
        made = _fitted(subject, editor, dataset, setting, learnt, edited)
        assert made.trained is not None
        log = made.trained.header["log"]
        pairs = make_pairs(subject, edited, made.values.layer, made.query)
        rows.append({**row, **_found(pairs, made.trained.encoder, made.values.radius), "epochs": len(log),
                     "chosen": 1 + int(np.argmax([epoch["accuracy"] for epoch in log])),
                     "held_out": max(epoch["accuracy"] for epoch in log)})  # fmt: skip
        known.add(_key(row))
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(4).to_csv(file, index=False)
    return pd.DataFrame(rows)


def sweep_radius(subject: Subject, file: Path, cases: int, margins: Sequence[float] = MARGINS) -> pd.DataFrame:
    """Exact match of all measures as a function of the radius, on the selection cases; written as CSV.

    One row for each data set, editor, margin and radius: ``effectiveness``, ``generalization``, ``specificity`` (all five
    neighbours unchanged) and ``specificity_rate``, in [0, 1]. Encoders are trained on all cases that are not selection
    cases. GRACE and A-GRACE without contrastive learning have no margin.

    Args:
        cases: of each data set's selection cases, the first so many.
    """
    rows = []
    for dataset in DATASETS:
        chosen, others = selection_cases(dataset, cases)
        everything = load_editor("a-grace-wo-cl", subject, radius=_EVERYTHING).edit(chosen, progress=True)
        if_fired = evaluate(subject, chosen, everything)
        otherwise = evaluate(subject, chosen, load_editor("none", subject).edit(chosen))
        answers = [answers_for(subject, case.unrelated) for case in chosen]
        same = [
            np.array([one == other for one, other in zip(written, answer)])
            for written, answer in zip(if_fired["generated_specificity"], answers)
        ]
        layer = everything[0].layers[0]
        asked: list[tuple[str, float | None, Pairs, Encoder | None]] = [
            ("grace", None, make_pairs(subject, chosen, layer, "last"), None),
            ("a-grace-wo-cl", None, make_pairs(subject, chosen, layer, "mean"), None),
        ]
        for name in ("a-grace", "a-grace-wo-mean"):
            for margin in margins:
                made = _fitted(subject, name, dataset, {"margin": margin}, others, chosen)
                assert made.trained is not None
                pairs = make_pairs(subject, chosen, made.values.layer, made.query)
                asked.append((name, margin, pairs, made.trained.encoder))
        for name, its_margin, pairs, encoder in asked:
            distance = _by_case(pairs.distances(encoder), chosen)
            top = max(float(one.max()) for one in distance)
            # the paper's radius is always among them
            for radius in sorted({1.0, *np.linspace(0, top, RADII).tolist()}):
                fired = [one <= radius for one in distance]
                general = [
                    yes if hit[0] else no
                    for hit, yes, no in zip(fired, if_fired["generalization_em"], otherwise["generalization_em"])
                ]
                kept = [~hit[1:] | unchanged for hit, unchanged in zip(fired, same)]
                rows.append(
                    {
                        "dataset": dataset,
                        "editor": name,
                        "margin": its_margin,
                        "radius": radius,
                        "cases": len(chosen),
                        "effectiveness": if_fired["effectiveness_em"].mean(),
                        "generalization": float(np.mean(general)),
                        "specificity": float(np.mean([one.all() for one in kept])),
                        "specificity_rate": float(np.mean([one.mean() for one in kept])),
                    }
                )
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    return table


def _fitted(
    subject: Subject, editor: str, dataset: str, setting: Setting, learnt: Sequence[Case], edited: Sequence[Case]
) -> EncodedGRACE:
    made = load_editor(editor, subject, **{**setting, "margin": {dataset: setting["margin"]}})
    assert isinstance(made, EncodedGRACE)
    made.fit(learnt, edited=edited)
    return made


def _shown(setting: Setting) -> dict[str, Any]:
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


def _by_case(distance: torch.Tensor, cases: Sequence[Case]) -> list[np.ndarray]:
    """Distances case by case: the rephrased prompt's, then the neighbours'."""
    return [one.cpu().numpy() for one in distance.split([1 + len(case.unrelated) for case in cases])]
