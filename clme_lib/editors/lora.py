"""``lora``: a low-rank adapter of every block's ``W_l``, fine-tuned on the case alone (Hu et al. 2022; not in the paper).

``W_l <- W_l + B_l A_l`` in all blocks, ``A_l`` (r, d_f) drawn as peft draws it, ``B_l`` (d, r) zero, both learnt by Adam on the target's mean cross-entropy. Other
programs put the adapter on the attention's queries and values; here it is on the matrices that all editors change, so an edit is a pair of
factors like any other: it composes, and ``clme export`` writes it unchanged.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..edits.base import EditLog
from ..edits.weights import LowRankUpdate
from ..forward.partial import PartialForward
from ..support.seeds import generator
from .base import Editor, TargetHyperparameters
from .malmen.gradients import Hook, upper_states
from .operations import Phase, Sizes


class LoRAHyperparameters(TargetHyperparameters):
    """``rank`` is the rank of every block's update."""

    rank: int = Field(default=8, gt=0)
    steps: int = Field(default=70, gt=0)
    lr: float = Field(default=5e-3, gt=0)


class LoRA(Editor[LoRAHyperparameters]):
    """An adapter of all ``W_l``, learnt for one case."""

    name, title, order = "lora", "LoRA", 17
    Hyperparameters = LoRAHyperparameters
    default_batch = 4
    selection_grid: ClassVar = [{"lr": lr, "steps": steps} for steps, lr in product((70, 20), (5e-3, 2e-3, 1e-3, 5e-4))]

    def __init__(self, subject, hparams, *options, **named):
        super().__init__(subject, hparams, *options, **named)
        self.layers = tuple(range(len(subject.blocks)))

    def operations(self, prompt, target, steps):
        sizes, columns = Sizes(self.subject), prompt + target - 1
        operations, traffic = sizes.step(columns, columns / 2, sizes.blocks, target)
        return [Phase("steps", steps * operations, steps * traffic)]

    def _edit_batch(self, cases, tokenized):
        hparams, device = self.hparams, self.subject.device
        forward = PartialForward(self.subject, tokenized, 0, from_lookup=False)
        factors = {layer: self._initial(cases, layer) for layer in self.layers}
        parameters = [part.to(device).requires_grad_(True) for pair in factors.values() for part in pair]
        # Adam is element-wise, so one optimiser over the stacked factors equals one optimiser per case
        optimizer = torch.optim.Adam(parameters, lr=hparams.lr)
        factors = {layer: (parameters[2 * n], parameters[2 * n + 1]) for n, layer in enumerate(self.layers)}

        def adapted(layer: int) -> Hook:
            left, right = factors[layer]

            def act(_module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                inner = torch.einsum("btf,brf->btr", given[0].float(), right)
                return output + torch.einsum("btr,bdr->btd", inner, left).to(output.dtype)

            return act

        losses = []
        for _ in range(hparams.steps):
            states = upper_states(forward, {layer: adapted(layer) for layer in self.layers})
            current = forward.row_means(forward.label_losses(states)[0])
            losses.append(current.detach())
            optimizer.zero_grad(set_to_none=True)
            current.sum().backward()
            optimizer.step()
        return [
            LowRankUpdate(
                case.case_id,
                self.name,
                factors={
                    layer: (left[n].detach().clone(), right[n].detach().clone())
                    for layer, (left, right) in factors.items()
                },
                log=EditLog(hparams.steps, tuple(of_case)),
            )
            for n, (case, of_case) in enumerate(zip(cases, torch.stack(losses, dim=1).tolist()))
        ]

    def _initial(self, cases, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``B`` (cases, d, r) and ``A`` (cases, r, d_f) to start from: zero, and Kaiming's uniform with a = sqrt(5)."""
        rank, width = self.hparams.rank, self.subject.inner_size
        rights = []
        for case in cases:
            draw = generator(self.seed, self.subject.name, case.dataset, self.name, case.case_id, layer)
            right = torch.empty(rank, width)
            rights.append(torch.nn.init.kaiming_uniform_(right, a=math.sqrt(5), generator=draw))
        return torch.zeros(len(cases), self.subject.hidden_size, rank), torch.stack(rights)
