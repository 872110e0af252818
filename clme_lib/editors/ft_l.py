"""FT-L: constrained fine-tuning of one layer (paper section III-B; FT-M's objective under FT-L's L-infinity bound).

Algorithm, for one case with loss ``l(D)`` = mean cross-entropy of the target's tokens under ``W_l + D``::

    D <- 0
    repeat `steps` times:
        if l(D) < loss_floor: stop
        D <- Adam(D, grad l(D));  D <- clip(D, -bound, +bound)

``lr`` is several times the bound, so Adam's first step saturates nearly every entry: in effect a sign search in a
box. The variable is D itself: around weights of magnitude 6 the float32 grid is wider than what the box allows D to be.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
from pydantic import Field

from ..edits.base import EditLog
from ..edits.weights import DenseUpdate
from ..forward.partial import PartialForward
from ..subjects.products import matrix_product
from .base import Editor, TargetHyperparameters
from .operations import Sizes


class FTLHyperparameters(TargetHyperparameters):
    """``bound`` is the largest change of a single weight; ``loss_floor`` is in nats per token."""

    layer: int = Field(default=21, ge=0)
    steps: int = Field(default=25, gt=0)
    lr: float = Field(default=5e-4, gt=0)
    bound: float = Field(default=1e-4, gt=0)
    loss_floor: float = Field(default=1e-2, ge=0)


class FTL(Editor[FTLHyperparameters]):
    """Constrained fine-tuning of ``W_l``; one dense update per case."""

    name, title, order, colour = "ft-l", "FT-L", 1, 0
    Hyperparameters = FTLHyperparameters
    without_early_stop: ClassVar = {"loss_floor": 0.0}
    # the paper's ratio of learning rate to bound is kept; the grid varies the box's width and the layer
    selection_grid: ClassVar = [
        {"layer": layer, "bound": bound, "lr": 5 * bound}
        for layer, bound in product((21, 14), (1e-4, 3e-3, 5e-3, 1e-2))
    ]

    def operations(self, prompt, target, steps):
        return Sizes(self.subject).fine_tuning(prompt, target, self.hparams.layer, steps)

    def _edit_batch(self, cases, tokenized):
        hparams = self.hparams
        forward = PartialForward(self.subject, tokenized, hparams.layer, from_lookup=False)
        weight = self.subject.down_proj(hparams.layer).weight
        # one parameter per case: Adam does not change a finished case's parameter, because it gets no gradient
        deltas = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=True) for _ in cases]
        optimizer = torch.optim.Adam(deltas, lr=hparams.lr)
        losses: list[list[float]] = [[] for _ in cases]
        active = list(range(len(cases)))
        keys = forward.keys.float()
        for _ in range(hparams.steps):
            changes = torch.stack([matrix_product(key, delta) for key, delta in zip(keys, deltas)])
            current = forward.losses(forward.outputs + changes.to(forward.outputs.dtype))
            # this check waits for the device, but a step of a stopped case would cost seven passes over its matrix
            for n, loss in enumerate(current.tolist()):
                if n in active:
                    losses[n].append(loss)
            active = [n for n in active if not losses[n][-1] < hparams.loss_floor]
            if not active:
                break
            optimizer.zero_grad(set_to_none=True)
            gradients = torch.autograd.grad(current[active].sum(), [deltas[n] for n in active])
            for n, gradient in zip(active, gradients):
                deltas[n].grad = gradient
            optimizer.step()
            with torch.no_grad():
                for n in active:
                    deltas[n].clamp_(-hparams.bound, hparams.bound)
        edits = []
        for n, case in enumerate(cases):
            # no update followed a loss below the floor
            log = EditLog(len(losses[n]) - (n not in active), tuple(losses[n]))
            edits.append(DenseUpdate(case.case_id, self.name, layer=hparams.layer, delta=deltas[n].detach(), log=log))
        return edits
