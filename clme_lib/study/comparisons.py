"""Which editors differ: paired tests on cases that both edited, with Holm's correction over all comparisons of a table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from ..evaluation.records import SCORED
from ..metrics.base import Metric
from .paper import UNEDITED

Key = TypeVar("Key", bound=Hashable)
SIGNIFICANT = 0.05


def paired_p(differences: np.ndarray) -> float:
    """Two-sided p of paired differences (cases,): McNemar's exact test if all are -1, 0 or 1, else Wilcoxon's signed-rank test.
    Both tests leave out zero differences; p is 1 if all differences are zero. Wilcoxon's p is exact for up to 13 other differences, and for
    up to 50 if no two are equal in size; beyond that it is the normal approximation's."""
    differences = differences.astype(float).round(9)  # equal differences of scores may differ in their last bits
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    if (abs(differences) == 1).all():
        return float(stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    if len(differences) == 1:
        return 1.0  # both signs are as extreme; the permutation test needs two differences
    return _signed_rank_p(tuple(sorted(differences.tolist())))


# the tables of a page compare the same records again, and SciPy needs half a second for 8,192 permutations
@lru_cache(maxsize=4096)
def _signed_rank_p(differences: tuple[float, ...]) -> float:
    every_sign = stats.PermutationMethod(n_resamples=2 ** len(differences)) if len(differences) <= 13 else "auto"
    return float(stats.wilcoxon(differences, method=every_sign).pvalue)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p values: rejecting those below a level keeps the chance of any false rejection at or below that level (Holm, 1979)."""
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = highest
    return adjusted


def as_good_as_the_best(records: pd.DataFrame, metrics: Sequence[Metric]) -> set[tuple[str, str, str]]:
    """(dataset, editor, metric) for the edited rows with the best mean, and for rows that are not significantly worse.

    Each editor is compared with the best on the cases that both have, with Holm's correction over all datasets, metrics and editors.
    """
    edited = records[(records["state"] == SCORED) & (records["editor"] != UNEDITED)]
    best: set[tuple[str, str, str]] = set()
    p_values: dict[tuple[str, str, str], float] = {}
    for dataset, of_dataset in edited.groupby("dataset", sort=False):
        by_case = of_dataset.set_index(["editor", "position", "case_id"])
        for metric in (metric for metric in metrics if metric.higher_is_better is not None and metric.name in by_case):
            values = by_case[metric.name].astype(float).dropna() * (1 if metric.higher_is_better else -1)
            means = values.groupby("editor", sort=False).mean()
            if means.empty:
                continue
            counts = values.groupby("editor", sort=False).size()
            highest = str(max(means.index, key=lambda name: (means[name], counts[name])))
            for editor in map(str, means.index):
                key = str(dataset), editor, metric.name
                differences = (values[highest] - values[editor]).dropna().to_numpy()
                if means[editor] == means[highest] or differences.sum() <= 0:
                    best.add(key)
                else:
                    p_values[key] = paired_p(differences)
    return best | {key for key, p in holm(p_values).items() if p >= SIGNIFICANT}
