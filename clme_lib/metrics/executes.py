"""Whether a generated snippet is right when it is run, for cases with a check. Only computed if requested by name.

The snippet is the free text up to the end of its first statement. It runs in the sandbox (support/sandbox.py documents which
attacks that withstands).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..support.sandbox import FAILURES, PASSES, outcome
from .base import FREE_TEXTS, Evaluated, Metric, register_metric
from .free import cut


def _share(measure: str, kind: str, evaluated: Evaluated) -> float | None:
    """Share of a measure's free texts whose outcome is ``kind``; None if there are no texts or no check."""
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
