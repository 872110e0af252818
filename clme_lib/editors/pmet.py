"""PMET: MEMIT with the attention's part learnt beside the MLP's and left out of the writing (paper section III-B; Li et al. 2024).

Algorithm, for one case: two vectors are learnt together, added to the outputs of the attention and of the MLP of the
last edited layer (learning.py). The first is discarded. ``z`` is the MLP's output plus the second; the residual
``r = z - m`` is read from the MLP's output, and ``r / sqrt(n + 1 - i)`` is written at layer ``l_i`` as in MEMIT.

When every target token of all rows is the arg-max, the likelihood's factor in the loss becomes ``agreement_factor`` for the
next evaluation, and the case stops if the weighted KL term is at most ``kl_stop``; otherwise the factor is 1 again.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from .memit import MEMIT, MEMITHyperparameters


class PMETHyperparameters(MEMITHyperparameters):
    """``kl_stop`` is in nats, after weighting by ``kl_factor``.

    ``attention=False`` learns the MLP's vector alone, as the paper's text has it; the released program learns both.
    """

    attention: bool = True
    agreement_factor: float = Field(gt=0)
    kl_stop: float = Field(ge=0)


class PMET(MEMIT):
    """MEMIT on MLP outputs, with square-root spreading."""

    name = "pmet"
    Hyperparameters = PMETHyperparameters
    values: PMETHyperparameters

    def wanted(self, cases):
        rewriting = self._rewriting(cases, self.values.layers[-1])
        attention = rewriting.forward.attention
        assert attention is not None  # it is only where the pass was given its residuals
        initial_attention = rewriting.first_rows(rewriting.at_lookup(attention))
        initial = rewriting.first_rows(rewriting.at_lookup(rewriting.forward.outputs))
        if not self.values.attention:
            (delta,), logs = self._learn(cases, rewriting, [initial], self._place_on_outputs)
            return initial.float() + delta, logs
        (_, delta), logs = self._learn(cases, rewriting, [initial_attention, initial], self._place)
        return initial.float() + delta, logs

    def _place(self, part, deltas):
        attention, mlp = deltas
        stream = part.at_lookup(part.forward.residual)
        changed = stream + attention.to(stream.dtype)
        outputs = part.forward.mlp(changed)
        # the partial pass adds this to the unchanged stream, so it carries the attention's delta too
        return outputs + mlp + attention

    def _stops(self, total, agreed, kl, factor, cases):
        low = total < self.values.loss_floor
        factor[cases] = torch.where(agreed, self.values.agreement_factor, 1.0)
        return low | (agreed & (kl <= self.values.kl_stop))

    @staticmethod
    def _held(read):
        return read.outputs

    def _share(self, left):
        return math.sqrt(left)
