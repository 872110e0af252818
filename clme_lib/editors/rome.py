"""ROME: a rank-one update of one layer (paper section III-B; Meng et al. 2022).

Algorithm, for one case at layer ``l``::

    v* = v_0 + delta                        delta learnt at the output of W_l (learning.py)
    k  = mean of the six contexts' keys     key: input of W_l at the lookup token
    u  = k / |k|                            with `covariance`: C^-1 k, normalised
    W_l <- W_l + (v* - W_l k_0) u^T / (k_0^T u)

so that the bare prompt's key ``k_0`` is mapped to ``v*`` exactly. The covariance is off, as in the released program; lookup-aware statistics
(locate_then_edit/second_moments.py) are for ``covariance: true`` alone.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from ..edits.weights import LowRankUpdate
from ..forward.blockwise import Blockwise
from ..support.errors import CaseError
from .locate_then_edit.learning import RewritingEditor, RewritingHyperparameters


class ROMEHyperparameters(RewritingHyperparameters):
    """``covariance`` weighs the key by the inverse second moment of the layer's keys."""

    layer: int = Field(default=5, ge=0)
    covariance: bool = False

    @model_validator(mode="after")
    def _statistics_are_used(self):
        if not self.covariance and (self.lookup_weight or self.statistics_ridge):
            raise ValueError("lookup_weight and statistics_ridge change the covariance: set covariance to true as well")
        return self


class ROME(RewritingEditor[ROMEHyperparameters]):
    """One key and one value written into ``W_l``."""

    name, title, order, colour = "rome", "ROME", 2, 1
    Hyperparameters = ROMEHyperparameters
    selection_grid: ClassVar = [
        {"kl_factor": kl, "layer": layer} for kl, layer in product((0.0625, 0.0), (5, 10, 15, 20))
    ]

    @classmethod
    def cached_in(cls, hparams):
        return super().cached_in(hparams) if hparams.covariance else None

    @cached_property
    def moments(self):
        """The second moment of the edited layer's keys (with ``covariance`` only)."""
        return super().moments if self.hparams.covariance else {}

    @torch.no_grad()
    def write(self, cases, rewriting, values, logs):
        """The cases' edits: each maps its bare prompt's key to its value (B, d)."""
        layer = self.hparams.layer
        keys = rewriting.by_case(rewriting.at_lookup(rewriting.forward.keys)).float().mean(dim=1)
        directions = self.moments[layer].solve(keys).float() if self.hparams.covariance else keys
        directions = directions / directions.norm(dim=-1, keepdim=True)
        plain = Blockwise(self.subject, [self._lookup_tokens(case, "") for case in cases])
        read = plain.block(layer, plain.up_to(layer))
        own_keys, own_outputs = read.keys[:, -1].float(), read.outputs[:, -1].float()
        along = (own_keys * directions).sum(dim=-1)
        changes = (values - own_outputs) / along[:, None]
        edits = []
        for n, (case, log) in enumerate(zip(cases, logs)):
            if along[n].abs() <= 1e-6 * own_keys[n].norm():
                raise CaseError(f"case {case.case_id}: rome cannot write: its key has no part along the mean key")
            factors = {layer: (changes[n][:, None], directions[n][None])}
            edits.append(LowRankUpdate(case.case_id, self.name, factors=factors, log=log))
        return edits
