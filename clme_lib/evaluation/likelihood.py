"""How likely given texts are under a subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..forward.blockwise import passes
from ..forward.partial import PartialForward
from ..forward.tokens import tokenize
from ..subjects.subject import Subject
from .generation import Request, as_read


@torch.no_grad()
def mean_losses(subject: Subject, texts: Sequence[tuple[str, str]]) -> list[float]:
    """``-log p(target | prompt)`` in nats per target token of each (prompt, target), by the subject with all edits that were made of it.

    Raises:
        StudyError: a target is empty, or its prompt does not end in a colon.
    """
    read, _, _ = as_read(subject, [Request(prompt, 0) for prompt, _ in texts], [])
    rows = [tokenize(subject.tokenizer, request.prompt, target) for request, (_, target) in zip(read, texts)]
    losses = [0.0] * len(rows)
    for group in passes(subject, [row.inputs for row in rows]):
        forward = PartialForward(subject, [rows[n] for n in group], len(subject.blocks) - 1, from_lookup=True)
        for n, loss in zip(group, forward.losses(forward.outputs).tolist()):
            losses[n] = loss
    return losses
