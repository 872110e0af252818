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
# written after the edit prompt and after the rephrased ones without regard to the target's length; older records have none
FREE_TEXTS = ("free_effectiveness", "free_generalization")


@dataclass(frozen=True)
class Evaluated:
    """What a metric may read of a case that was edited."""

    case: Case
    # what the edited subject wrote, by measure: after the edit prompt, the rephrased ones, the unrelated ones, and sampled; and freely
    texts: Mapping[str, Sequence[str]]
    answers: Sequence[str]  # what the unedited subject writes after the unrelated prompts, in their order
    code: frozenset[str] = frozenset()  # which of the dataset's ``input`` and ``target`` are Python code
    free_tokens: Sequence[int] = ()  # of the free texts, those after the edit prompt first, without an end of text
    target_tokens: int = 0
    fired: Sequence[bool] = ()  # of a codebook: at the edit prompt, the rephrased prompts, the unrelated ones


@dataclass(frozen=True, eq=False)
class Metric:
    """What is computed of each case."""

    name: str  # its key in a record's scores
    title: str  # as in a table's head
    measure: str  # whose texts it reads, one of TEXTS or FREE_TEXTS
    compute: Callable[[Evaluated], float | None]  # None where the case has nothing to measure it on
    binary: bool = False  # whether a text's value is 0 or 1; a case's is, then, where it has one text of the measure
    highest: float = 1.0  # no value is above it, and none below 0
    higher_is_better: bool | None = True  # None where neither end is good, so that no value is marked as best
    order: int = 100  # place in tables


_METRICS: Registry[Metric] = Registry("metric", "clme_lib.metrics", "clme_lib.metrics")
register_metric, get_metric, list_metrics = _METRICS.register, _METRICS.__getitem__, _METRICS.names


def scores_of(evaluated: Evaluated, names: Iterable[str]) -> dict[str, float | None]:
    """The values of some metrics for one case."""
    return {name: get_metric(name).compute(evaluated) for name in names}
