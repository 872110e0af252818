"""Training of MALMEN's hypernetwork: Algorithm 1 of Tan et al. (2024) with the paper's losses.

An iteration, for a batch of records::

    cache keys and gradients on (prompt, target); add them to the normaliser
    one joint update from all of the batch's tokens
    L = mean cross-entropy of the targets after the *rephrased* prompts
        + locality_factor * mean KL(p_unedited || p_edited) on the neighbours' own answers         both under the update
    gradients through the normal equation into the network; clip their norm; Adam

The update is never written: it acts through hooks as ``(x K^T) U``, so the normal equation only needs the gradient with respect to ``U``.
The states below the edited layers are constant; they are computed once per sequence, and kept for later
epochs as far as memory allows. Training resumes at its last checkpoint; a finished network is kept in the user's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from tqdm import tqdm

from ...datasets.cases import Case, in_seeded_order
from ...evaluation.unedited import answers_for
from ...forward.label_losses import divergences
from ...forward.partial import PartialForward
from ...forward.tokens import TokenRow, encode
from ...subjects.subject import Subject
from ...support.artifact import Artifact
from ...support.batching import of_like_length
from ...support.errors import StudyError
from ...support.schema import Layers
from ...support.seeds import generator
from ..base import TargetHyperparameters
from .gradients import Cached, Hook, edit_row, upper_states
from .hypernetwork import Hypernetwork, normal_equation


class MALMENHyperparameters(TargetHyperparameters):
    """``step_size`` is the initial value of each layer's learnt step; ``meta_lr`` is the network's learning rate.

    ``records`` is the maximum number of cases to train on (None: all).
    """

    layers: Layers = (26, 27, 28, 29, 30, 31)
    step_size: float = Field(default=1e-6, gt=0)
    meta_lr: float = Field(default=1e-5, gt=0)
    rank: int = Field(default=1920, gt=0)
    blocks: int = Field(default=2, gt=0)
    locality_factor: float = Field(default=1.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    batch: int = Field(default=4, gt=0)
    iterations: int = Field(default=1000, gt=0)
    records: int | None = Field(default=None, gt=0)
    cached: Literal["target", "released"] = "target"
    targets: Literal["in-context", "alone"] = "in-context"


FORMAT = "clme-malmen"
_KEPT_BYTES = 4e9  # of constants below the edited layers
_CHECKPOINT_EVERY = 50


def trained(subject: Subject, hparams: MALMENHyperparameters, cases: Sequence[Case], seed: int) -> Hypernetwork:
    """The hypernetwork trained on ``cases``: from the cache, or trained now (from its last checkpoint if there is one)."""
    if not cases or len({case.dataset for case in cases}) != 1:
        raise StudyError("malmen learns from at least one case, and all cases must be of one dataset")
    if bare := [case for case in cases if not case.rephrased]:
        raise StudyError(f"malmen learns from rephrased prompts, and case {bare[0].case_id} has none")
    records = in_seeded_order(cases, "malmen", seed, cases[0].dataset)[: hparams.records]
    return Training(subject, hparams, records, seed).finish()


class Training:
    """One network's training run: ``iteration`` updates so far, with (generalization loss, locality loss) of each in ``log``;
    ``answers`` has the unedited subject's continuation of each neighbour's prompt."""

    def __init__(self, subject: Subject, hparams: MALMENHyperparameters, records: Sequence[Case], seed: int) -> None:
        self.subject, self.hparams, self.records, self.seed = subject, hparams, list(records), seed
        self.layers = hparams.layers
        dataset = records[0].dataset
        self.network = Hypernetwork(
            (subject.inner_size, subject.hidden_size),
            layers=len(self.layers),
            rank=hparams.rank,
            blocks=hparams.blocks,
            step_size=hparams.step_size,
            draw=generator(seed, subject.name, dataset, "malmen", "network"),
        ).to(subject.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=hparams.meta_lr)
        self.iteration = 0
        self.log: list[tuple[float, float]] = []
        identity = {
            "format": FORMAT,
            "version": 1,
            **subject.identity,
            "dataset": dataset,
            "seed": seed,
            # Networks trained before this hyperparameter existed have no entry for it.
            "values": hparams.model_dump(mode="json", exclude=None if hparams.end_of_target else {"end_of_target"}),
            "records": [case.sha256 for case in self.records],
        }
        self.artifact = Artifact.cached("malmen", f"{subject.name}-{dataset}", identity)
        self.answers: dict[str, str] = {}
        self._kept: dict[tuple[str, TokenRow], torch.Tensor] = {}
        self._kept_bytes = 0

    def finish(self) -> Hypernetwork:
        """Load the last checkpoint, do the missing iterations and store the result."""
        self._load()
        if self.iteration < self.hparams.iterations:
            with self.artifact.made_once():
                self._load()  # another process may have finished it
                self._train()
        return self.network.requires_grad_(False)

    def _train(self) -> None:
        last, size = self.hparams.iterations, min(self.hparams.batch, len(self.records))
        prompts = [prompt for case in self.records for prompt in case.unrelated]
        self.answers = dict(zip(prompts, answers_for(self.subject, prompts)))
        description = f"malmen: train on {len(self.records)} {self.records[0].dataset} cases"
        left = range(self.iteration, last)
        for iteration in (bar := tqdm(left, total=last, initial=self.iteration, desc=description, unit="step")):
            # every epoch has a new seeded order of records, whose incomplete last batch is dropped
            epoch, within = divmod(iteration, len(self.records) // size)
            order = in_seeded_order(self.records, "malmen", self.seed, "epoch", epoch)
            generalization, locality = self.step(order[within * size : (within + 1) * size])
            bar.set_postfix(generalization=f"{generalization:.2f}", locality=f"{locality:.3f}")
            if self.iteration == last or self.iteration % _CHECKPOINT_EVERY == 0:
                self._save()

    def step(self, batch: Sequence[Case]) -> tuple[float, float]:
        """One iteration; returns the two losses before its update."""
        hparams, network = self.hparams, self.network
        read_as = hparams.targets, hparams.end_of_target
        rows = [edit_row(self.subject, case.prompt, case.target, *read_as) for case in batch]
        cached = Cached(self._forward(rows), self.layers, hparams.cached)
        for layer in self.layers:
            network.observe(cached.keys[layer], cached.gradients[layer])

        coefficients = []
        for n, layer in enumerate(self.layers):
            with torch.enable_grad():
                changes = network(cached.keys[layer], cached.gradients[layer], n)
                coefficients.append(normal_equation(cached.keys[layer], changes, network.log_damping[n]))
        leaves = [tensor.detach().requires_grad_(True) for tensor in coefficients]

        def shift(layer: int, leaf: torch.Tensor) -> Hook:
            return lambda _module, given, output: (
                output + ((given[0].float() @ cached.keys[layer].T) @ leaf).to(output.dtype)
            )

        shifts = {layer: shift(layer, leaf) for layer, leaf in zip(self.layers, leaves)}
        rephrased = [edit_row(self.subject, case.rephrased[0], case.target, *read_as) for case in batch]
        unrelated = [self._answered(prompt) for case in batch for prompt in case.unrelated]
        generalization = self._losses(rephrased, shifts)
        locality = self._losses(unrelated, shifts, reference=True, factor=hparams.locality_factor)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(coefficients, [leaf.grad for leaf in leaves])
        torch.nn.utils.clip_grad_norm_(network.parameters(), hparams.clip)
        self.optimizer.step()
        self.iteration += 1
        self.log.append((generalization, locality))
        if not math.isfinite(generalization + locality):
            raise StudyError(
                f"malmen: the loss is not finite at iteration {self.iteration}; lower meta_lr or step_size"
            )
        return self.log[-1]

    def _losses(
        self, rows: Sequence[TokenRow], shifts: dict[int, Hook], reference: bool = False, factor: float = 1.0
    ) -> float:
        """Mean cross-entropy per label under the update, or with ``reference`` the divergence from the unedited subject; its
        gradient, times ``factor``, is accumulated in the update's coefficients."""
        labels = sum(len(row.target_ids) for row in rows)
        total = 0.0
        # at most a fifth of a group's columns is padding
        for indices in of_like_length([len(row.inputs) for row in rows], filled=0.8):
            group = [rows[n] for n in indices]
            forward = self._forward(group)
            with torch.enable_grad():
                states = upper_states(forward, shifts)
                if reference:
                    losses = divergences(self.subject, states, self._reference_states(group, forward))
                else:
                    losses = forward.label_losses(states)[0]
                loss = losses.sum() / labels
                (factor * loss).backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def _reference_states(self, rows: Sequence[TokenRow], forward: PartialForward) -> torch.Tensor:
        """Last-block states (N, d) of the unedited subject at the rows' label columns."""
        states = self._recall("reference", rows)
        if len(states) < len(set(rows)):
            states = dict(zip(rows, upper_states(forward, {}).split([len(row.target_ids) for row in rows])))
            self._keep("reference", states)
        return torch.cat([states[row] for row in rows])

    def _answered(self, prompt: str) -> TokenRow:
        """A neighbour's prompt with the unedited subject's continuation as its target."""
        before = encode(self.subject.tokenizer, prompt)
        joined = encode(self.subject.tokenizer, prompt + self.answers[prompt])
        # if an answer is empty or merges with the prompt's last token, the last column can still be compared
        first = min(len(before), len(joined) - 1)
        return TokenRow.of(joined[:first], joined[first:])

    @torch.no_grad()
    def _forward(self, rows: Sequence[TokenRow]) -> PartialForward:
        """The pass from the first edited layer on; the states below are computed once per sequence."""
        layer = self.layers[0]
        residuals = self._recall("residual", rows)
        if missing := [row for row in dict.fromkeys(rows) if row not in residuals]:
            read = PartialForward(self.subject, missing, layer, from_lookup=False).residual
            lengths = [row.first_label + len(row.target_ids) for row in missing]
            fresh = {row: of_row[:length].clone() for row, of_row, length in zip(missing, read, lengths)}
            residuals |= fresh
            self._keep("residual", fresh)
        return PartialForward(self.subject, rows, layer, from_lookup=False, residuals=[residuals[row] for row in rows])

    def _recall(self, what: str, rows: Sequence[TokenRow]) -> dict[TokenRow, torch.Tensor]:
        return {row: self._kept[what, row] for row in rows if (what, row) in self._kept}

    def _keep(self, what: str, constants: dict[TokenRow, torch.Tensor]) -> None:
        """Keep the rows' constants for later epochs, as long as there is room."""
        if self._kept_bytes < _KEPT_BYTES:
            self._kept.update({(what, row): tensor for row, tensor in constants.items()})
            self._kept_bytes += sum(tensor.numel() * tensor.element_size() for tensor in constants.values())

    def _save(self) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.iteration < self.hparams.iterations:
            for n, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{n}.{name}": tensor for name, tensor in state.items()}
        self.artifact.write(tensors, iteration=self.iteration, log=self.log)

    def _load(self) -> None:
        if not self.artifact.exists():
            return
        header, tensors = self.artifact.read()
        self.iteration, self.log = header["iteration"], [tuple(losses) for losses in header["log"]]
        self.network.load_state_dict({name: tensors[f"network.{name}"] for name in self.network.state_dict()})
        if self.iteration < self.hparams.iterations:
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name in (name for name in tensors if name.startswith("optimizer.")):
                _, n, what = name.split(".")
                state.setdefault(int(n), {})[what] = tensors[name]
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
