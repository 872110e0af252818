"""The paper's scores (section III-D): three comparisons of three measures' texts, and fluency; and the share of unchanged neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .base import Evaluated, Metric, register_metric
from .text import bleu, exact_match, exact_match_rate, fluency, rouge_l

Comparison = Callable[[Sequence[str], Sequence[str]], float]


def _with_target(measure: str, compare: Comparison, evaluated: Evaluated) -> float | None:
    """Mean over a measure's texts of their comparison with the target.

    Surrounding white space is stripped from what was written only; where nothing was written the score is 0.
    """
    texts = [text.strip() for text in evaluated.texts[measure]]
    scores = [compare([text], [evaluated.case.target]) if text else 0.0 for text in texts]
    return sum(scores) / len(scores) if scores else None


def _with_answers(compare: Comparison, evaluated: Evaluated) -> float | None:
    """The comparison of all neighbours' texts, as they are, with the unedited subject's answers."""
    return compare(evaluated.texts["specificity"], evaluated.answers) if evaluated.answers else None


_COMPARISONS: dict[str, tuple[str, Comparison]] = {
    "em": ("EM", exact_match),
    "bleu": ("BLEU", bleu),
    "rouge_l": ("R-L", rouge_l),
}
_TITLES = {"effectiveness": "Eff.", "generalization": "Gen.", "specificity": "Spec."}


def _register() -> tuple[Metric, ...]:
    metrics: list[Metric] = []
    for measure, title in _TITLES.items():
        for suffix, (comparison_title, compare) in _COMPARISONS.items():
            against = _with_answers if measure == "specificity" else partial(_with_target, measure)
            metrics.append(
                Metric(
                    f"{measure}_{suffix}",
                    f"{title} {comparison_title}",
                    measure,
                    partial(against, compare),
                    binary=suffix == "em",
                    order=len(metrics),
                )
            )
    rate = partial(_with_answers, exact_match_rate)
    metrics.append(Metric("specificity_rate", "Spec. kept", "specificity", rate, order=len(metrics)))
    # entropy tells broken text (too low), not better text, apart
    metrics.append(
        Metric(
            "fluency",
            "FL.",
            "fluency",
            lambda evaluated: fluency(evaluated.texts["fluency"]),
            higher_is_better=None,
            order=len(metrics),
        )
    )
    return tuple(map(register_metric, metrics))


PAPER_METRICS = tuple(metric.name for metric in _register())
COMPARISONS = tuple(_COMPARISONS)
# the ten of the paper's tables; the share of unchanged neighbours is shown beside them
PAPER_SCORES = tuple(name for name in PAPER_METRICS if name != "specificity_rate")
