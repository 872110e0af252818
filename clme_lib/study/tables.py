"""Intervals, names and tables, computed from records."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from ..datasets.base import dataset_title
from ..editors.registry import EDITORS
from ..evaluation.records import SCORED
from ..metrics.base import get_metric
from ..metrics.paper import PAPER_METRICS, PAPER_SCORES

LEVEL = 0.95
RESAMPLES = 2_000
_EDITOR_NAMES = {
    "none": "unedited",
    "ft-l": "FT-L",
    "rome": "ROME",
    "memit": "MEMIT",
    "pmet": "PMET",
    "malmen": "MALMEN",
    "grace": "GRACE",
    "a-grace": "A-GRACE",
    "a-grace-wo-cl": "A-GRACE w/o CL",
    "a-grace-wo-mean": "A-GRACE w/o Mean",
}
# places in seaborn's colourblind palette, the same in all figures
_COLOURS = {
    "ft-l": 0,
    "rome": 1,
    "memit": 8,
    "pmet": 4,
    "malmen": 9,
    "grace": 2,
    "a-grace": 3,
    "a-grace-wo-cl": 5,
    "a-grace-wo-mean": 6,
}


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, on the scale of the values."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], binary: bool) -> Interval:
    """Mean of per-case values: Wilson's interval for 0/1 values, else percentile bootstrap over cases."""
    data = np.asarray(values, dtype=float)
    mean, n = float(data.mean()), len(data)
    if binary:
        bounds = stats.binomtest(round(data.sum()), n).proportion_ci(LEVEL, method="wilson")
        return Interval(mean, float(bounds.low), float(bounds.high), n)
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    drawn = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high), n)


def scored(records: pd.DataFrame) -> pd.DataFrame:
    """Records that have scores; others failed, or are not scored yet."""
    return records[records["state"] == SCORED]


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """Mean scores times 100 and the number of cases, a row per data set and editor."""
    groups = scored(records).groupby(["dataset", "editor"], sort=False)
    table = (groups[list(PAPER_SCORES)].mean() * 100).round(2)
    table.insert(0, "n", groups.size())
    return table


class Table:
    """A table that shows itself: HTML in a notebook, a numbered MyST table in the book.

    Attributes:
        data: cells as (possibly HTML) text.
    """

    def __init__(self, data: pd.DataFrame, caption: str, name: str) -> None:
        self.data, self.caption, self.name = data, caption, name

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {
            "text/html": f"<p><em>{html.escape(self.caption)}</em></p>" + self.data.to_html(escape=False, index=False),
            "text/markdown": self.to_myst(),
            "text/plain": f"{self.caption}\n{self.data.to_string(index=False)}",
        }

    def to_myst(self) -> str:
        """The table as a captioned, labelled MyST directive."""
        rows = [list(self.data.columns), ["---"] * self.data.shape[1], *self.data.to_numpy().tolist()]
        body = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
        return f"```{{table}} {self.caption}\n:name: {self.name}\n\n{body}\n```"


def score_rows(records: pd.DataFrame) -> pd.DataFrame:
    """Cells of a table of all ten scores and the share of unchanged neighbours, a row per data set and editor.

    The best edited row is in bold, but for fluency: its entropy tells broken text (too low), not better text, apart.
    """
    rows = []
    shown = PAPER_METRICS
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        cells = {
            editor: {score: interval(own[score], get_metric(score).binary) for score in shown}
            for editor, own in mine.groupby("editor", sort=False)
        }
        best = {s: max((c[s].mean for editor, c in cells.items() if editor != "none"), default=None) for s in shown}
        for editor, intervals in cells.items():
            row = {
                "Data": dataset_name(str(dataset)),
                "Editor": editor_name(str(editor)),
                "n": str(next(iter(intervals.values())).n),
            }
            for score in shown:
                bold = (
                    editor != "none"
                    and bool(get_metric(score).higher_is_better)
                    and intervals[score].mean == best[score]
                )
                row[column_name(score)] = _cell(intervals[score], bold)
            rows.append(row)
    return pd.DataFrame(rows)


def editor_name(name: str) -> str:
    """An editor's name as the paper writes it."""
    return _EDITOR_NAMES.get(name, name if name in EDITORS else name.upper())


def editor_colour(name: str) -> tuple[float, float, float]:
    """An editor's colour in every figure."""
    import seaborn as sns

    # an editor that is not the paper's takes the palette's grey
    return sns.color_palette("colorblind", 10)[_COLOURS.get(name, 7)]


def dataset_name(name: str) -> str:
    """A data set's name as the paper writes it."""
    return dataset_title(name)


def column_name(score: str) -> str:
    """A score's name in a table's head."""
    return get_metric(score).title


def _cell(found: Interval, bold: bool) -> str:
    mean = f"<strong>{100 * found.mean:.2f}</strong>" if bold else f"{100 * found.mean:.2f}"
    return mean if np.isnan(found.low) else f"{mean}<br><small>{100 * found.low:.1f}–{100 * found.high:.1f}</small>"


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f} % ({100 * found.low:.1f}–{100 * found.high:.1f})"
