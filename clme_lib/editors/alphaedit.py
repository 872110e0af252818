"""AlphaEdit: MEMIT's residual, written along directions that other texts hardly use (Fang et al. 2025; not in the paper).

``P`` projects onto the eigenvectors of the second moment ``C`` whose eigenvalues are below a threshold: an update ``r (P k)^T`` does not change
the outputs for keys in the span of the others. For the keys ``K`` of a batch with residuals ``R``, the update is ``X^T`` with
``(P (K K^T + H H^T) + ridge I) X = P K R^T``, with ``H`` the keys of earlier edits. That is locate_then_edit/spreading.py with ``A^-1 = P / ridge``;
for the one key of a case alone::

    a = P k / (ridge + k^T P k)
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..support.errors import StudyError
from ..support.schema import Schema
from .locate_then_edit.spreading import SpreadingEditor, SpreadingHyperparameters


class AlphaEditHyperparameters(SpreadingHyperparameters):
    """``eigenvalue_threshold`` is on the scale of the second moment; the defaults are the authors' for Llama-3-8B."""

    lr: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.5, ge=0)
    clamp: float = Field(default=0.75, gt=0)
    accumulate: bool = True
    eigenvalue_threshold: float = Field(default=0.02, gt=0)
    ridge: float = Field(default=10.0, gt=0)


class AlphaEdit(SpreadingEditor[AlphaEditHyperparameters]):
    """MEMIT's residual, written only along directions that other texts hardly use."""

    name, title, order = "alphaedit", "AlphaEdit", 12
    Hyperparameters: ClassVar[type[Schema]] = AlphaEditHyperparameters
    compat: ClassVar = {}  # the released program does not have it
    # on smollm2-135m-code, the second threshold keeps about half of the dimensions, and the second ridge writes most of a residual
    selection_grid: ClassVar = [
        {"kl_factor": kl, "eigenvalue_threshold": threshold, "ridge": ridge}
        for kl, threshold, ridge in product((0.0625, 0.0), (0.02, 0.006), (10.0, 0.1))
    ]

    @cached_property
    def projections(self) -> dict[int, torch.Tensor]:
        """``P`` of each layer (d_f, d_f) in float64, on the subject's device; StudyError if a layer has no eigenvalue below the threshold."""
        projections, threshold = {}, self.hparams.eigenvalue_threshold
        for layer, moment in self.moments.items():
            eigenvalues, vectors = torch.linalg.eigh(moment.matrix.to(self.subject.device).double())
            unused = vectors[:, eigenvalues < threshold]
            if not unused.shape[1]:
                raise StudyError(
                    f"alphaedit: the second moment of layer {layer} has no eigenvalue below eigenvalue_threshold={threshold:g}; the "
                    f"smallest is {eigenvalues[0]:.3g}: raise the threshold"
                )
            projections[layer] = unused @ unused.T
        return projections

    def setup(self) -> dict[str, Any]:
        dimensions = {layer: round(projection.trace().item()) for layer, projection in self.projections.items()}
        described = {layer: moment.describe() for layer, moment in self.moments.items()}
        return {"contexts": list(self.contexts), "statistics": described, "dimensions written to": dimensions}

    def stand_in(self, cases):
        super().stand_in(cases)
        # Their eigenvalues are one, except for a few larger ones.
        self.projections = {
            layer: torch.eye(len(moment.matrix), device=self.subject.device).double()
            for layer, moment in self.moments.items()
        }

    def solve(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """``P k / ridge`` of each key (B, d_f)."""
        return keys.double() @ self.projections[layer] / self.hparams.ridge
