"""GRACE: a codebook beside one layer (paper section III-B; Hartvigsen et al. 2023, "cold" initial values).

Algorithm, for one case: the key is the input of ``W_l`` at the prompt's last token; a value ``v`` drawn from
U[0, 1)^d replaces the output of ``W_l`` there; `steps` Adam updates of ``v`` alone minimise the mean cross-entropy of the
target's tokens. No weight changes. A query within ``radius`` (Euclidean) of the key gets the value.
"""

from __future__ import annotations

import hashlib
from itertools import product
from typing import ClassVar, TypeVar

import torch
from pydantic import Field

from ..edits.base import EditLog
from ..edits.codebooks import Codebook
from ..forward.partial import PartialForward, longest_above
from ..support.schema import Schema
from ..support.seeds import generator
from .base import Editor
from .operations import Phase, Sizes


class GRACEHyperparameters(Schema):
    """``radius`` is epsilon, in units of the key space."""

    layer: int = Field(default=27, ge=0)
    steps: int = Field(default=30, gt=0)
    lr: float = Field(default=1.0, gt=0)
    radius: float = Field(default=1.0, gt=0)


Hparams = TypeVar("Hparams", bound=GRACEHyperparameters)


class ValueEditor(Editor[Hparams]):
    """What GRACE and A-GRACE share: learning a case's value."""

    updates_weights = False

    def operations(self, prompt, target, steps):
        sizes, layer = Sizes(self.subject), self.hparams.layer
        operations, traffic = sizes.step(target, prompt + target - 1, sizes.blocks - 1 - layer, target)
        return [*sizes.read_once(prompt, target, layer), Phase("steps", steps * operations, steps * traffic)]

    def _learn(self, cases, tokenized) -> tuple[PartialForward, torch.Tensor, list[EditLog]]:
        """The cases' pass, the values (B, d) learnt in it, and how."""
        hparams = self.hparams
        forward = PartialForward(self.subject, tokenized, hparams.layer, from_lookup=True)
        initial = torch.stack([self._initial_value(case) for case in cases])
        learnt = initial.to(self.subject.device, copy=True).requires_grad_(True)
        # Adam is element-wise: one optimiser over the stacked values is one optimiser a case
        optimizer = torch.optim.Adam([learnt], lr=hparams.lr)
        losses = []
        for _ in range(hparams.steps):
            current = forward.losses(forward.with_touched(learnt))
            losses.append(current.detach())
            optimizer.zero_grad(set_to_none=True)
            current.sum().backward()
            optimizer.step()
        per_case = torch.stack(losses, dim=1).tolist()
        logs = [
            EditLog(hparams.steps, tuple(seen), initial_sha256=hashlib.sha256(start.numpy().tobytes()).hexdigest())
            for seen, start in zip(per_case, initial)
        ]
        return forward, learnt.detach(), logs

    def _radii(self) -> torch.Tensor:
        return torch.full((1,), self.hparams.radius, device=self.subject.device)

    def _cost(self, tokenized):
        return len(tokenized.target_ids)

    def _max_cost_ratio(self):
        return longest_above(self.subject, self.hparams.layer)

    def _initial_value(self, case) -> torch.Tensor:
        draw = generator(self.seed, self.subject.name, case.dataset, self.name, case.case_id)
        return torch.rand(self.subject.hidden_size, generator=draw)


class GRACE(ValueEditor[GRACEHyperparameters]):
    """One key and one learnt value a case."""

    name, title, order, colour = "grace", "GRACE", 6, 2
    Hyperparameters = GRACEHyperparameters
    selection_grid: ClassVar = [
        {"layer": layer, "steps": steps, "lr": lr}
        for layer, steps, lr in product((27, 24, 20, 16), (30, 50), (1.0, 0.5))
    ]

    def _edit_batch(self, cases, tokenized):
        forward, learnt, logs = self._learn(cases, tokenized)
        return [
            Codebook(
                case.case_id,
                self.name,
                layer=self.hparams.layer,
                keys=forward.keys[n, forward.touched[n]][None].float().clone(),
                values=learnt[n : n + 1].clone(),
                radii=self._radii(),
                log=logs[n],
            )
            for n, case in enumerate(cases)
        ]
