"""Rows of token ids side by side in one rectangle, and running blocks on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..edits.base import Layout, announced
from ..subjects.subject import Subject


@dataclass(frozen=True)
class Padded:
    """R rows in W columns, on the subject's device."""

    ids: torch.Tensor  # (R, W); padding repeats EOS as everywhere else, and only ``layout`` marks it
    layout: Layout
    positions: torch.Tensor  # (R, W) of the tokens in their rows
    # (R, 1, W, W or more) True where a column (third axis) attends to another (fourth): to the real ones up to itself
    attended: torch.Tensor
    rotary: tuple[torch.Tensor, ...]  # cosines and sines of the positions, as blocks take them

    @classmethod
    def of(
        cls,
        subject: Subject,
        rows: Sequence[Sequence[int]],
        firsts: Sequence[int],
        width: int,
        prompt_ends: Sequence[int],
    ) -> Padded:
        """Put each row's first token into its column of ``firsts``; ``prompt_ends`` are columns too."""
        ids = torch.full((len(rows), width), subject.tokenizer.pad_token_id, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (row, first) in enumerate(zip(rows, firsts)):
            ids[n, first : first + len(row)] = torch.tensor(row, dtype=torch.long)
            real[n, first : first + len(row)] = True
        ids, real, ends = (tensor.to(subject.device) for tensor in (ids, real, torch.tensor(prompt_ends)))
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(width, width, dtype=torch.bool, device=subject.device).tril()
        # A padding column attends to itself alone, so that no softmax is empty.
        own = torch.eye(width, dtype=torch.bool, device=subject.device)
        attended = ((causal & real[:, None, :]) | own)[:, None]
        rotary = subject.decoder.rotary_emb(subject.decoder.embed_tokens.weight, position_ids=positions)
        return cls(ids, Layout(real, ends), positions, attended, rotary)

    def part(self, rows: Any = slice(None), columns: slice = slice(None), seen: slice = slice(None)) -> Padded:
        """Some of the rows, and of them some columns, attending to those in ``seen``."""
        return Padded(
            self.ids[rows, columns],
            Layout(self.layout.real[rows, columns], self.layout.prompt_end[rows] - (columns.start or 0)),
            self.positions[rows, columns],
            self.attended[rows, :, columns, seen],
            tuple(part[rows, columns] for part in self.rotary),
        )

    def through(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """The stream (R, W, d) after a block, from that before it."""
        with announced(self.layout):
            places = {"position_ids": self.positions, "position_embeddings": self.rotary}
            return block(hidden, attention_mask=self.attended, **places)
