"""Do people agree with the scorer? Pairs to label, and Cohen's kappa (paper section III-C).

:func:`draw` writes a table with an empty column for each labeller; filled in, :func:`agreement` reads it back.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from ...support.errors import StudyError
from ...support.seeds import seeded_order
from .relevance import LEVELS
from .stages import Row


def sample_size(population: int, margin: float, confidence: float = 0.95) -> int:
    """How many to label so that a share is known within ``margin`` (Cochran, with the correction for a finite population)."""
    if not 0 < margin < 1:
        raise StudyError(f"margin={margin} is not between 0 and 1")
    z = stats.norm.ppf(0.5 + confidence / 2)
    infinite = z**2 * 0.25 / margin**2
    return min(population, math.ceil(infinite / (1 + (infinite - 1) / population)))


def draw(pairs: Sequence[Row], file: Path, margin: float, seed: int, labellers: int = 2) -> int:
    """Write a random sample of scored pairs for people to label (CSV); the scorer's level is not shown. Returns their number.

    Raises:
        StudyError: the file exists (somebody may have filled it in).
    """
    if file.exists():
        raise StudyError(f"{file} exists already: somebody may have filled it in; choose another name")
    count = sample_size(len(pairs), margin)
    by_id = {row["id"]: row for row in pairs}
    order = [by_id[one] for one in seeded_order(by_id, seed, "labels")[:count]]
    unfinished = file.with_name(f"{file.name}.part")
    with unfinished.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "intent", "snippet", *(f"labeller {n + 1}" for n in range(labellers))])
        writer.writerows([row["id"], row["intent"], row["snippet"], *[""] * labellers] for row in order)
    os.replace(unfinished, file)
    return count


def agreement(file: Path, levels: dict[str, str]) -> pd.DataFrame:
    """Cohen's kappa among the labellers and of each with the scorer, and how often they agree.

    Args:
        levels: the scorer's level of each pair, by its id as text.

    Raises:
        StudyError: a label is missing or is no level.
    """
    from sklearn.metrics import cohen_kappa_score

    table = pd.read_csv(file, dtype=str).fillna("")
    people = [name for name in table.columns if name.startswith("labeller")]
    if not people or not len(table):
        raise StudyError(f"{file}: no pairs with columns 'labeller 1', 'labeller 2'")
    for name in people:
        labels = table[name].str.strip().str.lower()
        wrong = table.index[~labels.isin([*LEVELS, *"12345"])]
        if len(wrong):
            raise StudyError(
                f"{file}, line {wrong[0] + 2}, {name}: {table[name][wrong[0]]!r} is not a level; use 1 to 5 or {', '.join(LEVELS)}"
            )
        table[name] = [LEVELS[int(one) - 1] if one.isdigit() else one for one in labels]
    unknown = [one for one in table["id"] if one not in levels]
    if unknown:
        raise StudyError(f"{file}: the scorer has no level for pair {unknown[0]}: is it of another construction?")
    table["scorer"] = [levels[one] for one in table["id"]]
    rows = []
    for one, other in itertools.combinations([*people, "scorer"], 2):
        rows.append(
            {
                "one": one,
                "other": other,
                "pairs": len(table),
                "agree": (table[one] == table[other]).mean(),
                "kappa": cohen_kappa_score(table[one], table[other], labels=list(LEVELS)),
            }
        )
    return pd.DataFrame(rows)
