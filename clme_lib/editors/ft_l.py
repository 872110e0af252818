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

import torch
from pydantic import Field

from ..edits.base import EditLog
from ..edits.weights import DenseUpdate
from ..forward.partial import PartialForward
from ..support.schema import Schema
from .base import Editor


class FTLHyperparameters(Schema):
    """``bound`` is the largest change of a single weight; ``loss_floor`` is in nats per token."""

    layer: int = Field(ge=0)
    steps: int = Field(gt=0)
    lr: float = Field(gt=0)
    bound: float = Field(gt=0)
    loss_floor: float = Field(ge=0)


class FTL(Editor[FTLHyperparameters]):
    """Constrained fine-tuning of ``W_l``; one dense update a case."""

    name = "ft-l"
    Hyperparameters = FTLHyperparameters

    def _edit_batch(self, cases, tokenized):
        values = self.values
        forward = PartialForward(self.subject, tokenized, values.layer, from_lookup=False)
        weight = self.subject.down_proj(values.layer).weight
        # one parameter a case: a finished one gets no gradient, and Adam leaves a parameter without gradient alone
        deltas = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=True) for _ in cases]
        optimizer = torch.optim.Adam(deltas, lr=values.lr)
        losses: list[list[float]] = [[] for _ in cases]
        updates = [0] * len(cases)
        active = list(range(len(cases)))
        keys = forward.keys.float()
        for _ in range(values.steps):
            changes = torch.stack([key @ delta.T for key, delta in zip(keys, deltas)])
            current = forward.losses(forward.outputs + changes.to(forward.outputs.dtype))
            # this look waits for the device; a step of a case that has stopped would cost seven passes over its matrix
            for n, loss in enumerate(current.tolist()):
                if n in active:
                    losses[n].append(loss)
            active = [n for n in active if not losses[n][-1] < values.loss_floor]
            if not active:
                break
            optimizer.zero_grad(set_to_none=True)
            current[active].sum().backward()
            for n in set(range(len(cases))) - set(active):
                deltas[n].grad = None
            optimizer.step()
            with torch.no_grad():
                for n in active:
                    deltas[n].clamp_(-values.bound, values.bound)
                    updates[n] += 1
        return [
            DenseUpdate(
                case.case_id,
                self.name,
                layer=values.layer,
                delta=delta.detach(),
                log=EditLog(steps=count, losses=tuple(seen)),
            )
            for case, delta, count, seen in zip(cases, deltas, updates, losses)
        ]
