"""Training of A-GRACE's encoder (paper section V).

Every training case gives one positive pair (its prompt and its rephrased prompt) and five negative ones (its prompt and
each neighbour's). Adam minimises the contrastive loss; after each epoch the balanced accuracy of *within the radius* is
measured on cases that are not trained on, the best epoch is kept, and training ends after ``patience`` epochs without improvement.

These cases are a fifth of the training cases. The paper and the released program use the other half, i.e. the cases that
are edited afterwards; ``selection="edited"`` reproduces this.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from ..datasets.cases import Case, in_seeded_order
from ..datasets.paper import PAPER_DATASET_NAMES
from ..edits.codebooks import Query
from ..edits.encoder import Architecture, Encoder
from ..forward.prompt_keys import stored_queries
from ..subjects.subject import Subject
from ..support.artifact import Artifact
from ..support.errors import StudyError
from ..support.seeds import generator
from .grace import GRACEHyperparameters, PerDataset


class EncoderHyperparameters(GRACEHyperparameters):
    """GRACE's hyperparameters, and those of the encoder's training.

    ``margin`` is the contrastive loss's, per dataset, in units of the encoded space like ``radius``; ``selection`` says
    which cases choose the epoch, ``patience`` after how many epochs without improvement training ends.
    """

    architecture: Architecture = "released"
    margin: PerDataset = dict.fromkeys(PAPER_DATASET_NAMES, 1.0)
    encoder_lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    encoder_batch: int = Field(default=64, gt=0)
    epochs: int = Field(default=100, gt=0)
    patience: int = Field(default=5, gt=0)
    selection: Literal["training", "edited"] = "training"


FORMAT = "clme-encoder"
Cases = Sequence[Case]
HELD_OUT = 5  # one in this many training cases is held out to choose the epoch


@dataclass(frozen=True)
class Pairs:
    """Pairs of ``queries`` (P, d_f): both indices of each (N,), and whether it is a positive one (N,)."""

    queries: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    positive: torch.Tensor

    @torch.no_grad()
    def distances(self, encoder: Encoder | None) -> torch.Tensor:
        """The distance of every pair (N,), between encoded queries, or between the queries themselves."""
        encoded = self.queries if encoder is None else encoder(self.queries)
        return distances(encoded[self.first], encoded[self.second])


def make_pairs(subject: Subject, cases: Sequence[Case], layer: int, query: Query) -> Pairs:
    """The pairs of all cases, case by case, the positive one first; StudyError if a case lacks either kind."""
    if bare := [case for case in cases if not case.rephrased or not case.unrelated]:
        lacking = f"case {bare[0].case_id} of {bare[0].dataset}"
        raise StudyError(f"{lacking} needs a rephrased prompt and a neighbour to learn from")
    prompts: dict[str, int] = {}
    rows = []
    for case in cases:
        others = [(case.rephrased[0], True), *((prompt, False) for prompt in case.unrelated)]
        own = prompts.setdefault(case.prompt, len(prompts))
        rows += [(own, prompts.setdefault(prompt, len(prompts)), positive) for prompt, positive in others]
    first, second, positive = (torch.tensor(part, device=subject.device) for part in zip(*rows))
    queries = stored_queries(subject, list(prompts), layer, query).to(subject.device)
    return Pairs(queries, first, second, positive)


def train(
    training: Pairs, held_out: Pairs, hparams: EncoderHyperparameters, margin: float, seeds: tuple
) -> tuple[Encoder, list[dict]]:
    """The encoder of the best epoch, and every epoch's mean loss and balanced accuracy on the held-out pairs.

    ``seeds`` determine the initial weights, the order of the pairs and the dropout masks.
    """
    queries, device = training.queries, training.queries.device
    encoder = Encoder(queries.shape[1], hparams.architecture, generator(*seeds, "weights")).to(device)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=hparams.encoder_lr, weight_decay=hparams.weight_decay)
    draw = generator(*seeds, "training")
    log: list[dict] = []
    best_epoch, best, kept = 0, -1.0, encoder
    while len(log) < hparams.epochs and len(log) - best_epoch < hparams.patience:
        order = torch.randperm(len(training.first), generator=draw).to(device)
        total = 0.0
        for batch in order.split(hparams.encoder_batch):
            with torch.enable_grad():
                first, second = (encoder(queries[side[batch]], draw) for side in (training.first, training.second))
                loss = contrastive_loss(distances(first, second), training.positive[batch], margin)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        (accuracy,) = balanced_accuracy(held_out.distances(encoder), held_out.positive, hparams.radius)
        log.append({"loss": total / len(order), "accuracy": accuracy})
        if accuracy > best:
            best_epoch, best, kept = len(log), accuracy, copy.deepcopy(encoder)
    return kept.requires_grad_(False), log


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder, and the header of its file: what it was made for and how its training went."""

    encoder: Encoder
    header: dict


