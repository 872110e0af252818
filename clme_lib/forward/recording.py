"""Hooks that read or change what a module of the model gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..subjects.subject import Subject

Hook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def hooked(subject: Subject, hooks: dict[int, Hook]) -> Iterator[None]:
    """Inside the block, ``W_l``'s output of each named layer is ``hooks[l](input, output)``."""
    handles = [
        subject.down_proj(layer).register_forward_hook(lambda _module, args, output, act=act: act(args[0], output))
        for layer, act in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
