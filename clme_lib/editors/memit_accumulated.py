"""MEMIT whose earlier edits are protected as other texts are: each edit's keys are added to the second moment (not in the paper).

A single edit is MEMIT's; the two differ from the second edit of a model on.
"""

from __future__ import annotations

from .memit import MEMIT, MEMITHyperparameters


class MEMITAccumulatedHyperparameters(MEMITHyperparameters):
    """MEMIT's hyperparameters; ``accumulate`` is on."""

    accumulate: bool = True


class MEMITAccumulated(MEMIT):
    """MEMIT with accumulated statistics."""

    name, title = "memit-accumulated", "MEMIT (accumulated)"
    Hyperparameters = MEMITAccumulatedHyperparameters
