"""Do people agree with the scorer? Pairs to label, and Cohen's kappa (paper section III-C).

:func:`draw` writes a table with an empty column for each labeller; filled in, :func:`agreement` reads it back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from ...support.errors import StudyError
from ...support.journal import write_text
from ...support.seeds import seeded_order
from .relevance import LEVELS
from .stages import StageRow


def sample_size(population: int, margin: float) -> int:
    """How many to label so that a share is known within ``margin`` at 95 % confidence (Cochran, corrected for a finite population).

    Raises:
        StudyError: the margin is not between 0 and 1.
    """
    if not 0 < margin < 1:
        raise StudyError(f"margin={margin} is not between 0 and 1")
    infinite = stats.norm.ppf(0.975) ** 2 * 0.25 / margin**2
    return min(population, math.ceil(infinite / (1 + (infinite - 1) / population)))


def draw(pairs: Sequence[StageRow], file: Path, margin: float, seed: int) -> int:
    """Write a random sample of scored pairs for two people to label (CSV), without the scorer's level. Returns their number.

    Raises:
        StudyError: the file exists (somebody may have filled it in).
    """
    if file.exists():
        raise StudyError(f"{file} exists already: somebody may have filled it in; choose another name")
    by_id = {row["id"]: row for row in pairs}
    sample = [by_id[pair] for pair in seeded_order(by_id, seed, "labels")[: sample_size(len(pairs), margin)]]
    table = pd.DataFrame(sample, columns=["id", "intent", "snippet"]).assign(**{"labeller 1": "", "labeller 2": ""})
    write_text(file, table.to_csv(index=False, lineterminator="\r\n"))
    return len(sample)


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
    spellings = {level: level for level in LEVELS} | {str(n): level for n, level in enumerate(LEVELS, 1)}
    for name in people:
        labels = table[name].str.strip().str.lower().map(spellings)
        if len(wrong := table[name][labels.isna()]):
            where = f"{file}, line {wrong.index[0] + 2}, {name}"
            raise StudyError(f"{where}: {wrong.iloc[0]!r} is not a level; use 1 to 5 or {', '.join(LEVELS)}")
        table[name] = labels
    table["scorer"] = table["id"].map(levels)
    if len(unknown := table["id"][table["scorer"].isna()]):
        raise StudyError(f"{file}: the scorer has no level for pair {unknown.iloc[0]}: is it of another construction?")
    rows = []
    for first, second in itertools.combinations([*people, "scorer"], 2):
        agree = (table[first] == table[second]).mean()
        kappa = cohen_kappa_score(table[first], table[second], labels=list(LEVELS))
        rows.append({"first": first, "second": second, "pairs": len(table), "agree": agree, "kappa": kappa})
    return pd.DataFrame(rows)
