"""EMMET: ROME's equality for several cases at once, in one layer (Gupta et al. 2024; not in the paper).

Of all updates that map the cases' keys to their values (the rows of ``K`` and of ``R``, up to a small ``ridge``), the smallest in the norm
that other texts' keys define, ``A = covariance_weight * C``::

    dW = R^T (K A^-1 K^T + ridge I)^-1 K A^-1

which is locate_then_edit/spreading.py with ``A * ridge`` instead of ``A``, on a single layer. For one case: ``a = q / (ridge + k^T q)``.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
from pydantic import Field

from ..support.schema import Layers, Schema
from .locate_then_edit.spreading import SpreadingEditor, SpreadingHyperparameters


class EMMETHyperparameters(SpreadingHyperparameters):
    """``ridge`` is how far an update may stay from equality, in units of ``k^T A^-1 k``; the defaults are the authors' program's."""

    layers: Layers = (5,)
    covariance_weight: float = Field(default=100_000.0, gt=0)
    ridge: float = Field(default=0.1, gt=0)


class EMMET(SpreadingEditor[EMMETHyperparameters]):
    """The equality-constrained update of one layer."""

    name, title, order = "emmet", "EMMET", 13
    Hyperparameters: ClassVar[type[Schema]] = EMMETHyperparameters
    compat: ClassVar = {}  # the released program does not have it
    # the second ridge maps a key of smollm2-135m almost exactly to its value, as the first one does at 11008 dimensions
    selection_grid: ClassVar = [
        {"kl_factor": kl, "layers": layers, "ridge": ridge}
        for kl, layers, ridge in product((0.0625, 0.0), ((5,), (10,)), (0.1, 1e-4))
    ]

    def solve(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """``A^-1 k / ridge`` of each key (B, d_f)."""
        return self.moments[layer].solve(keys) / (self.hparams.covariance_weight * self.hparams.ridge)
