"""LocFT-BF: one matrix, fine-tuned breadth first over all cases (Yang et al. 2025; not in the paper).

Passes over the cases in mini-batches, one Adam step each, instead of many steps on one case after another; the end of the target is learnt too::

    repeat `passes` times, for each mini-batch B of the cases:
        D <- Adam(D, grad mean over B of l(D))        l(D): mean cross-entropy of the target's tokens under W_l + D

For a single case these are ``passes`` steps of FT-L without its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import ClassVar

import torch
from pydantic import Field

from ..datasets.cases import Case
from ..edits.base import Edit, EditLog, Unedited
from ..edits.weights import DenseUpdate
from ..forward.partial import PartialForward
from ..forward.tokens import TokenRow
from ..subjects.products import matrix_product
from .base import Editor, TargetHyperparameters
from .operations import Sizes


class LocFTBFHyperparameters(TargetHyperparameters):
    """``batch`` is the number of cases per step."""

    layer: int = Field(default=21, ge=0)
    lr: float = Field(default=5e-4, gt=0)
    passes: int = Field(default=25, gt=0)
    batch: int = Field(default=100, gt=0)
    end_of_target: bool = True


class LocFTBF(Editor[LocFTBFHyperparameters]):
    """Breadth-first fine-tuning of ``W_l``; one dense update for all cases that are edited together."""

    name, title, order = "locft-bf", "LocFT-BF", 16
    Hyperparameters = LocFTBFHyperparameters
    selection_grid: ClassVar = [{"layer": layer, "lr": lr} for layer, lr in product((21, 14), (5e-4, 1e-3, 2e-3, 4e-3))]

    def operations(self, prompt, target, steps):
        return Sizes(self.subject).fine_tuning(prompt, target, self.hparams.layer, steps)

    def _edit_batch(self, cases, tokenized):
        return [edit for case, row in zip(cases, tokenized) for edit in self._edit_jointly([case], [row])]

    def edit_together(self, cases):
        return self._together(cases, self._edit_jointly)

    def _edit_jointly(self, cases, tokenized):
        """The first case's edit holds the update for all; the other edits change nothing, and log their losses."""
        delta, losses = self._tune(cases, tokenized)
        logs = [EditLog(len(of_case), tuple(of_case)) for of_case in losses]
        first = DenseUpdate(cases[0].case_id, self.name, layer=self.hparams.layer, delta=delta, log=logs[0])
        others: list[Edit] = [Unedited(case.case_id, self.name, log=log) for case, log in zip(cases[1:], logs[1:])]
        return [first, *others]

    def _tune(self, cases: Sequence[Case], tokenized: Sequence[TokenRow]) -> tuple[torch.Tensor, list[list[float]]]:
        """The update (d, d_f), and each case's loss before each step that it took part in."""
        hparams = self.hparams
        parts = [range(first, min(first + hparams.batch, len(cases))) for first in range(0, len(cases), hparams.batch)]
        forwards = [
            PartialForward(self.subject, [tokenized[n] for n in part], hparams.layer, from_lookup=False)
            for part in parts
        ]
        weight = self.subject.down_proj(hparams.layer).weight
        delta = torch.zeros_like(weight, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=hparams.lr)
        losses: list[list[float]] = [[] for _ in cases]
        for _ in range(hparams.passes):
            for part, forward in zip(parts, forwards):
                change = matrix_product(forward.keys.float(), delta)
                current = forward.losses(forward.outputs + change.to(forward.outputs.dtype))
                for n, loss in zip(part, current.tolist()):
                    losses[n].append(loss)
                optimizer.zero_grad(set_to_none=True)
                (delta.grad,) = torch.autograd.grad(current.mean(), [delta])
                optimizer.step()
        return delta.detach(), losses
