"""A-GRACE's encoder: maps keys into a space where a prompt's rephrased prompts are near it and its neighbours are not."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch.nn import functional

from ..support.errors import StudyError

Architecture = Literal["released", "paper"]
WIDTH = 256
_SLOPE, _DROPOUT = 0.5, 0.5
_TENSORS = ("first.weight", "first.bias", "second.weight", "second.bias")


class Encoder(torch.nn.Module):
    """``E: R^d_f -> R^256``, with two linear layers.

    ``released``: d_f -> d_f/4, LeakyReLU of slope 0.5, dropout of 0.5, -> 256. ``paper`` (section V): d_f -> d_f, ReLU, -> 256.
    """

    def __init__(self, width: int, architecture: Architecture, draw: torch.Generator | None = None) -> None:
        super().__init__()
        known = get_args(Architecture)
        if architecture not in known:
            raise StudyError(f"unknown encoder architecture {architecture!r}; known: {', '.join(known)}")
        self.architecture = architecture
        inner = width // 4 if architecture == "released" else width
        self.first, self.second = torch.nn.Linear(width, inner), torch.nn.Linear(inner, WIDTH)
        for layer in (self.first, self.second):
            # This is PyTorch's own initial distribution, drawn from the given generator.
            bound = 1 / math.sqrt(layer.in_features)
            for tensor in (layer.weight, layer.bias):
                torch.nn.init.uniform_(tensor, -bound, bound, generator=draw)

    def forward(self, queries: torch.Tensor, draw: torch.Generator | None = None) -> torch.Tensor:
        """(..., d_f) -> (..., 256). ``draw`` turns dropout on: it is the CPU generator of its masks."""
        inner = self.first(queries.to(self.first.weight.dtype))
        if self.architecture == "paper":
            return self.second(functional.relu(inner))
        inner = functional.leaky_relu(inner, _SLOPE)
        if draw is not None:
            kept = torch.rand(inner.shape, generator=draw) >= _DROPOUT
            inner = inner * kept.to(inner.device) / (1 - _DROPOUT)
        return self.second(inner)

    def equals(self, encoder: Encoder) -> bool:
        """Whether another encoder has the same architecture and weights."""
        pairs = zip(self.state_dict().values(), encoder.state_dict().values())
        return self.architecture == encoder.architecture and all(torch.equal(own, its.to(own)) for own, its in pairs)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], architecture: Architecture) -> Encoder:
        """An encoder with the weights of another's ``state_dict``."""
        if missing := [name for name in _TENSORS if name not in tensors]:
            raise StudyError(f"the encoder lacks {', '.join(missing)}")
        encoder = cls(tensors["first.weight"].shape[1], architecture)
        # The tensors are shared, not copied, so that edits with the same encoder can be applied together.
        encoder.load_state_dict({name: tensors[name] for name in _TENSORS}, assign=True)
        return encoder.requires_grad_(False)
