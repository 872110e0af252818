"""What is worked on together: things of like length, and as many as are asked for or as the device's memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from ..datasets.cases import Case
from .memory import free_memory_bytes, memory_in_use_mib, peak_memory_mib, release_memory, reset_peak_memory

_FIRST = 8
_LARGEST = {"cpu": 16, "cuda": 256}  # beyond these nothing is gained
_MOST = 0.4  # of the memory: twice as many cases need about twice as much


def of_like_length(lengths: Sequence[int], longest: float, most: int | None = None) -> list[list[int]]:
    """Indices in groups, each padded to its longest member.

    Args:
        longest: of a group, over its shortest.
        most: members of a group.
    """
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if not groups or len(groups[-1]) == most or lengths[n] > longest * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    return groups


class Batches:
    """Cases in order, a batch at a time.

    Args:
        cases: those that cost alike beside each other, so that little of a batch is padding.
        size: of a batch; ``auto`` starts with 8 and doubles while a batch's peak leaves more than half of the memory.
    """

    def __init__(self, cases: Sequence[Case], size: int | Literal["auto"], device: torch.device) -> None:
        self._left = list(cases)
        self._device = device
        self._grows = size == "auto"
        self.size = _FIRST if size == "auto" else size

    def __iter__(self) -> Iterator[list[Case]]:
        while self._left:
            batch, self._left = self._left[: self.size], self._left[self.size :]
            base = memory_in_use_mib(self._device)
            reset_peak_memory(self._device)
            yield batch
            if self._grows and len(batch) == self.size:
                self._grow(base)

    def did_not_fit(self, batch: list[Case]) -> None:
        """Put a batch back, to be given out again in halves; no batch will be as large from now on."""
        release_memory(self._device)
        self._left = batch + self._left
        self.size = max(1, len(batch) // 2)
        self._grows = False

    def _grow(self, base: float) -> None:
        used = peak_memory_mib(self._device) - base
        room = used + free_memory_bytes(self._device) / 2**20
        if used == used and used < _MOST * room:
            self.size = min(2 * self.size, _LARGEST[self._device.type])
