"""Rows of token ids side by side in one rectangle: ids, which columns are real, positions, and who attends to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..subjects.subject import Subject


@dataclass(frozen=True)
class Padded:
    """R rows in W columns, on the subject's device.

    Attributes:
        ids: (R, W) token ids; padding repeats EOS as everywhere else, only ``mask`` says what it is.
        mask: (R, W) True at real tokens.
        positions: (R, W) of the tokens in their rows.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, subject: Subject, rows: Sequence[Sequence[int]], firsts: Sequence[int], width: int) -> Padded:
        """Put each row's first token into its column of ``firsts``."""
        ids = torch.full((len(rows), width), subject.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (row, first) in enumerate(zip(rows, firsts)):
            ids[n, first : first + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[n, first : first + len(row)] = True
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return cls(ids.to(subject.device), mask.to(subject.device), positions.to(subject.device))

    def attended(self) -> torch.Tensor:
        """(R, 1, W, W) True where a column (third axis) attends to another (fourth): to the real ones up to itself."""
        width, device = self.mask.shape[1], self.mask.device
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # A padding column attends to itself alone, so that no softmax is empty.
        own = torch.eye(width, dtype=torch.bool, device=device)
        return ((causal & self.mask[:, None, :]) | own)[:, None]
