"""Whether what is written is right when it is run, where a case has a check. Nothing here is computed unless it is asked for by name.

The snippet is the free text up to the end of its first statement. It runs in the sandbox (support/sandbox.py), which says what it
holds and what not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..support.sandbox import FAILURES, PASSES, outcome
from .base import FREE_TEXTS, Evaluated, Metric, register_metric
from .free import cut


def _share(measure: str, kind: str, evaluated: Evaluated) -> float | None:
    """Share of a measure's free texts of which ``kind`` became; None where there are none, or no check."""
    texts, check = evaluated.texts.get(measure, ()), evaluated.case.check
    if check is None or not texts:
        return None
    return sum(outcome(check, cut(text, evaluated)) == kind for text in texts) / len(texts)


_METRICS = [
    Metric(f"{measure}_executes", f"{short} executes", measure, partial(_share, measure, PASSES), binary=True)
    for measure, short in zip(FREE_TEXTS, ("Eff.", "Gen."))
] + [
    Metric(
        f"fails_{kind}",
        f"Fails: {what}",
        FREE_TEXTS[0],
        partial(_share, FREE_TEXTS[0], kind),
        True,
        higher_is_better=None,
    )
    for kind, what in FAILURES.items()
]
EXECUTION_METRICS = tuple(register_metric(replace(metric, order=50 + n)).name for n, metric in enumerate(_METRICS))
