"""Keys and gradients of several layers in one pass: the inputs of MALMEN's updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch

from ...forward.partial import PartialForward
from ...forward.tokens import TokenRow, encode, end_ids, tokenize
from ...subjects.subject import Subject

Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]  # PyTorch's, of a ``W_l``


def upper_states(forward: PartialForward, hooks: dict[int, Hook]) -> torch.Tensor:
    """Last-block states at the label columns, with hooks on the edited layers, the first of which is ``forward.layer``."""
    with ExitStack() as registered:
        for layer, hook in hooks.items():
            registered.enter_context(forward.subject.down_proj(layer).register_forward_hook(hook))
        return forward.states(forward.mlp(forward.residual))


def edit_row(subject: Subject, prompt: str, target: str, targets: str, end: bool = False) -> TokenRow:
    """The row that an edit of ``prompt`` towards ``target`` reads."""
    tokens = tokenize(subject.tokenizer, prompt, target, end)
    if targets == "in-context":
        return tokens
    ending = end_ids(subject.tokenizer, end)
    joined = [*encode(subject.tokenizer, prompt + " " + target), *ending]
    alone = (*encode(subject.tokenizer, target), *ending)
    return TokenRow(tuple(joined[:-1]), 0, tokens.lookup, max(0, len(joined) - 1 - len(alone)), alone)


class Cached:
    """``keys`` and ``gradients`` at a batch's cached columns, layer -> (n, d_f) and (n, d) in float32; ``losses`` (B,) is each row's
    mean cross-entropy of the target under the unedited subject."""

    def __init__(self, forward: PartialForward, layers: Sequence[int], cached: str) -> None:
        self.owner = forward.label_rows  #: (n,) the row of each cached token
        columns = forward.label_columns
        if cached == "released":
            starts = forward.label_counts.cumsum(0) - forward.label_counts
            columns = torch.arange(len(self.owner), device=columns.device) - starts[self.owner]
        leaves = {layer: torch.zeros_like(forward.outputs, requires_grad=True) for layer in layers}
        self.keys: dict[int, torch.Tensor] = {}

        def hook(layer: int) -> Hook:
            def act(_module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                self.keys[layer] = given[0].detach()[self.owner, columns].float()
                return output + leaves[layer]

            return act

        with torch.enable_grad():
            states = upper_states(forward, {layer: hook(layer) for layer in layers})
            losses = forward.row_means(forward.label_losses(states)[0])
            # the sum of the rows' means, so that a token has the same weight in a training batch as in a single edit
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        self.losses = losses.detach()
        self.gradients = {layer: part[self.owner, columns].float() for layer, part in zip(layers, gradients)}

    @classmethod
    def joined(cls, parts: Sequence[Cached]) -> Cached:
        """What several batches' columns hold, as of one batch."""
        whole = cls.__new__(cls)
        rows = [0, *accumulate(len(part.losses) for part in parts)]
        whole.owner = torch.cat([part.owner + before for part, before in zip(parts, rows)])
        whole.losses = torch.cat([part.losses for part in parts])
        whole.keys, whole.gradients = (
            {layer: torch.cat([getattr(part, name)[layer] for part in parts]) for layer in parts[0].keys}
            for name in ("keys", "gradients")
        )
        return whole
