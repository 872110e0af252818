"""What a metric is: a name, its input from an evaluated case, and how its values are shown.

A new metric is a :class:`Metric` in its own file, in this folder or in an installed package that names it under the entry-point
group ``clme_lib.metrics``. ``clme score`` computes it from stored texts.
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
# generated after the edit prompt and the rephrased prompts, regardless of the target's length; older records have none
FREE_TEXTS = ("free_effectiveness", "free_generalization")


@dataclass(frozen=True)
class Evaluated:
    """A metric's input from an edited case."""

    case: Case
    # the edited subject's texts, by measure: after the edit prompt, the rephrased prompts and the neighbours, sampled texts, and free texts
    texts: Mapping[str, Sequence[str]]
    answers: Sequence[str]  # the unedited subject's answers to the neighbours, in their order
    code: frozenset[str] = frozenset()  # which of the dataset's ``input`` and ``target`` are Python code
    free_tokens: Sequence[int] = ()  # numbers of tokens of the free texts, edit prompt first, without the end of text
    target_tokens: int = 0
    fired: Sequence[bool] = ()  # whether a codebook fired at the edit prompt, the rephrased prompts and the neighbours


@dataclass(frozen=True, eq=False)
class Metric:
    """A score that is computed for each case."""

    name: str  # its key in a record's scores
    title: str  # title of its column in tables
    measure: str  # the kind of texts it reads, one of TEXTS or FREE_TEXTS
    compute: Callable[[Evaluated], float | None]  # returns None if the case has nothing to measure
    binary: bool = False  # whether the value of a single text is 0 or 1
    highest: float = 1.0  # upper bound of the values; the lower bound is 0
    higher_is_better: bool | None = True  # None if neither end is better, so that no value is marked as best
    order: int = 100  # position in tables


_METRICS: Registry[Metric] = Registry("metric", "clme_lib.metrics", "clme_lib.metrics")
register_metric, get_metric, list_metrics = _METRICS.register, _METRICS.get, _METRICS.names


def scores_of(evaluated: Evaluated, names: Iterable[str]) -> dict[str, float | None]:
    """The values of some metrics for one case."""
    return {name: get_metric(name).compute(evaluated) for name in names}
