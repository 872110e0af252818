"""What a metric is: a name, what it reads of an evaluated case, and how its values are shown.

A new one is an object of :class:`Metric` in a file of its own, in this folder or in an installed package that names it under the entry-point
group ``clme_lib.metrics``. ``clme score`` computes it from texts that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..support.registry import Registry

if TYPE_CHECKING:
    from ..datasets.cases import Case

MEASURES = ("effectiveness", "generalization", "specificity")
TEXTS = (*MEASURES, "fluency")  # kinds of generated text; the last is sampled


@dataclass(frozen=True)
class Evaluated:
    """What a metric may read of a case that was edited."""

    case: Case
    # what the edited subject wrote, by measure: after the edit prompt, the rephrased ones, the unrelated ones, and sampled
    texts: Mapping[str, Sequence[str]]
    answers: Sequence[str]  # what the unedited subject writes after the unrelated prompts, in their order


@dataclass(frozen=True, eq=False)
class Metric:
    """What is computed of each case."""

    name: str  # its key in a record's scores
    title: str  # as in a table's head
    measure: str  # whose texts it reads, one of TEXTS
    compute: Callable[[Evaluated], float | None]  # None where the case has nothing to measure it on
    binary: bool = False  # whether every value is 0 or 1, so that intervals and tests are those of shares
    highest: float = 1.0  # no value is above it, and none below 0
    higher_is_better: bool | None = True  # None where neither end is good, so that no value is marked as best
    order: int = 100  # place in tables


_METRICS: Registry[Metric] = Registry("metric", "clme_lib.metrics", "clme_lib.metrics")
register_metric, get_metric, list_metrics = _METRICS.register, _METRICS.__getitem__, _METRICS.names


def scores_of(evaluated: Evaluated, names: Iterable[str]) -> dict[str, float | None]:
    """The values of some metrics for one case."""
    return {name: get_metric(name).compute(evaluated) for name in names}
