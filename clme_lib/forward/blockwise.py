"""The model block by block, for what must be read below the top: keys, outputs, and the stream under a partial edit.

Rows are padded on the left, so a prompt's lookup token is the last column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..subjects.subject import Subject

_PASS_TOKENS = {"cpu": 2_048, "cuda": 32_768}  # padding included


@dataclass(frozen=True)
class BlockPass:
    """One block's pass over R rows of W columns.

    Attributes:
        hidden: (R, W, d) the residual stream after the block.
        keys: (R, W, d_f) inputs of its ``down_proj``; outputs: (R, W, d) outputs of its ``down_proj``.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    outputs: torch.Tensor


class Blockwise:
    """Rows of token ids on their way through the blocks.

    Attributes:
        embedded: (R, W, d) the stream before block 0.
        mask: (R, W) True at real tokens.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject, rows: Sequence[Sequence[int]]) -> None:
        self.subject = subject
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), subject.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, row in enumerate(rows):
            ids[n, width - len(row) :] = torch.tensor(row)
            mask[n, width - len(row) :] = True
        self.mask = mask.to(subject.device)
        self._positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        self.embedded = subject.decoder.embed_tokens(ids.to(subject.device))
        self._rotary = subject.decoder.rotary_emb(self.embedded, position_ids=self._positions)
        causal = torch.ones(width, width, dtype=torch.bool, device=subject.device).tril()
        # a padding column attends to itself alone, so that no softmax is empty
        own = torch.eye(width, dtype=torch.bool, device=subject.device)
        self._attended = ((causal & self.mask[:, None, :]) | own)[:, None]

    @torch.no_grad()
    def block(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> BlockPass:
        """Run block ``layer`` on the stream ``hidden`` of all rows, or of the given ones."""
        kept = {}

        def keep(_module, args, output):
            kept["keys"], kept["outputs"] = args[0], output

        def of(part: torch.Tensor) -> torch.Tensor:
            return part if rows is None or len(part) == 1 < len(self.mask) else part[rows]

        handle = self.subject.down_proj(layer).register_forward_hook(keep)
        try:
            after = self.subject.blocks[layer](
                hidden,
                attention_mask=of(self._attended),
                position_ids=of(self._positions),
                position_embeddings=tuple(of(part) for part in self._rotary),
            )
        finally:
            handle.remove()
        return BlockPass(after[0] if isinstance(after, tuple) else after, kept["keys"], kept["outputs"])

    def up_to(self, layer: int) -> torch.Tensor:
        """(R, W, d) the unedited stream before block ``layer``."""
        hidden = self.embedded
        for below in range(layer):
            hidden = self.block(below, hidden).hidden
        return hidden


def passes(subject: Subject, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of like length that go through the blocks together."""
    limit = _PASS_TOKENS[subject.device.type]
    batch: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: len(rows[n])):
        if batch and (len(batch) + 1) * len(rows[n]) > limit:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch
