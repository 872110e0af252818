"""Writing the change of a hidden state into the MLPs of several layers, as MEMIT does (Meng et al. 2023); shared base of related editors.

Algorithm, for one case with layers ``l_1 .. l_n``::

    z = h + delta                     h: the stream after block l_n at the lookup token; delta learnt there (learning.py)
    for i = 1 .. n:
        k = 1/2 k(no context) + 1/2 mean of k(contexts)       inputs of W_{l_i} at the lookup token
        r = z - h                                             both read with the layers below already written
        W_{l_i} <- W_{l_i} + (r / (n + 1 - i)) a^T            a: the editor's direction for k

Nothing is written into the model: the stream of all columns is carried from block to block, including what the update adds.

The direction solves a least-squares problem: ``W_l`` should add ``r`` to its output for ``k``, and keep its outputs for other texts' keys,
weighted by a positive-definite ``A`` that each editor chooses::

    a = (A + k k^T)^-1 k = q / (1 + k^T q),  q = A^-1 k

Several cases that are written together (:meth:`SpreadingEditor.edit_together`) are one problem: with their keys as the rows of ``K`` and ``Q = K A^-1``,
the directions are the rows of ``(I + Q K^T)^-1 Q``, which costs a solve with as many unknowns as there are cases. With ``accumulate``,
the keys of earlier edits of the subject count like other texts' keys: ``A <- A + K_h^T K_h``, by the same identity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch

from ...datasets.cases import Case
from ...edits.base import EditLog
from ...edits.weights import LowRankUpdate
from ...forward.blockwise import BlockPass, Blockwise
from ...support.batching import of_like_length
from ...support.schema import Layers
from ..operations import Phase, Sizes
from .learning import RewritingEditor, RewritingHyperparameters
from .second_moments import random_moments


class SpreadingHyperparameters(RewritingHyperparameters):
    """``layers`` are the updated layers, ascending; the vector is learnt after the last. ``accumulate`` protects earlier edits."""

    layers: Layers = (4, 5, 6, 7, 8)
    accumulate: bool = False


Hparams = TypeVar("Hparams", bound=SpreadingHyperparameters)


class SpreadingEditor(RewritingEditor[Hparams]):
    """One rank-one update in each of several layers."""

    def stand_in(self, cases):
        self.moments = random_moments(self.subject, self.layers, self.seed)

    def operations(self, prompt, target, steps):
        sizes, layers, rows = Sizes(self.subject), self.layers, len(self.contexts)
        all_rows = sizes.read(self.mean_width(prompt), len(layers), rows)
        # the bare prompt is read through all blocks from each written layer to the last
        bare = sizes.read(prompt, sum(layers[-1] - layer for layer in layers))
        return [
            *super().operations(prompt, target, steps),
            Phase("write", all_rows.operations + bare.operations, all_rows.traffic + bare.traffic),
            Phase("solve", 2 * len(layers) * sizes.inner**2, 8 * len(layers) * sizes.inner**2),
        ]

    def edit_together(self, cases):
        return self._together(cases, self._edit_jointly)

    def _edit_jointly(self, cases, tokenized):
        batches = of_like_length(
            list(map(self._cost, tokenized)), ratio=self._max_cost_ratio(), most=self.default_batch
        )
        states: dict[int, torch.Tensor] = {}
        logs: dict[int, EditLog] = {}
        for batch in batches:
            learnt, of_batch = self.learn([cases[n] for n in batch])
            states.update(zip(batch, learnt))
            logs.update(zip(batch, of_batch))
        order = range(len(cases))
        return self.write(cases, torch.stack([states[n] for n in order]), [logs[n] for n in order], together=True)

    def learn(self, cases):
        """The target state of the lookup token after the last edited layer, (B, d) float32, and the logs; needs gradients."""
        _, states, logs = super().learn(cases)
        return states, logs

    def _outputs(self, forward):
        # the stream after a block is its MLP's output plus constants, so delta can be added to that output
        return [forward.residual + forward.outputs]

    @staticmethod
    def _held(read: BlockPass) -> torch.Tensor:
        """The state that ``z`` is compared with, read after the last edited layer: the stream."""
        return read.hidden

    @staticmethod
    def _residual_divisor(left: int) -> float:
        """The divisor of the residual when ``left`` layers, this one included, are still to be written."""
        return float(left)

    @abstractmethod
    def solve(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """``A^-1 k`` of each key (B, d_f), in float64; ``A`` says how strongly each direction is protected."""

    def history(self, layer: int) -> torch.Tensor | None:
        """(H, d_f) in float64: keys that earlier edits of the subject were solved for at this layer; None if there are none, or they do not count."""
        if not self.hparams.accumulate or self.subject.edit is None:
            return None
        updates = [part for part in self.subject.edit.parts if isinstance(part, LowRankUpdate)]
        written = [update.keys[layer] for update in updates if layer in update.keys]
        return torch.cat(written).to(self.subject.device).double() if written else None

    def directions(self, layer: int, keys: torch.Tensor, together: bool = False) -> torch.Tensor:
        """``a`` of each key (B, d_f), in float32: what its residual is written along, each alone or all ``together``."""
        keys = keys.double()
        solved = self.solve(layer, keys)
        if (earlier := self.history(layer)) is not None:
            of_earlier = self.solve(layer, earlier)
            system = of_earlier @ earlier.T
            system.diagonal().add_(1.0)
            solved = solved - torch.linalg.solve(system, earlier @ solved.T).T @ of_earlier
        if not together:
            return (solved / (1 + (keys * solved).sum(dim=-1, keepdim=True))).float()
        system = solved @ keys.T
        system.diagonal().add_(1.0)
        return torch.linalg.solve(system, solved).float()

    @torch.no_grad()
    def write(
        self, cases: Sequence[Case], target_states: torch.Tensor, logs: Sequence[EditLog], together: bool = False
    ) -> list[LowRankUpdate]:
        """The cases' edits: updates of each layer that bring the lookup token to its target state (B, d).

        Each edit does this for its case alone; with ``together``, the sum of all edits does it for every case.
        """
        layers, contexts = self.layers, len(self.contexts)
        prompts = [self._lookup_tokens(case, context) for case in cases for context in self.contexts]
        walk = Blockwise(self.subject, prompts)
        every = torch.arange(len(prompts), device=self.subject.device)
        bare, columns = every[::contexts], self._key_columns(prompts)
        # the bare prompt has as much weight as all contexts together
        weights = torch.tensor([0.5] + [0.5 / (contexts - 1)] * (contexts - 1), device=self.subject.device)
        hidden = walk.up_to(layers[0])
        factors: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in cases]
        solved_for: list[dict[int, torch.Tensor]] = [{} for _ in cases]
        for layer in range(layers[0], layers[-1] + 1):
            here = walk.block(layer, hidden)
            hidden = here.hidden
            if layer not in layers:
                continue
            of_rows = here.keys[every, columns].float().view(len(cases), contexts, -1)
            keys = (of_rows * weights[:, None]).sum(dim=1)
            right = self.directions(layer, keys, together)
            read = BlockPass(here.hidden[bare], here.keys[bare], here.outputs[bare])
            for above in range(layer + 1, layers[-1] + 1):
                read = walk.block(above, read.hidden, rows=bare)
            residual = target_states - self._held(read)[:, -1].float()
            left = residual / self._residual_divisor(len(layers) - layers.index(layer))
            for n, of_case in enumerate(factors):
                of_case[layer] = left[n][:, None], right[n][None]
                if self.hparams.accumulate:
                    solved_for[n][layer] = keys[n][None]
            if together:
                added = (here.keys.float() @ right.T) @ left
            else:
                along = torch.einsum("rwf,rf->rw", here.keys.float(), right.repeat_interleave(contexts, dim=0))
                added = along[:, :, None] * left.repeat_interleave(contexts, dim=0)[:, None]
            hidden = hidden + added.to(hidden.dtype)
        return [
            LowRankUpdate(case.case_id, self.name, factors=of_case, keys=of_keys, log=log)
            for case, of_case, of_keys, log in zip(cases, factors, solved_for, logs)
        ]

    def _key_columns(self, prompts: list[list[int]]) -> torch.Tensor:
        """(R,) the column, from the right, at which each row's key is read: the last, except with ``padding="released"``."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.subject.device)
        if self.hparams.padding == "aligned":
            return torch.full_like(lengths, -1)
        of_case = lengths.view(-1, len(self.contexts))
        return (of_case - of_case.amax(dim=1, keepdim=True) - 1).flatten()
