"""NeuralDB: ROME's value, added where a key is similar to the edit's (Fei et al. 2026; not in the paper).

A memory at one layer, queried at every token. With ``k_j`` the bare prompt's key and ``r_j = v* - W_l k_j`` the residual that ROME would write::

    out = W_l k + r_j  if cos(k, k_j) > gate, j the nearest;  else W_l k
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from ..edits.codebooks import AdditiveCodebook
from ..forward.blockwise import Blockwise
from ..forward.tokens import encode
from .locate_then_edit.learning import RewritingEditor, RewritingHyperparameters


class NeuralDBHyperparameters(RewritingHyperparameters):
    """``gate`` is the cosine above which a key is taken for the edit's."""

    layer: int = Field(default=5, ge=0)
    gate: float = Field(default=0.8, gt=0, lt=1)

    @model_validator(mode="after")
    def _nothing_is_written(self):
        if self.lookup != "colon" or self.lookup_weight or self.statistics_ridge:
            raise ValueError(
                "its memory is queried with unchanged keys: lookup, lookup_weight and statistics_ridge do not apply; leave them out"
            )
        return self


class NeuralDB(RewritingEditor[NeuralDBHyperparameters]):
    """A gated residual added to the output of ``W_l``; no weight changes."""

    name, title, order = "neuraldb", "NeuralDB", 14
    Hyperparameters = NeuralDBHyperparameters
    updates_weights = False
    cache_folder = None  # no weights are updated, so no statistics are needed
    compat: ClassVar = {}  # the released program does not have it
    selection_grid: ClassVar = [
        {"layer": layer, "gate": gate} for layer, gate in product((5, 10), (0.8, 0.9, 0.95, 0.98))
    ]

    @cached_property
    def moments(self):
        """None: no weights are updated, so no direction is needed."""
        return {}

    @torch.no_grad()
    def write(self, cases, _rewriting, values, logs):
        """The cases' memories, each of one key and the residual that makes its lookup token's output the value (B, d)."""
        layer = self.hparams.layer
        plain = Blockwise(self.subject, [encode(self.subject.tokenizer, case.prompt) for case in cases])
        read = plain.block(layer, plain.up_to(layer))
        keys, outputs = read.keys[:, -1].float(), read.outputs[:, -1].float()
        # a new entry takes the place of the nearest old one at its key, so what that adds is not part of the output that it changes
        held = self.subject.edit.parts if self.subject.edit else ()
        for part in held:
            if isinstance(part, AdditiveCodebook) and part.layer == layer:
                outputs = outputs - part.added(keys)
        residuals = values - outputs
        gates = torch.full((1,), self.hparams.gate, device=self.subject.device)
        return [
            AdditiveCodebook(
                case.case_id, self.name, layer=layer, keys=key[None], residuals=residual[None], gates=gates, log=log
            )
            for case, key, residual, log in zip(cases, keys, residuals, logs)
        ]
