"""Intervals, names and tables, computed from records."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..datasets.base import dataset_title
from ..editors.base import EDITORS
from ..editors.registry import list_editors
from ..evaluation.evaluate import SINGLE
from ..evaluation.records import SCORED
from ..metrics.base import get_metric
from ..metrics.paper import PAPER_METRICS, PAPER_SCORES
from ..support.display import Markup, inline, printable
from ..support.errors import StudyError
from .comparisons import as_good_as_the_best
from .paper import UNEDITED

_LEVEL = 0.95
_RESAMPLES = 2_000
_GREY = 7  # index into the palette, for editors that are not installed here


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, on the scale of the values; the bounds are NaN if there is no interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{percent(self.mean)}% ({percent(self.low)}–{percent(self.high)})"


def interval(
    values: Sequence[float] | np.ndarray,
    binary: bool,
    shares: bool = True,
    samples: Sequence[int] | np.ndarray | None = None,
) -> Interval:
    """Mean of per-case values, without NaN: Wilson's interval for ``binary`` values, else a percentile bootstrap over cases.

    ``shares`` that are all 0 or all 1 also get Wilson's interval, because the bootstrap's would have zero width. Other values that are
    all equal have no interval.

    Args:
        samples: by value, the sample that its case belongs to. The cases of a sample that were edited in one model are not independent:
            with several samples, the bootstrap draws samples, and then cases of each.
    """
    data = np.asarray(values, dtype=float)
    groups = np.zeros(len(data)) if samples is None else np.asarray(samples)[~np.isnan(data)]
    data = data[~np.isnan(data)]
    low, high = float("nan"), float("nan")
    if len(data) == 0:
        return Interval(low, low, high, 0)
    if len(set(data)) > 1 and len(set(groups)) > 1:
        low, high = _over_samples(data, np.ones(len(data)), groups)
    elif np.isin(data, (0, 1)).all() and (binary or (shares and len(set(data)) == 1)):
        low, high = stats.binomtest(round(data.sum()), len(data)).proportion_ci(_LEVEL, method="wilson")
    elif len(set(data)) > 1:
        low, high = _resampled((data,), np.mean)
    return Interval(float(data.mean()), float(low), float(high), len(data))


def mean_over_tokens(
    losses: Sequence[float], tokens: Sequence[float], samples: Sequence[int] | np.ndarray | None = None
) -> Interval:
    """Mean loss over all tokens, from each case's mean loss and number of tokens; the bootstrap draws whole cases and, like
    :func:`interval`, samples."""
    sums, counts = np.multiply(losses, tokens), np.asarray(tokens, dtype=float)
    low, high = float("nan"), float("nan")
    if len(sums) == 0:
        return Interval(low, low, high, 0)
    if samples is not None and len(set(samples)) > 1:
        low, high = _over_samples(sums, counts, np.asarray(samples))
    elif len(sums) > 1:
        low, high = _resampled((sums, counts), lambda nats, of, axis=-1: nats.sum(axis) / of.sum(axis))
    return Interval(float(sums.sum() / counts.sum()), low, high, len(sums))


def _resampled(columns: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    """A percentile bootstrap interval over the rows of the columns."""
    seeded = {"n_resamples": _RESAMPLES, "rng": np.random.default_rng(0)}
    paired = len(columns) > 1
    drawn = stats.bootstrap(columns, statistic, paired=paired, confidence_level=_LEVEL, method="percentile", **seeded)
    low, high = drawn.confidence_interval
    return float(low), float(high)


def _over_samples(sums: np.ndarray, counts: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """A percentile bootstrap interval of a ratio of sums (cases,): as many samples as there are are drawn, and as many cases of each."""
    draw = np.random.default_rng(0)
    rows_of = [np.flatnonzero(samples == sample) for sample in np.unique(samples)]
    sizes = np.array(list(map(len, rows_of)))
    padded = np.array([np.pad(rows, (0, sizes.max() - len(rows))) for rows in rows_of])
    drawn = draw.integers(len(rows_of), size=(_RESAMPLES, len(rows_of)))
    size = sizes[drawn][..., None]
    cases = (draw.random((*drawn.shape, sizes.max())) * size).astype(int)
    rows = padded[drawn[..., None], cases]
    kept = np.arange(sizes.max()) < size
    ratios = (sums[rows] * kept).sum((1, 2)) / (counts[rows] * kept).sum((1, 2))
    low, high = np.quantile(ratios, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def scored(records: pd.DataFrame) -> pd.DataFrame:
    """The records that have scores; the others failed or have not been scored yet."""
    return records[records["state"] == SCORED]


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """Mean scores times 100 and the number of cases, a row per dataset and editor, and per number of edits where a model holds many.
    Held-out cases are left out."""
    many = (records["protocol"] != SINGLE).any()
    by = ["dataset", "editor", *(["position"] if many else [])]
    groups = scored(records[~records["held_out"]]).groupby(by, sort=False)
    means = (groups[list(PAPER_SCORES)].mean() * 100).round(2)
    means.insert(0, "n", groups.size())
    return means


class Table:
    """A table that displays as HTML in a notebook and as a numbered MyST table in the book.

    Attributes:
        data: cells; any cell, title or caption that is not ``Markup`` is escaped when it is shown.
        label: the name by which pages refer to the table; the notebook that shows the table sets it.
    """

    def __init__(self, data: pd.DataFrame, caption: str, label: str) -> None:
        self.data, self.caption, self.label = data, caption, label

    @property
    def _shown(self) -> pd.DataFrame:
        # A page may refer to a table that has no rows, but MyST rejects a table without cells.
        return self.data if len(self.data) else cells([{"": "(nothing to show)"}])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        shown = self._shown.rename(columns=inline).map(inline)
        plain = self._shown.map(lambda cell: html.unescape(cell) if isinstance(cell, Markup) else cell)
        return {
            "text/html": f"<p><em>{inline(self.caption)}</em></p>" + shown.to_html(escape=False, index=False),
            "text/markdown": self.to_myst(),
            "text/plain": printable(f"{self.caption}\n{plain.to_string(index=False)}"),
        }

    def to_myst(self) -> str:
        """The table as a captioned, labelled MyST directive."""
        return f"```{{table}} {inline(self.caption)}\n:name: {self.label}\n\n{to_markdown(self._shown)}\n```"


def table(rows: Callable[..., Any]) -> Callable[..., Table]:
    """Decorate a function that returns rows (dictionaries by column title) so that it returns a :class:`Table`.

    The decorated function also takes the table's ``label`` and ``caption``. Cells that a row lacks are empty.
    """

    @functools.wraps(rows)
    def shown(*arguments: Any, label: str, caption: str = "", **options: Any) -> Table:
        return Table(cells(rows(*arguments, **options)).fillna(""), caption, label)

    return shown


def cells(rows: Any) -> pd.DataFrame:
    """A table of any cells, with dtype object, so that pandas does not convert ``Markup``."""
    return pd.DataFrame(rows, dtype=object)


def to_markdown(data: pd.DataFrame) -> str:
    """A Markdown table; any cell or title that is not ``Markup`` is escaped."""
    rows = [map(inline, data.columns), ["---"] * data.shape[1], *(map(inline, row) for row in data.to_numpy())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_csv(measured: pd.DataFrame, file: Path, digits: int = 4) -> pd.DataFrame:
    """Write a measurement, rounded, as CSV, and return it unrounded."""
    file.parent.mkdir(parents=True, exist_ok=True)
    measured.round(digits).to_csv(file, index=False)
    return measured


def read_csv(file: Path, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    """A measurement as :func:`write_csv` wrote it, with columns ``numbers`` and ``others``.

    Raises:
        StudyError: it is not such a file, or one of these columns is missing, or one of ``numbers`` has something else; the message
            names both.
    """
    remedy = "remove the file and measure again, or restore it from the repository"
    try:
        measured = pd.read_csv(file)
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise StudyError(f"{file}: cannot be read as CSV ({error}): {remedy}") from error
    for column in (*numbers, *others):
        if column not in measured:
            raise StudyError(f"{file}: column {column!r} is missing: {remedy}")
        if column in numbers and not pd.api.types.is_numeric_dtype(measured[column]):
            raise StudyError(f"{file}: column {column!r} has something else than numbers: {remedy}")
    return measured


def score_rows(records: pd.DataFrame, metrics: Sequence[str] = PAPER_METRICS) -> Iterator[dict[str, str]]:
    """Rows of a table of metrics, by default the paper's ten scores and the share of unchanged neighbours.

    A row for each dataset and editor. A dataset's best values among edited rows are bold, and so are values not significantly worse
    (:func:`~clme_lib.study.comparisons.as_good_as_the_best`). A mean over only some of the cases says how many; the unedited subject's
    specificity is perfect by definition and has no interval.
    """
    described = [get_metric(name) for name in metrics]
    records = scored(records)
    best = as_good_as_the_best(records, described)
    for (dataset, editor), rows in records.groupby(["dataset", "editor"], sort=False):
        row = {"Data": dataset_title(str(dataset)), "Editor": editor_name(str(editor)), "n": str(len(rows))}
        for metric in described:
            score = (
                interval(rows[metric.name], metric.binary, shares=metric.highest == 1) if metric.name in rows else None
            )
            if score is None or score.n == 0:
                row[metric.title] = "–"
                continue
            shown = f"{100 * score.mean:.2f}"
            if (dataset, editor, metric.name) in best:
                shown = f"<strong>{shown}</strong>"
            own = editor == UNEDITED and metric.measure == "specificity"
            if not np.isnan(score.low) and not own:
                shown += f"<br><small>{percent(score.low)}–{percent(score.high)}</small>"
            if score.n < len(rows):
                shown += f"<br><small>n = {score.n}</small>"
            row[metric.title] = Markup(shown)
        yield row


def difference_cell(difference: np.ndarray, p: float) -> Markup:
    """The mean of paired differences (cases,) in points, with its 95% bootstrap interval over cases and ``p``."""
    if not difference.any():
        return Markup("0.00<br><small>the same</small>")
    mean = interval(difference, binary=False, shares=False)
    bounds = "" if np.isnan(mean.low) else f"{100 * mean.low:+.1f} to {100 * mean.high:+.1f}<br>"
    shown = "p &lt; 0.001" if p < 0.001 else f"p = {p:.3f}"
    return Markup(f"{100 * mean.mean:+.2f}<br><small>{bounds}{shown}</small>")


def in_order(editors: Iterable[str]) -> list[str]:
    """Editors in the order of tables; editors that are not installed here come last."""
    order = list_editors()
    return sorted(editors, key=lambda name: order.index(name) if name in order else len(order))


def editor_name(name: str) -> str:
    """An editor's name as the paper writes it; in capitals if the editor is not installed here."""
    return EDITORS[name].title if name in EDITORS else name.upper()


def editor_colour(name: str) -> tuple[float, float, float]:
    """An editor's colour in every figure: its own; a darker colour if it declares none; or grey if it is not installed here."""
    import seaborn as sns

    without = [other for other in EDITORS if EDITORS[other].colour is None]
    if name in without:
        return sns.husl_palette(len(without), l=0.4)[without.index(name)]
    place = EDITORS[name].colour if name in EDITORS else None
    return sns.color_palette("colorblind", 10)[_GREY if place is None else place]


def percent(share: float) -> str:
    """A share times 100, with one decimal."""
    return f"{100 * share:.1f}"
