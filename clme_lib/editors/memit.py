"""MEMIT: the change of a hidden state, spread over the MLPs of several layers (paper section III-B; Meng et al. 2023).

The residual is written (locate_then_edit/spreading.py) with ``A = weight * C``, ``C`` the second moment of the layer's keys
(second_moments.py): each edit costs a triangular solve with a factor made once.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
from pydantic import Field

from ..support.schema import Schema
from .locate_then_edit.spreading import SpreadingEditor, SpreadingHyperparameters


class MEMITHyperparameters(SpreadingHyperparameters):
    """``covariance_weight`` is lambda: the weight of the second moment relative to the one key."""

    covariance_weight: float = Field(default=15_000.0, gt=0)


class MEMIT(SpreadingEditor[MEMITHyperparameters]):
    """One rank-one update in each of several consecutive layers."""

    name, title, order, colour = "memit", "MEMIT", 3, 8
    Hyperparameters: ClassVar[type[Schema]] = MEMITHyperparameters
    # the second weight writes the same share of a residual at smollm2-135m's width as the first does at 11008
    selection_grid: ClassVar = [
        {"kl_factor": kl, "covariance_weight": weight, "layers": layers}
        for kl, weight, layers in product((0.0625, 0.0), (15_000.0, 2_093.0), ((4, 5, 6, 7, 8), (9, 10, 11, 12, 13)))
    ]

    def solve(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """``(weight * C)^-1 k`` of each key (B, d_f)."""
        return self.moments[layer].solve(keys) / self.hparams.covariance_weight
