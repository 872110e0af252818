"""UltraEdit: MALMEN's update without a trained network (Gu et al. 2025; not in the paper).

One forward and one backward pass gives the keys ``K`` and the gradients ``G`` of the target's tokens, as for MALMEN. With both normalised to mean 0
and deviation 1 in each dimension (``k~``, ``g~``)::

    v = -step_size |k~|^2 g~        the desired change of W_l k
    W_l <- W_l + V^T (K K^T + I)^-1 K

Cases that are edited together share one such system, with the rows of all of them in ``K`` and ``V``.

The authors update the normaliser with every edit, so an edit depends on earlier edits. Here it is gathered from other cases and then
stays fixed, so that a case's edit depends only on the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from ..datasets.cases import in_seeded_order
from ..edits.base import EditLog
from ..edits.weights import LowRankUpdate
from ..forward.partial import PartialForward
from ..forward.tokens import TokenRow
from ..subjects.subject import Subject
from ..support.batching import in_parts
from ..support.errors import StudyError
from ..support.schema import Layers
from .base import Editor, TargetHyperparameters
from .malmen.gradients import Cached
from .malmen.hypernetwork import case_factors
from .operations import Phase, Sizes

_GATHERED_AT_ONCE = 8  # cases


class UltraEditHyperparameters(TargetHyperparameters):
    """``step_size`` is eta; the normaliser is gathered from ``records`` other cases."""

    layers: Layers = (26, 27, 28, 29, 30, 31)
    step_size: float = Field(default=1e-6, gt=0)
    records: int = Field(default=100, gt=0)


class UltraEdit(Editor[UltraEditHyperparameters]):
    """One update of rank at most the target's tokens in each of several layers, from one pass."""

    name, title, order = "ultraedit", "UltraEdit", 15
    Hyperparameters = UltraEditHyperparameters
    needs_training = True
    timed_untrained = True
    selection_grid: ClassVar = [
        {"step_size": step_size} for step_size in (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ]
    #: by layer, mean and deviation of keys (d_f,), and of gradients (d,)
    normalisers: dict[int, tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] | None = None

    def fit(self, cases, edited=()):
        if not cases:
            raise StudyError("ultraedit gathers its normaliser from cases that are not edited, and needs at least one")
        chosen = in_seeded_order(cases, "ultraedit", self.seed, cases[0].dataset)[: self.hparams.records]
        gathered: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in self.layers}
        for part in in_parts(chosen, _GATHERED_AT_ONCE):
            cached = self._cached(self.subject.original, [self._tokenize(case) for case in part])
            for layer in self.layers:
                gathered[layer].append((cached.keys[layer], cached.gradients[layer]))
        columns = {layer: [torch.cat(part).double() for part in zip(*rows)] for layer, rows in gathered.items()}
        self.normalisers = {
            layer: tuple((part.mean(dim=0).float(), part.std(dim=0).float()) for part in both)  # type: ignore[misc]
            for layer, both in columns.items()
        }

    def stand_in(self, cases):
        self.fit(cases[:2])

    def operations(self, prompt, target, steps):
        sizes, columns = Sizes(self.subject), prompt + target - 1
        edited_blocks = sizes.blocks - self.layers[0]
        return [
            sizes.read(columns, self.layers[0]),
            Phase("gradient", *sizes.step(columns, columns / 2, edited_blocks, target)),
        ]

    def _cached(self, subject: Subject, tokenized: Sequence[TokenRow]) -> Cached:
        forward = PartialForward(subject, tokenized, self.layers[0], from_lookup=False)
        return Cached(forward, self.layers, "target")

    def edit_together(self, cases):
        return self._together(cases, partial(self._edit_batch, jointly=True))

    @torch.no_grad()
    def _edit_batch(self, cases, tokenized, jointly=False):
        if self.normalisers is None:
            raise StudyError("ultraedit has no normaliser: call fit(cases) with cases that will not be edited")
        parts = in_parts(tokenized, self.default_batch) if jointly else [tokenized]
        cached = Cached.joined([self._cached(self.subject, part) for part in parts])
        none = torch.zeros((), device=self.subject.device)  # a damping of 1 has the logarithm 0
        factors: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in cases]
        for layer in self.layers:
            pairs = zip((cached.keys[layer], cached.gradients[layer]), self.normalisers[layer])
            keys, gradients = ((rows - mean) / (spread + 1e-8) for rows, (mean, spread) in pairs)
            changes = -self.hparams.step_size * keys.square().sum(dim=-1, keepdim=True) * gradients
            solved = case_factors(cached.keys[layer], changes, cached.owner, len(cases), none, jointly)
            for of_case, pair in zip(factors, solved):
                of_case[layer] = pair
        return [
            LowRankUpdate(case.case_id, self.name, factors=of_case, log=EditLog(steps=1, losses=(loss,)))
            for case, of_case, loss in zip(cases, factors, cached.losses.tolist())
        ]
