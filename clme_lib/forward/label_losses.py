"""Losses at label columns under the vocabulary head, with their gradients in the same pass."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch

from ..subjects.subject import Subject

# label columns whose logits exist at one time: enough to keep the product efficient, few enough for the memory (on a CPU, below
# the 32 MiB from which the C library asks the system for new pages each time)
_LABELS_AT_ONCE = {"cpu": 128, "cuda": 4_096}


class Places(NamedTuple):
    """Indices of labels in ascending order, both where the host and where the device can read them without the other."""

    known: tuple[int, ...]
    there: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor) -> Places:
        return cls(tuple(indices.tolist()), indices)


class _LabelLoss(torch.autograd.Function):
    """Cross-entropy of labels under a vocabulary head, with the gradient computed in the same pass.

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
        losses, greedy = torch.empty(len(states), device=states.device), torch.empty_like(labels, dtype=torch.bool)
        gradient = torch.empty_like(states)
        places = compared.there
        divergences = torch.zeros(len(places), device=states.device)
        of_divergences = states.new_zeros(len(places), states.shape[-1])
        log_shares = torch.empty(len(places), len(weight), device=states.device)
        at_once = _LABELS_AT_ONCE[states.device.type]
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            mine = slice(bisect_left(compared.known, first), bisect_left(compared.known, first + at_once))
            wanted = labels[part, None]
            logits = head(states[part]).float()
            greedy[part] = logits.argmax(dim=-1) == labels[part]
            # PyTorch's own kernel, so that losses round like anybody's cross-entropy
            logits = torch.log_softmax(logits, dim=-1)
            losses[part] = -logits.gather(-1, wanted)[:, 0]
            log_shares[mine] = logits[places[mine] - first]
            logits.exp_()
            if reference is not None:
                apart = log_shares[mine] - reference[mine]
                shares = logits[places[mine] - first]
                divergences[mine] = (shares * apart).sum(dim=-1)
                logits = torch.cat([logits, shares * (apart - divergences[mine, None])])
            logits[: len(wanted)].scatter_add_(-1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32))
            product = logits.to(weight.dtype) @ weight
            gradient[part] = product[: len(wanted)]
            if reference is not None:
                of_divergences[mine] = product[len(wanted) :]
        ctx.save_for_backward(gradient, places, of_divergences)
        ctx.mark_non_differentiable(greedy, log_shares)
        return losses, greedy, divergences, log_shares

    @staticmethod
    def backward(ctx, of_losses, _greedy, upstream, _log_shares):
        gradient, places, of_divergences = ctx.saved_tensors
        whole = of_losses[:, None].to(gradient.dtype) * gradient
        return (
            whole.index_add(0, places, upstream[:, None].to(gradient.dtype) * of_divergences),
            None,
            None,
            None,
            None,
        )


class _DistributionLoss(torch.autograd.Function):
    """``KL(p_reference || p)`` at each label column, both under the vocabulary head, and its gradient in the same pass."""

    @staticmethod
    def forward(ctx, states, head, reference):
        """(N, d) normalised last-block states, the head, (N, d) states of the reference -> divergences (N,) in nats."""
        divergences = torch.empty(len(states), device=states.device, dtype=torch.float32)
        gradient = torch.empty_like(states)
        at_once = _LABELS_AT_ONCE[states.device.type]
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            wanted = torch.log_softmax(head(reference[part]).float(), dim=-1)
            found = torch.log_softmax(head(states[part]).float(), dim=-1)
            probabilities = wanted.exp()
            divergences[part] = (probabilities * wanted.sub_(found)).sum(dim=-1)
            gradient[part] = found.exp_().sub_(probabilities).to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(gradient)
        return divergences

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream[:, None].to(gradient.dtype) * gradient, None, None


def divergences(subject: Subject, states: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``KL(p_reference || p)`` (N,) between the next-token distributions of two sets of last-block states (N, d)."""
    return _DistributionLoss.apply(states, subject.model.lm_head, reference)
