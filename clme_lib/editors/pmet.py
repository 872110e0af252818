"""PMET: MEMIT with a second learnt vector for the attention, which is not written (paper section III-B; Li et al. 2024).

Algorithm, for one case: two vectors are learnt together, added to the outputs of the attention and of the MLP of the
last edited layer (learning.py). The first is discarded. ``z`` is the MLP's output plus the second; the residual
``r = z - m`` is read from the MLP's output, and ``r / sqrt(n + 1 - i)`` is written at layer ``l_i`` as in MEMIT.

When every target token of all rows is the arg-max, the likelihood's factor in the loss becomes ``agreement_factor`` for the
next evaluation, and the case stops if the weighted KL term is at most ``kl_stop``; otherwise the factor is 1 again.
"""

from __future__ import annotations

import math
from itertools import product
from typing import ClassVar

import torch
from pydantic import Field

from .memit import MEMIT, MEMITHyperparameters


class PMETHyperparameters(MEMITHyperparameters):
    """``kl_stop`` is in nats, after weighting by ``kl_factor``.

    ``attention=False`` learns only the MLP's vector, as the paper's text says; the released program learns both.
    """

    steps: int = Field(default=30, gt=0)
    attention: bool = True
    agreement_factor: float = Field(default=0.1, gt=0)
    kl_stop: float = Field(default=1e-2, ge=0)


class PMET(MEMIT):
    """MEMIT on MLP outputs, with square-root spreading."""

    name, title, order, colour = "pmet", "PMET", 4, 4
    Hyperparameters = PMETHyperparameters
    hparams: PMETHyperparameters
    without_early_stop: ClassVar = {"loss_floor": 0.0, "kl_stop": 0.0}
    # without the attention's vector, which is never written, the MLP's vector learns to suffice alone
    selection_grid: ClassVar = [
        {"kl_factor": kl, "covariance_weight": weight, "attention": attention}
        for attention, kl, weight in product((True, False), (0.0625, 0.0), (15_000.0, 2_093.0))
    ]

    def _outputs(self, forward):
        return [forward.attention, forward.outputs] if self.hparams.attention else [forward.outputs]

    def _place(self, rewriting, deltas):
        if not self.hparams.attention:
            return super()._place(rewriting, deltas)
        attention, mlp = deltas
        stream = rewriting.at_lookup(rewriting.forward.residual)
        outputs = rewriting.forward.mlp(stream + attention.to(stream.dtype))
        # the partial pass adds this to the unchanged stream, so it carries the attention's delta too
        return outputs + mlp + attention

    def _stops(self, total, agreed, kl, factor, cases):
        low = total < self.hparams.loss_floor
        factor[cases] = torch.where(agreed, self.hparams.agreement_factor, 1.0)
        return low | (agreed & (kl <= self.hparams.kl_stop))

    @staticmethod
    def _held(read):
        return read.outputs

    @staticmethod
    def _residual_divisor(left):
        return math.sqrt(left)
