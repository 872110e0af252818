"""Seeds. Every random draw has its own generator, so no case depends on which others ran, or in what order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEFAULT_SEED = 42


def seed_of(*parts: object) -> int:
    """First 8 bytes of the SHA-256 of the parts joined by ``|``, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of` (the CPU's stream is the same on every machine)."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_of(*parts))


def seeded_order(ids, *parts: object) -> list:
    """``ids`` in the order of their own hashes: a shuffle in which adding an id does not change the order of the others."""
    return sorted(ids, key=lambda entry: (seed_of(*parts, entry), entry))
