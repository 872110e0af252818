"""Selection of a subject's hyper-parameters on the fixed selection cases, which no published table contains.

The criterion is the harmonic mean of effectiveness and specificity: exact match of the target, and the share of
neighbours left unchanged, each averaged over both data sets. A grid is ordered by distance from the paper's setting, and
the first entry whose criterion reaches 0.95 is chosen: no further from the paper than it takes. If none does, the best is.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from .datasets import load_cases, selection_ids
from .editors import load_editor
from .errors import StudyError
from .evaluation import evaluate
from .prompts import DATASETS
from .subjects import Subject

GOOD_ENOUGH = 0.95
# every combination is tried; the paper's own setting, transferred, is the first
GRIDS: dict[str, list[dict[str, Any]]] = {
    # the paper's ratio of learning rate to bound is kept: the search is over how wide the box is, and where
    "ft-l": [
        {"layer": layer, "bound": bound, "lr": 5 * bound}
        for layer, bound in product((21, 14), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
    ],
    "grace": [
        {"layer": layer, "steps": steps, "lr": lr}
        for layer, steps, lr in product((27, 24, 20, 16), (30, 50), (1.0, 0.5))
    ],
}
COLUMNS = [
    "editor",
    "setting",
    "effectiveness_em",
    "generalization_em",
    "specificity_rate",
    "loss",
    "criterion",
    "chosen",
]


def select(subject: Subject, editor: str, file: Path, batch_size: int = 30) -> pd.DataFrame:
    """Try an editor's grid and write the table ``file`` (CSV, one row a setting, in the grid's order); returns it.

    Raises:
        StudyError: the editor has no grid.
    """
    if editor not in GRIDS:
        raise StudyError(f"no grid to select {editor!r} from; known: {', '.join(GRIDS)}")
    rows = []
    for setting in tqdm(GRIDS[editor], desc=f"select {editor}", unit="setting"):
        parts = []
        for dataset in DATASETS:
            cases = [case for case in load_cases(dataset) if case.case_id in selection_ids(dataset)]
            edits = load_editor(editor, subject, values="transferred", **setting).edit(cases, batch_size=batch_size)
            parts.append(evaluate(subject, cases, edits))
        means = [part[["effectiveness_em", "generalization_em", "specificity_rate", "loss"]].mean() for part in parts]
        mean = sum(means) / len(means)
        rows.append(
            {
                "editor": editor,
                "setting": ", ".join(f"{name} {value:g}" for name, value in setting.items()),
                "effectiveness_em": mean["effectiveness_em"],
                "generalization_em": mean["generalization_em"],
                "specificity_rate": mean["specificity_rate"],
                "loss": mean["loss"],
                "criterion": harmonic_mean(mean["effectiveness_em"], mean["specificity_rate"]),
            }
        )
    table = choose(pd.DataFrame(rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    return table


def choose(measured: pd.DataFrame) -> pd.DataFrame:
    """Mark the chosen setting of a grid in its order: the first good enough, else the best."""
    reached = measured.index[measured["criterion"] >= GOOD_ENOUGH]
    best = reached[0] if len(reached) else measured["criterion"].idxmax()
    return measured.assign(chosen=measured.index == best)[COLUMNS]


def harmonic_mean(one: float, other: float) -> float:
    """0 when either is 0."""
    return 2 * one * other / (one + other) if one + other else 0.0
