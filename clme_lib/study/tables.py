"""Intervals, names and tables, computed from records."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from ..editors.registry import list_editors, registered_editors
from ..evaluation.records import SCORES

LEVEL = 0.95
RESAMPLES = 2_000
BINARY = ("effectiveness_em", "generalization_em", "specificity_em")
_METRIC_NAMES = {"em": "EM", "bleu": "BLEU", "rouge_l": "R-L"}
_GREY = 7  # in seaborn's colourblind palette
_DATASET_NAMES = {"cnle": "CNLE", "csne": "CSNE"}


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
    """Records that have scores (a case that failed has a reason instead)."""
    return records[records["error"].isna()]


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """Mean scores times 100 and the number of cases, a row per data set and editor."""
    groups = scored(records).groupby(["dataset", "editor"], sort=False)
    table = (groups[list(SCORES)].mean() * 100).round(2)
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
    shown = [*SCORES[:-1], "specificity_rate", SCORES[-1]]
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        cells = {
            editor: {score: interval(own[score], score in BINARY) for score in shown}
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
                bold = editor != "none" and score != "fluency" and intervals[score].mean == best[score]
                row[column_name(score)] = _cell(intervals[score], bold)
            rows.append(row)
    return pd.DataFrame(rows)


def in_order(editors: Iterable[str]) -> list[str]:
    """Editors in the order of tables; those of which only records are here come last."""
    order = list_editors()
    return sorted(editors, key=lambda name: order.index(name) if name in order else len(order))


def editor_name(name: str) -> str:
    """An editor's name as the paper writes it; records may be of an editor that is not installed here."""
    editor = registered_editors().get(name)
    return name.upper() if editor is None else editor.title


def editor_colour(name: str) -> tuple[float, float, float]:
    """An editor's colour in every figure: its own, a darker one of those that are spread over the editors without, or grey."""
    import seaborn as sns

    editors = registered_editors()
    without = [other for other, editor in editors.items() if editor.colour is None]
    if name in without:
        return sns.husl_palette(len(without), l=0.4)[without.index(name)]
    place = editors[name].colour if name in editors else None
    return sns.color_palette("colorblind", 10)[_GREY if place is None else place]


def dataset_name(name: str) -> str:
    """A data set's name as the paper writes it."""
    return _DATASET_NAMES.get(name, name.upper())


def column_name(score: str) -> str:
    """A score's name in a table's head."""
    if score in ("fluency", "specificity_rate"):
        return "FL." if score == "fluency" else "Spec. kept"
    measure, metric = score.split("_", 1)
    return (
        {"effectiveness": "Eff.", "generalization": "Gen.", "specificity": "Spec."}[measure]
        + " "
        + _METRIC_NAMES[metric]
    )


def _cell(found: Interval, bold: bool) -> str:
    mean = f"<strong>{100 * found.mean:.2f}</strong>" if bold else f"{100 * found.mean:.2f}"
    return mean if np.isnan(found.low) else f"{mean}<br><small>{100 * found.low:.1f}–{100 * found.high:.1f}</small>"


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f} % ({100 * found.low:.1f}–{100 * found.high:.1f})"
