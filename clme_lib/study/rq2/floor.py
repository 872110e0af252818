"""The floor of an edit: the least time a device needs for the operations that the editor's algorithm cannot avoid.

Each editor counts its operations and memory traffic (clme_lib/editors/operations.py). At the device's measured rates
(:func:`measure_ceilings`), a phase takes at least as long as its arithmetic or its traffic, whichever is longer; the floor is the sum over phases.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...editors.base import synchronize
from ...editors.operations import Phase
from ...subjects.products import matrix_product
from ...subjects.subject import Subject

_SIDE = {"cpu": 2_048, "cuda": 8_192}  # side of the matrices whose product is timed
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


@dataclass(frozen=True)
class Ceilings:
    """A device's measured rates: operations and bytes per second."""

    operations: float
    traffic: float

    def seconds(self, phases: Sequence[Phase]) -> float:
        """The least time in which the phases can run one after another."""
        return sum(max(phase.operations / self.operations, phase.traffic / self.traffic) for phase in phases)


def measure_ceilings(subject: Subject) -> Ceilings:
    """The rates of the fastest of five large matrix products in the subject's dtype, and of the fastest of five large copies."""
    device, side = subject.device, _SIDE[subject.device.type]
    left, right = (torch.randn(side, side, device=device).to(subject.dtype) for _ in range(2))
    product = _best(lambda: matrix_product(left, right), device)
    block = torch.zeros(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(block)  # allocated beforehand: allocating would be timed as well
    copy = _best(lambda: target.copy_(block), device)
    return Ceilings(2 * side**3 / product, 2 * block.numel() * 4 / copy)


def _best(act, device: torch.device) -> float:
    times = []
    for _ in range(6):  # the first is a warm-up
        started = clock(device)
        act()
        times.append(clock(device) - started)
    return min(times[1:])


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished all its work."""
    synchronize(device)
    return time.perf_counter()
