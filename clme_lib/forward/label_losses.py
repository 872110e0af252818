"""Losses at label columns under the vocabulary head, with their gradients in the same pass."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch

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


class _LabelLoss(torch.autograd.Function):
    """Cross-entropy of labels under a vocabulary head.

    The gradient of ``-log softmax(W h)[y]`` with respect to ``h`` is ``W^T (softmax(W h) - onehot(y))``: the softmax is
    at hand when the loss is, so the logits of a few labels at a time live only until both are taken from them. At ``compared``
    labels' columns ``KL(p || p_reference)`` is taken from the same logits; its gradient is ``W^T (p (log p - log p_reference - KL))``.
    """

    @staticmethod
    def forward(ctx, states, head, labels, compared, reference):
        """(N, d) normalised last-block states, the head, (N,) labels, the C to compare at and log-probabilities (C, V) or None
        -> losses (N,), whether the label is the arg-max (N,), divergences (C,), log-probabilities (C, V); these have no gradient.
        """
        weight = head.weight
        indices, device = compared.on_device, states.device
        losses, greedy = torch.empty(len(states), device=device), torch.empty_like(labels, dtype=torch.bool)
        divergences = torch.zeros(len(indices), device=device)
        gradient, of_divergences = torch.empty_like(states), states.new_zeros(len(indices), states.shape[-1])
        log_shares = torch.empty(len(indices), len(weight), device=device)
        at_once = _LABELS_AT_ONCE[device.type]
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
            product = logits.to(weight.dtype) @ weight
            gradient[part] = product[: len(expected)]
            if reference is not None:
                of_divergences[inside] = product[len(expected) :]
        ctx.save_for_backward(gradient, indices, of_divergences)
        ctx.mark_non_differentiable(greedy, log_shares)
        return losses, greedy, divergences, log_shares

    @staticmethod
    def backward(ctx, of_losses, _greedy, upstream, _log_shares):
        gradient, indices, of_divergences = ctx.saved_tensors
        whole = of_losses[:, None].to(gradient.dtype) * gradient
        whole = whole.index_add(0, indices, upstream[:, None].to(gradient.dtype) * of_divergences)
        return whole, None, None, None, None


class _DistributionLoss(torch.autograd.Function):
    """``KL(p_reference || p)`` at each label column, both under the vocabulary head."""

    @staticmethod
    def forward(ctx, states, head, reference):
        """(N, d) normalised last-block states, the head, (N, d) states of the reference -> divergences (N,) in nats."""
        divergences = torch.empty(len(states), device=states.device, dtype=torch.float32)
        gradient = torch.empty_like(states)
        at_once = _LABELS_AT_ONCE[states.device.type]
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            log_reference = torch.log_softmax(head(reference[part]).float(), dim=-1)
            log_shares = torch.log_softmax(head(states[part]).float(), dim=-1)
            probabilities = log_reference.exp()
            divergences[part] = (probabilities * log_reference.sub_(log_shares)).sum(dim=-1)
            gradient[part] = log_shares.exp_().sub_(probabilities).to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(gradient)
        return divergences

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream[:, None].to(gradient.dtype) * gradient, None, None


def divergences(subject: Subject, states: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``KL(p_reference || p)`` (N,) between the next-token distributions of two sets of last-block states (N, d)."""
    return _DistributionLoss.apply(states, subject.model.lm_head, reference)
