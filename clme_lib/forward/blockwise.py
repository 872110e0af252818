"""The model block by block, to read values inside it: keys, outputs, and the stream under a partial edit.

Rows are padded on the left, so a prompt's lookup token is the last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..subjects.subject import Subject
from ..support.batching import of_like_length
from .padded import Padded
from .recording import recorded

PASS_TOKENS = {"cpu": 2_048, "cuda": 32_768}  # tokens read in one pass, including padding


@dataclass(frozen=True)
class BlockPass:
    """One block's pass over R rows of W columns."""

    hidden: torch.Tensor  # (R, W, d) the residual stream after the block
    keys: torch.Tensor  # (R, W, d_f) inputs of its down_proj
    outputs: torch.Tensor  # (R, W, d) outputs of its down_proj


class Blockwise:
    """Rows of token ids on their way through the blocks; the model itself wrote each row's last ``written`` tokens (default: none).

    Attributes:
        embedded: (R, W, d) the stream before block 0; mask: (R, W) True at real tokens.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject, rows: Sequence[Sequence[int]], written: Sequence[int] | None = None) -> None:
        self.subject = subject
        width = max(map(len, rows))
        prompt_ends = [width - 1 - count for count in written or [0] * len(rows)]
        self._padded = Padded.of(subject, rows, [width - len(row) for row in rows], width, prompt_ends)
        self.mask = self._padded.layout.real
        self.embedded = subject.decoder.embed_tokens(self._padded.ids)

    @torch.no_grad()
    def block(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> BlockPass:
        """Run block ``layer`` on the stream ``hidden`` of all rows, or of the given ones."""
        padded, block = self._padded if rows is None else self._padded.part(rows), self.subject.blocks[layer]
        with recorded(block, "keys", "outputs") as values:
            after = padded.through(block, hidden)
        return BlockPass(after, **values)

    def up_to(self, layer: int) -> torch.Tensor:
        """The stream before block ``layer``, (R, W, d)."""
        hidden = self.embedded
        for below in range(layer):
            hidden = self.block(below, hidden).hidden
        return hidden


def passes(subject: Subject, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Batches of row indices; the rows of a batch have similar lengths and go through the blocks together."""
    return of_like_length([len(row) for row in rows], tokens=PASS_TOKENS[subject.device.type])
