"""MALMEN: a hypernetwork turns gradients into updates of several layers (paper section III-B; Tan et al. 2024).

Algorithm, for one case::

    one forward and backward pass of the target's mean cross-entropy on the prompt and target
    K, G: inputs of W_l, and gradients at its outputs, at the columns that predict the target's tokens
    V = network(K, G);  U = (K K^T + e^theta I)^-1 V;  W_l <- W_l + U^T K        in each of six layers (hypernetwork.py)

Cases that are edited together share one normal equation, with the rows of all of them in ``K`` and ``V``.

``fit`` trains the network on other cases (training.py), once per subject, dataset and fold.

The released program caches the first tokens of the prompt instead, because it reads a mask made for the target
alone; and it tokenises the target alone. ``cached="released"`` and ``targets="alone"`` reproduce this.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import ClassVar

import torch

from ...edits.base import EditLog
from ...edits.weights import LowRankUpdate
from ...forward.partial import PartialForward
from ...support.batching import in_parts
from ...support.errors import StudyError
from ..base import Editor
from ..operations import Phase, Sizes
from .gradients import Cached, edit_row
from .hypernetwork import Hypernetwork, case_factors
from .training import MALMENHyperparameters, Training, trained


class MALMEN(Editor[MALMENHyperparameters]):
    """A learnt update of rank at most the target's tokens in each of several layers."""

    name, title, order, colour = "malmen", "MALMEN", 5, 9
    Hyperparameters = MALMENHyperparameters
    needs_training = True
    cache_folder = "malmen"
    timed_untrained = True
    compat: ClassVar = {"cached": "released", "targets": "alone"}
    # Trained on few records, to be feasible on a laptop; otherwise the first setting is the paper's. The step size is
    # learnt by the same optimiser, so its initial value matters little.
    selection_grid: ClassVar = [
        {"meta_lr": meta_lr, "locality_factor": factor, "iterations": 150, "records": 150}
        for meta_lr, factor in product((1e-5, 3e-5), (1.0, 3.0, 10.0, 30.0))
    ]
    network: Hypernetwork | None = None

    def fit(self, cases, edited=()):
        self.network = trained(self.subject.original, self.hparams, cases, self.seed)

    def stand_in(self, cases):
        self.network = Training(self.subject, self.hparams, cases[:2], self.seed).network.requires_grad_(False)

    def operations(self, prompt, target, steps):
        sizes, layers, columns = Sizes(self.subject), self.hparams.layers, prompt + target - 1
        edited_blocks = sizes.blocks - layers[0]
        weights = sum(p.numel() for p in self.network.parameters() if p.dim() == 2) if self.network else 0
        return [
            sizes.read(columns, sizes.blocks - edited_blocks),
            Phase("gradient", *sizes.step(columns, columns / 2, edited_blocks, target)),
            Phase("network", 2 * target * len(layers) * weights, 4 * weights),
        ]

    def edit_together(self, cases):
        return self._together(cases, partial(self._edit_batch, jointly=True))

    @torch.no_grad()
    def _edit_batch(self, cases, tokenized, jointly=False):
        network, hparams = self.network, self.hparams
        if network is None:
            raise StudyError("malmen has not been trained: call fit(cases) with cases that will not be edited")
        rows = [
            edit_row(self.subject, case.prompt, case.target, hparams.targets, hparams.end_of_target) for case in cases
        ]
        parts = in_parts(rows, self.default_batch) if jointly else [rows]
        forwards = (PartialForward(self.subject, part, hparams.layers[0], from_lookup=False) for part in parts)
        cached = Cached.joined([Cached(forward, hparams.layers, hparams.cached) for forward in forwards])
        factors: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in cases]
        for n, layer in enumerate(hparams.layers):
            changes = network(cached.keys[layer], cached.gradients[layer], n)
            solved = case_factors(
                cached.keys[layer], changes, cached.owner, len(cases), network.log_damping[n], jointly
            )
            for of_case, pair in zip(factors, solved):
                of_case[layer] = pair
        return [
            LowRankUpdate(case.case_id, self.name, factors=of_case, log=EditLog(steps=1, losses=(loss,)))
            for case, of_case, loss in zip(cases, factors, cached.losses.tolist())
        ]
