"""MALMEN: a hypernetwork turns gradients into updates of several layers (paper section III-B; Tan et al. 2024).

Algorithm, for one case::

    one forward and backward pass of the target's mean cross-entropy on the prompt and target
    K, G: inputs of W_l, and gradients at its outputs, at the columns that predict the target's tokens
    V = network(K, G);  U = (K K^T + e^theta I)^-1 V;  W_l <- W_l + U^T K        in each of six layers (hypernetwork.py)

``fit`` trains the network on other cases (training.py), once per subject, data set and fold.

The released program caches the first tokens of the prompt instead, because it reads a mask made for the target
alone; and it tokenises the target alone. ``cached="released"`` and ``targets="alone"`` do as it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...datasets.cases import Case
from ...edits.base import EditLog
from ...edits.weights import LowRankUpdate
from ...forward.partial import PartialForward
from ...support.errors import StudyError
from ..base import Editor
from .gradients import Cached, edit_row
from .hypernetwork import Hypernetwork, normal_equation
from .training import MALMENHyperparameters, trained


class MALMEN(Editor[MALMENHyperparameters]):
    """A learnt update of rank at most the target's tokens in each of several layers."""

    name = "malmen"
    Hyperparameters = MALMENHyperparameters
    needs_training = True
    compat: ClassVar = {"cached": "released", "targets": "alone"}
    network: Hypernetwork | None = None

    def fit(self, cases: Sequence[Case], edited: Sequence[Case] = ()) -> None:
        """Train the hypernetwork on cases of one data set, or load it when it has been trained on them before.

        Raises:
            StudyError: the cases are of several data sets, or have no rephrased prompts.
        """
        self.network = trained(self.subject, self.values, cases, self.seed)

    @torch.no_grad()
    def _edit_batch(self, cases, tokenized):
        network = self.network
        if network is None:
            raise StudyError("malmen has not been trained: call fit(cases) with cases that will not be edited")
        layers = self.values.layers
        rows = [edit_row(self.subject, case.prompt, case.target, self.values.targets) for case in cases]
        forward = PartialForward(self.subject, rows, layers[0], from_lookup=False)
        cached = Cached(forward, layers, self.values.cached)
        factors: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in cases]
        for n, layer in enumerate(layers):
            wanted = network(cached.keys[layer], cached.gradients[layer], n)
            for case in range(len(cases)):
                mine = cached.owner == case
                keys = cached.keys[layer][mine]
                coefficients = normal_equation(keys, wanted[mine], network.log_damping[n])
                factors[case][layer] = (coefficients.T.contiguous(), keys)
        return [
            LowRankUpdate(case.case_id, self.name, factors=mine, log=EditLog(steps=1, losses=(loss,)))
            for case, mine, loss in zip(cases, factors, cached.losses.tolist())
        ]