def trained_encoder(
    subject: Subject, hparams: EncoderHyperparameters, query: Query, cases: Cases, edited: Cases, seed: int
) -> TrainedEncoder:
    """The encoder learnt from ``cases``, from the user's cache or trained now; StudyError if they belong to several datasets, are too
    few, or have no margin."""
    if len({case.dataset for case in cases}) != 1:
        raise StudyError("an encoder learns from at least one case, and all cases must be of one dataset")
    dataset = cases[0].dataset
    if dataset not in hparams.margin:
        raise StudyError(f"margin: no value for {dataset!r}; given: {', '.join(hparams.margin) or 'none'}")
    margin = hparams.margin[dataset]
    training, held_out = _split(cases, edited, hparams.selection, seed)
    identity = {
        "format": FORMAT,
        "version": 1,
        **subject.identity,
        "dataset": dataset,
        "layer": hparams.layer,
        "query": query,
        "margin": margin,
        "seed": seed,
        "values": hparams.model_dump(
            mode="json", exclude={"steps", "lr", "end_of_target", "later_calls", "margin", "encoder_query"}
        ),
        "training": _digest(training),
        "held_out": _digest(held_out),
    }
    file = Artifact.cached("encoders", f"{subject.name}-{dataset}-{query}", identity)
    with nullcontext() if file.exists() else file.made_once():
        if not file.exists():
            learnt, checked = (make_pairs(subject, part, hparams.layer, query) for part in (training, held_out))
            encoder, log = train(learnt, checked, hparams, margin, (seed, subject.name, dataset, "a-grace", query))
            file.write(encoder.state_dict(), log=log, cases=len(training))
    header, tensors = file.read()
    return TrainedEncoder(Encoder.from_tensors(tensors, hparams.architecture).to(subject.device), header)


def _split(cases: Cases, edited: Cases, selection: str, seed: int) -> tuple[Cases, Cases]:
    """The cases to learn from, and the cases that choose the epoch."""
    if selection == "edited":
        if not edited:
            raise StudyError('selection="edited" uses the cases to be edited: pass them as fit(cases, edited=...)')
        return cases, edited
    if len(cases) < 2:
        raise StudyError("an encoder needs at least two training cases: one is held out to choose the epoch")
    order = in_seeded_order(cases, "held out", seed, cases[0].dataset)
    count = max(1, len(order) // HELD_OUT)
    return order[count:], order[:count]


def _digest(cases: Cases) -> str:
    return hashlib.sha256("".join(sorted(case.sha256 for case in cases)).encode()).hexdigest()


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``||a - b + 1e-6||`` along the last axis, as PyTorch's pairwise distance computes it."""
    return (first - second + 1e-6).norm(dim=-1)


def contrastive_loss(distance: torch.Tensor, positive: torch.Tensor, margin: float) -> torch.Tensor:
    """``y D^2 + (1 - y) max(m - D, 0)^2``, mean over pairs (paper section V)."""
    near, far = distance.square(), (margin - distance).clamp(min=0).square()
    return torch.where(positive, near, far).mean()


def balanced_accuracy(distance: torch.Tensor, positive: torch.Tensor, radius: float | Sequence[float]) -> list[float]:
    """Mean of the share of positive pairs within a radius and of negative pairs beyond it; StudyError if either kind is missing."""
    if not positive.any() or positive.all():
        raise StudyError("balanced accuracy needs both positive and negative pairs")
    radii = [radius] if isinstance(radius, int | float) else radius
    near, far = distance[positive], distance[~positive]
    return [0.5 * ((near <= bound).double().mean() + (~(far <= bound)).double().mean()).item() for bound in radii]
