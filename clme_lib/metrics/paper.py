"""The paper's scores (section III-D): three comparisons of three measures' texts, and fluency; and the share of unchanged neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from .base import Evaluated, Metric, register_metric
from .text import bleu, exact_match, exact_match_rate, fluency, rouge_l

Comparison = Callable[[Sequence[str], Sequence[str]], float]


def _with_target(compare: Comparison, measure: str, evaluated: Evaluated) -> float | None:
    """Mean over a measure's texts of their comparison with the target.

    Surrounding white space is stripped from what was written only; where nothing was written the score is 0.
    """
    texts = [text.strip() for text in evaluated.texts[measure]]
    scores = [compare([text], [evaluated.case.target]) if text else 0.0 for text in texts]
    return sum(scores) / len(scores) if scores else None


def _with_answers(compare: Comparison, measure: str, evaluated: Evaluated) -> float | None:
    """The comparison of all neighbours' texts, unstripped, with the unedited subject's answers."""
    return compare(evaluated.texts[measure], evaluated.answers) if evaluated.answers else None


_COMPARISONS = {"em": ("EM", exact_match), "bleu": ("BLEU", bleu), "rouge_l": ("R-L", rouge_l)}
_MEASURES = {
    "effectiveness": ("Eff.", _with_target),
    "generalization": ("Gen.", _with_target),
    "specificity": ("Spec.", _with_answers),
}
_METRICS = [
    Metric(f"{measure}_{suffix}", f"{short} {title}", measure, partial(against, compare, measure), suffix == "em")
    for measure, (short, against) in _MEASURES.items()
    for suffix, (title, compare) in _COMPARISONS.items()
]
_METRICS += [
    Metric("specificity_rate", "Spec. kept", "specificity", partial(_with_answers, exact_match_rate, "specificity")),
    # low entropy marks broken text, but higher entropy is not better text
    Metric("fluency", "FL.", "fluency", lambda case: fluency(case.texts["fluency"]), highest=32, higher_is_better=None),
]
PAPER_METRICS = tuple(register_metric(replace(metric, order=n)).name for n, metric in enumerate(_METRICS))
COMPARISONS = tuple(_COMPARISONS)
# the ten scores of the paper's tables; the share of unchanged neighbours is shown next to them
PAPER_SCORES = tuple(name for name in PAPER_METRICS if name != "specificity_rate")
