"""Do people agree with the scorer? Pairs to label, and Cohen's kappa (paper section III-C).

:func:`draw` writes a table with an empty column for each labeller; filled in, :func:`agreement` reads it back.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
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
    """How many pairs to label to know a share within ``margin`` at 95% confidence (Cochran, corrected for a finite population).

    Raises:
        StudyError: the margin is not between 0.001 and 1.
    """
    if not 0.001 <= margin < 1:
        raise StudyError(f"margin={margin} is not between 0.001 and 1")
    infinite = stats.norm.ppf(0.975) ** 2 * 0.25 / margin**2
    return min(population, math.ceil(infinite / (1 + (infinite - 1) / population)))


def draw(pairs: Sequence[StageRow], file: Path, margin: float, seed: int) -> int:
    """Write a random sample of scored pairs for two people to label (CSV), without the scorer's level. Returns their number.

    Raises:
        StudyError: the file exists (it may have been filled in).
    """
    if os.path.lexists(file):
        raise StudyError(f"{file} already exists and may have been filled in; choose another name")
    if not pairs:
        raise StudyError("no pair has a level, so there is nothing to label; see the counts of the stage score")
    by_id = {row["id"]: row for row in pairs}
    sample = [by_id[pair] for pair in seeded_order(by_id, seed, "labels")[: sample_size(len(pairs), margin)]]
    texts = pd.DataFrame(sample, columns=["id", "intent", "snippet"])
    for name in ("intent", "snippet"):
        # A spreadsheet would take a text that begins like this for a formula.
        texts[name] = texts[name].str.replace(r"^(?=[=+\-@\t\r])", "'", regex=True)
    table = texts.assign(**{"labeller 1": "", "labeller 2": ""})
    write_text(file, table.to_csv(index=False, lineterminator="\r\n"))
    return len(sample)


def agreement(file: Path, levels: dict[str, str]) -> pd.DataFrame:
    """Cohen's kappa among the labellers and of each with the scorer, and how often they agree.

    Args:
        levels: the scorer's level of each pair, by its id as text.

    Raises:
        StudyError: the file is not a table of labels, a label is missing or not a level, or a pair is unknown or occurs twice.
    """
    from sklearn.metrics import cohen_kappa_score

    table = _read(file)
    people = [name for name in table.columns if name.startswith("labeller")]
    if len(people) < 2 or not len(table) or "id" not in table:
        raise StudyError(
            f"{file}: no pairs with columns 'id', 'labeller 1', 'labeller 2': draw them again, and fill in only the labels"
        )
    if len(repeated := table["id"][table["id"].duplicated()]):
        raise StudyError(f"{file}, row {repeated.index[0]}: pair {repeated.iloc[0]} occurs twice; remove one of them")
    spellings = {level: level for level in LEVELS} | {str(n): level for n, level in enumerate(LEVELS, 1)}
    for name in people:
        labels = table[name].str.strip().str.lower().map(spellings)
        if len(wrong := table[name][labels.isna()]):
            where = f"{file}, row {wrong.index[0]}, {name}"
            raise StudyError(f"{where}: {wrong.iloc[0]!r} is not a level; use 1 to 5 or {', '.join(LEVELS)}")
        table[name] = labels
    table["scorer"] = table["id"].map(levels)
    if len(unknown := table["id"][table["scorer"].isna()]):
        raise StudyError(f"{file}: the scorer has no level for pair {unknown.iloc[0]}: is it from another build?")
    rows: list[dict[str, str | float]] = []
    for first, second in itertools.combinations([*people, "scorer"], 2):
        agree = (table[first] == table[second]).mean()
        kappa = cohen_kappa_score(table[first], table[second], labels=list(LEVELS))
        rows.append({"first": first, "second": second, "pairs": len(table), "agree": agree, "kappa": kappa})
    return pd.DataFrame(rows)


def _read(file: Path) -> pd.DataFrame:
    """The cells of a CSV file as text; StudyError if it is not a CSV file, or a line has more or fewer cells than the header."""
    try:
        if not file.is_file():
            raise ValueError("it is a folder or a device")
        text = file.read_bytes().decode("utf-8-sig")
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise StudyError(f"{file}: cannot be read as UTF-8 CSV with a header: {error}; draw the pairs again") from error
    rows = {number: cells for number, cells in enumerate(lines, 2) if cells}
    for number, cells in rows.items():
        if len(cells) != len(header):
            raise StudyError(f"{file}, row {number}: {len(cells)} cells, the header has {len(header)}; correct the row")
    if len(set(header)) < len(header):
        raise StudyError(f"{file}: column {max(header, key=header.count)!r} occurs twice; remove one of them")
    return pd.DataFrame(rows.values(), index=rows.keys(), columns=header, dtype=str)
