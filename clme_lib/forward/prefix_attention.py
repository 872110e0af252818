"""Attention of a few new columns to cached ones and to themselves, without copying the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AttentionInterface, PreTrainedConfig

# keys and values of each block's prefix, (B, key heads, P, size) both
Prefix = dict[int, tuple[torch.Tensor, torch.Tensor]]
# The prefix that blocks attend to. It is not handed to them: not all architectures pass a block's arguments on to their attention.
_PREFIX: ContextVar[Prefix] = ContextVar("prefix")


def _attend_with_prefix(module, query, key, value, attention_mask, *, scaling, **_) -> tuple[torch.Tensor, None]:
    """Attention of the tail's columns, (B, heads, S, size), to the prefix and to the tail: (B, S, heads, size).

    Joining prefix and tail would copy the prefix, once for each head that shares its keys, and compute its gradient, in every step.
    Only the scores are joined.
    """
    rows, heads, columns, size = query.shape
    before_keys, before_values = (part.flatten(0, 1) for part in _PREFIX.get()[module.layer_idx])
    asked = (query * scaling).reshape(len(before_keys), -1, size)
    scores = torch.cat([asked @ before_keys.mT, asked @ key.flatten(0, 1).mT], dim=-1)
    scores = scores.view(rows, heads, columns, -1).masked_fill(~attention_mask, -math.inf)
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype).view(*asked.shape[:2], -1)
    seen = before_keys.shape[1]
    out = shares[..., :seen] @ before_values + shares[..., seen:] @ value.flatten(0, 1)
    return out.view(rows, heads, columns, size).transpose(1, 2).contiguous(), None


_WITH_PREFIX = "clme_with_prefix"
AttentionInterface.register(_WITH_PREFIX, _attend_with_prefix)


@contextmanager
def _attending_to(prefix: Prefix, config: PreTrainedConfig) -> Iterator[None]:
    """Blocks of a model with this configuration attend to the prefix as well; nothing changes where there is none."""
    if not prefix:
        yield
        return
    before = config._attn_implementation
    config._attn_implementation = _WITH_PREFIX
    token = _PREFIX.set(prefix)
    try:
        yield
    finally:
        _PREFIX.reset(token)
        config._attn_implementation = before
