"""ROME: a rank-one update of one layer (paper section III-B; Meng et al. 2022).

Algorithm, for one case at layer ``l``::

    v* = v_0 + delta                        delta learnt at the output of W_l (learning.py)
    k  = mean of the six contexts' keys     key: input of W_l at the lookup token
    u  = k / |k|                            with `covariance`: C^-1 k, normalised
    W_l <- W_l + (v* - W_l k_0) u^T / (k_0^T u)

so that the bare prompt's key ``k_0`` is mapped to ``v*`` exactly. The covariance is off, as in the released program.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import ClassVar

from pydantic import Field

from ..edits.weights import LowRankUpdate
from ..forward.blockwise import Blockwise
from ..forward.tokens import encode
from ..support.errors import StudyError
from .locate_then_edit.learning import RewritingEditor, RewritingHyperparameters
from .locate_then_edit.second_moments import SecondMoment, StatisticsHyperparameters, second_moments


class ROMEHyperparameters(RewritingHyperparameters, StatisticsHyperparameters):
    """``covariance`` weighs the key by the inverse second moment of the layer's keys."""

    layer: int = Field(default=5, ge=0)
    covariance: bool = False


class ROME(RewritingEditor[ROMEHyperparameters]):
    """One key and one value written into ``W_l``."""

    name, title, order, colour = "rome", "ROME", 2, 1
    Hyperparameters = ROMEHyperparameters
    selection_grid: ClassVar = [{"kl_factor": kl, "layer": layer} for kl, layer in product((0.0625, 0.0), (5, 10))]

    def setup(self):
        prepared = super().setup()
        if self.hparams.covariance:
            prepared["statistics"] = {self.hparams.layer: self.moment.describe()}
        return prepared

    @cached_property
    def moment(self) -> SecondMoment:
        """The second moment of the edited layer's keys (with ``covariance`` only)."""
        return second_moments(self.subject, [self.hparams.layer], self.hparams)[self.hparams.layer]

    def _edit_batch(self, cases, tokenized):
        layer = self.hparams.layer
        rewriting = self._rewriting(cases)
        outputs = rewriting.at_lookup(rewriting.forward.outputs)
        initial = rewriting.first_rows(outputs)
        (delta,), logs = self._learn(
            cases, rewriting, [initial], lambda part, deltas: part.at_lookup(part.forward.outputs) + deltas[0]
        )
        key = rewriting.context_rows(rewriting.at_lookup(rewriting.forward.keys)).float().mean(dim=1)
        direction = self.moment.solve(key).float() if self.hparams.covariance else key
        direction = direction / direction.norm(dim=-1, keepdim=True)
        plain = Blockwise(self.subject, [encode(self.subject.tokenizer, case.prompt) for case in cases])
        read = plain.block(layer, plain.up_to(layer))
        own_key, own_output = read.keys[:, -1].float(), read.outputs[:, -1].float()
        along = (own_key * direction).sum(dim=-1)
        edits = []
        for n, (case, log) in enumerate(zip(cases, logs)):
            if along[n].abs() <= 1e-6 * own_key[n].norm():
                raise StudyError(f"case {case.case_id}: rome cannot write: its key has no part along the mean key")
            change = (initial[n].float() + delta[n] - own_output[n]) / along[n]
            edits.append(
                LowRankUpdate(case.case_id, self.name, factors={layer: (change[:, None], direction[n][None])}, log=log)
            )
        return edits
