"""Batches: rows of similar length, and as many cases as requested or as the device's memory allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Generic, Literal, TypeVar

import torch

from .memory import free_memory_bytes, memory_in_use_mib, peak_memory_mib, release_memory, reset_peak_memory

Item = TypeVar("Item")

_FIRST_SIZE = 8
_LARGEST_SIZE = {"cpu": 16, "cuda": 256}  # larger batches are not faster
# A batch of twice the size needs about twice the memory: sizes double only while a batch's peak is below this share.
_LARGEST_SHARE = 0.4


def in_parts(rows: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive parts of at most ``size`` rows."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def of_like_length(
    lengths: Sequence[int],
    *,
    ratio: float = math.inf,
    most: int | None = None,
    tokens: float = math.inf,
    filled: float = 0.0,
    longest_first: bool = False,
) -> list[list[int]]:
    """Indices in groups of neighbours by length, each padded to its longest member.

    Args:
        ratio: largest of a group's longest member to its shortest; most: members of a group.
        tokens: of a group, padding included (a longer member makes a group of its own).
        filled: smallest share of a group that is not padding.
    """
    groups: list[list[int]] = []
    total = 0
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=longest_first):
        if groups:
            first, count = lengths[groups[-1][0]], len(groups[-1]) + 1
            longest, shortest = max(first, lengths[n]), min(first, lengths[n])
            fits = longest <= ratio * shortest and count - 1 != most and count * longest <= tokens
            fits = fits and total + lengths[n] >= filled * longest * count
        if not groups or not fits:
            groups.append([])
            total = 0
        groups[-1].append(n)
        total += lengths[n]
    return groups


class Batches(Generic[Item]):
    """Items (cases) in order, one batch at a time.

    Args:
        items: sorted so that items of similar cost are adjacent, and little of a batch is padding.
        size: batch size; ``auto`` starts with 8 and doubles while a batch's peak leaves more than half of the memory free.
    """

    def __init__(self, items: Sequence[Item], size: int | Literal["auto"], device: torch.device) -> None:
        self._left, self._device, self._grows = list(items), device, size == "auto"
        self.size = _FIRST_SIZE if size == "auto" else size

    def __iter__(self) -> Iterator[list[Item]]:
        while self._left:
            batch, self._left = self._left[: self.size], self._left[self.size :]
            base = memory_in_use_mib(self._device)
            reset_peak_memory(self._device)
            yield batch
            if self._grows and len(batch) == self.size:
                used = peak_memory_mib(self._device) - base
                # if the system reports no peak, ``used`` is NaN and the size stays
                if used < _LARGEST_SHARE * (used + free_memory_bytes(self._device) / 2**20):
                    self.size = min(2 * self.size, _LARGEST_SIZE[self._device.type])

    def did_not_fit(self, batch: list[Item]) -> None:
        """Return a batch that did not fit, to be given out again in halves; later batches are smaller than it."""
        release_memory(self._device)
        self._left = batch + self._left
        self.size = max(1, len(batch) // 2)
        self._grows = False
