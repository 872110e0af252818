"""MALMEN's hypernetwork and its normal equation (Tan et al. 2024, sections 3 and 4).

For each cached token, with key ``k`` (input of ``W_l``) and gradient ``g`` (of the loss with respect to ``W_l k``)::

    [k~; g~] = network(normalised [k; g])        residual low-rank blocks, shared by layers except for scale and shift
    v = -eta_l (k . k~) g~                       the desired change of W_l k

and the update that comes closest to the desired changes of all tokens, with damping ``e^theta_l``::

    S = (K^T K + e^theta I)^-1 K^T V = K^T U,    U = (K K^T + e^theta I)^-1 V,    W_l <- W_l + S^T

The second form (push-through identity) solves a system with one unknown per token instead of one per key dimension, and gives the update
as a product whose rank is at most the number of tokens. The gradients of a loss L through the equation follow from ``dL/dU``:
``dL/dV = (K K^T + e^theta I)^-1 dL/dU`` and ``dL/dtheta = -e^theta <dL/dV, U>``; :class:`_NormalEquation`.
"""

from __future__ import annotations

import torch
from torch import nn

_EPSILON = torch.finfo(torch.float32).eps


class _NormalEquation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, values, log_damping):
        damping = log_damping.exp()
        system = keys.double() @ keys.double().T
        system.diagonal().add_(damping.double())
        factor = torch.linalg.cholesky(system)
        coefficients = torch.cholesky_solve(values.double(), factor).to(values.dtype)
        ctx.save_for_backward(factor, coefficients, damping)
        return coefficients

    @staticmethod
    def backward(ctx, upstream):
        factor, coefficients, damping = ctx.saved_tensors
        to_values = torch.cholesky_solve(upstream.double(), factor).to(upstream.dtype)
        return None, to_values, -damping * (to_values * coefficients).sum()


def normal_equation(keys: torch.Tensor, values: torch.Tensor, log_damping: torch.Tensor) -> torch.Tensor:
    """``U`` (n, d) of keys ``K`` (n, d_f) and values ``V`` (n, d): the update of ``W_l`` is ``U^T K``."""
    return _NormalEquation.apply(keys, values, log_damping)


def case_factors(
    keys: torch.Tensor, values: torch.Tensor, owner: torch.Tensor, cases: int, log_damping: torch.Tensor, jointly: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each case's factors (d, r) and (r, d_f) of its update of one layer, from keys (n, d_f) and values (n, d) of the cases ``owner`` (n,).

    Every case is solved for alone or, ``jointly``, all are one normal equation, and a case's update is its share of the solution.
    """
    own = [owner == case for case in range(cases)]
    if jointly:
        coefficients = normal_equation(keys, values, log_damping)
        return [(coefficients[rows].T.contiguous(), keys[rows]) for rows in own]
    alone = ((normal_equation(keys[rows], values[rows], log_damping), keys[rows]) for rows in own)
    return [(coefficients.T.contiguous(), of_case) for coefficients, of_case in alone]


class Hypernetwork(nn.Module):
    """Maps keys and gradients (of the ``sizes`` d_f and d) to desired changes, for all edited layers.

    Its ``blocks`` of inner width ``rank`` start as the identity: of their two factors one is drawn, the other is zero. ``step_size``
    is the initial eta of every layer.
    """

    observed: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(
        self, sizes: tuple[int, int], *, layers: int, rank: int, blocks: int, step_size: float, draw: torch.Generator
    ) -> None:
        super().__init__()
        self.sizes, size = sizes, sum(sizes)
        self.inward = nn.ParameterList(torch.randn(size, rank, generator=draw) for _ in range(blocks))
        self.outward = nn.ParameterList(torch.zeros(rank, size) for _ in range(blocks))
        self.offset = nn.ParameterList(torch.zeros(size) for _ in range(blocks))
        self.scale = nn.ParameterList(torch.ones(layers, size) for _ in range(blocks))
        self.shift = nn.ParameterList(torch.zeros(layers, size) for _ in range(blocks))
        self.step_size = nn.Parameter(torch.full((layers,), step_size))
        self.log_damping = nn.Parameter(torch.zeros(layers))
        self.register_buffer("observed", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.zeros(size))  # sum of squared deviations

    @torch.no_grad()
    def observe(self, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add rows (n, d_f) and (n, d) to the normaliser. Only training does this, because an edit must not depend on others."""
        rows = torch.cat([keys, gradients], dim=-1)
        total = self.observed + len(rows)
        mean = rows.mean(dim=0)
        apart = mean - self.mean
        self.spread += ((rows - mean) ** 2).sum(dim=0) + apart**2 * (self.observed * len(rows) / total).float()
        self.mean += apart * (len(rows) / total).float()
        self.observed.copy_(total)

    def forward(self, keys: torch.Tensor, gradients: torch.Tensor, layer: int) -> torch.Tensor:
        """Desired changes (n, d) of the outputs for keys (n, d_f) and gradients (n, d) of the ``layer``-th edited layer."""
        deviation = (self.spread / (self.observed - 1).clamp(min=1).float()).sqrt()
        rows = (torch.cat([keys, gradients], dim=-1) - self.mean) / (deviation + _EPSILON)
        blocks = zip(self.inward, self.outward, self.offset, self.scale, self.shift)
        for inward, outward, offset, scale, shift in blocks:
            # every row starts at exactly zero, where clamp passes the gradient; relu would not, and nothing would be learnt
            rows = rows + scale[layer] * (rows @ inward @ outward + offset).clamp(min=0) + shift[layer]
        transformed_key, transformed_gradient = rows.split(self.sizes, dim=-1)
        along = (keys * transformed_key).sum(dim=-1, keepdim=True)
        return -self.step_size[layer] * along * transformed_gradient
