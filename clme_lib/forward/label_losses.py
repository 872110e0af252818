"""Losses at label columns under the vocabulary head, with their gradients in the same pass."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch

from ..subjects.products import matrix_product
from ..subjects.subject import Subject

# Label columns whose logits exist at one time: enough for efficient products, and little enough memory. On a CPU they stay below
# the 32 MiB from which the C library asks the system for new pages each time.
_LABELS_AT_ONCE = {"cpu": 128, "cuda": 4_096}


class LabelIndices(NamedTuple):
    """Indices of labels in ascending order, on the host and on the device, so that reading them never waits for the other."""

    on_host: tuple[int, ...]
    on_device: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor) -> LabelIndices:
        return cls(tuple(indices.tolist()), indices)


class _WithGradient(torch.autograd.Function):
    """Values (N,) that were computed from states (N, d), and their gradient (N, d), which was computed in the same pass."""

    @staticmethod
    def forward(ctx, states, values, gradient):
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream[:, None].to(gradient.dtype) * gradient, None, None


def label_losses(states, head, labels, compared: LabelIndices, reference: torch.Tensor | None):
    """Cross-entropy of labels under a vocabulary head, and how far the distributions before some of them have moved.

    The gradient of ``-log softmax(W h)[y]`` with respect to ``h`` is ``W^T (softmax(W h) - onehot(y))``: the softmax is
    known when the loss is, so the logits of a few labels at a time are only kept until both are computed. At ``compared``
    labels' columns ``KL(p || p_reference)`` is taken from the same logits; its gradient is ``W^T (p (log p - log p_reference - KL))``.

    (N, d) normalised last-block states, the head, (N,) labels, the C to compare at and log-probabilities (C, V) or None
    -> losses (N,), whether the label is the arg-max (N,), divergences (C,), log-probabilities (C, V).
    """
    weight, indices, device = head.weight, compared.on_device, states.device
    losses, greedy = torch.empty(len(states), device=device), torch.empty_like(labels, dtype=torch.bool)
    divergences = torch.zeros(len(indices), device=device)
    gradient, of_divergences = torch.empty_like(states), states.new_zeros(len(indices), states.shape[-1])
    log_shares = torch.empty(len(indices), len(weight), device=device)
    at_once = _LABELS_AT_ONCE[device.type]
    with torch.no_grad():
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            inside = slice(bisect_left(compared.on_host, first), bisect_left(compared.on_host, first + at_once))
            expected = labels[part, None]
            logits = head(states[part]).float()
            greedy[part] = logits.argmax(dim=-1) == labels[part]
            # PyTorch's own kernel makes the losses round like anybody's cross-entropy.
            logits = torch.log_softmax(logits, dim=-1)
            losses[part] = -logits.gather(-1, expected)[:, 0]
            log_shares[inside] = logits[indices[inside] - first]
            logits.exp_()
            if reference is not None:
                difference = log_shares[inside] - reference[inside]
                shares = logits[indices[inside] - first]
                divergences[inside] = (shares * difference).sum(dim=-1)
                logits = torch.cat([logits, shares * (difference - divergences[inside, None])])
            logits[: len(expected)].scatter_add_(-1, expected, torch.full_like(expected, -1.0, dtype=torch.float32))
            of_states = matrix_product(logits.to(weight.dtype), weight.T)
            gradient[part] = of_states[: len(expected)]
            if reference is not None:
                of_divergences[inside] = of_states[len(expected) :]
    moved = _WithGradient.apply(states.index_select(0, indices), divergences, of_divergences)
    return _WithGradient.apply(states, losses, gradient), greedy, moved, log_shares


def divergences(subject: Subject, states: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``KL(p_reference || p)`` (N,) in nats between the next-token distributions of two sets of last-block states (N, d)."""
    head = subject.model.lm_head
    values = torch.empty(len(states), device=states.device, dtype=torch.float32)
    gradient = torch.empty_like(states)
    at_once = _LABELS_AT_ONCE[states.device.type]
    with torch.no_grad():
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            log_reference = torch.log_softmax(head(reference[part]).float(), dim=-1)
            log_shares = torch.log_softmax(head(states[part]).float(), dim=-1)
            probabilities = log_reference.exp()
            values[part] = (probabilities * log_reference.sub_(log_shares)).sum(dim=-1)
            gradient[part] = matrix_product(log_shares.exp_().sub_(probabilities).to(head.weight.dtype), head.weight.T)
    return _WithGradient.apply(states, values, gradient)
