"""Hooks that read the input or output of a module of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The module of each point, and whether its input is recorded or its output.
_POINTS = {
    "attention": ("self_attn.o_proj", False),  # what attention adds to the stream
    "residual": ("post_attention_layernorm", True),  # the stream that the MLP's output is added to
    "mlp_input": ("mlp", True),
    "keys": ("mlp.down_proj", True),
    "outputs": ("mlp.down_proj", False),
    "mlp_output": ("mlp", False),
}


@contextlib.contextmanager
def recorded(block: Any, *points: str) -> Iterator[dict[str, torch.Tensor]]:
    """The states at some named points in the latest pass through a block inside the ``with`` block."""
    values: dict[str, torch.Tensor] = {}

    def keep(point: str, is_input: bool) -> Callable:
        return lambda _module, args, output: values.__setitem__(point, args[0] if is_input else output)

    with contextlib.ExitStack() as hooks:
        for point in points:
            path, is_input = _POINTS[point]
            hooks.enter_context(block.get_submodule(path).register_forward_hook(keep(point, is_input)))
        yield values
