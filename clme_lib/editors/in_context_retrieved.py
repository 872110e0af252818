"""``in-context-retrieved``: a memory of cases; the nearest case is read before a prompt that is near enough to it (not in the paper).

Its keys are those of A-GRACE without contrastive learning, the mean over a prompt's tokens of the inputs of ``W_l``, and its radius is
selected for each dataset in the same way. The difference is what the memory returns: a text for the model to read, whereas a codebook
returns a vector that was learnt for one prompt.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ..datasets.paper import PAPER_DATASET_NAMES
from ..edits.base import Edit
from ..edits.prompts import RetrievedPromptEdit
from ..forward.prompt_keys import prompt_queries
from ..support.schema import Schema
from .base import Editor
from .grace import REACHES, PerDataset, radius_of
from .in_context import shown
from .operations import Sizes


class InContextRetrievedHyperparameters(Schema):
    """``layer`` is where keys are read; ``radii``, one per dataset, are in units of its key space."""

    layer: int = Field(default=27, ge=0)
    radii: PerDataset = dict.fromkeys(PAPER_DATASET_NAMES, 1.0)


class InContextRetrieved(Editor[InContextRetrievedHyperparameters]):
    """The nearest case's prompt and target, before prompts that are near it."""

    name, title, order = "in-context-retrieved", "in context (retrieved)", 11
    Hyperparameters = InContextRetrievedHyperparameters
    updates_weights = False
    reads_given_prompts = False
    selection_grid: ClassVar = [{"radii": dict.fromkeys(PAPER_DATASET_NAMES, radius)} for radius in REACHES]
    selects_reach = True

    def operations(self, prompt, target, steps):
        return [Sizes(self.subject).read(prompt, self.hparams.layer + 1)]

    def _edit_batch(self, cases, tokenized) -> list[Edit]:
        layer, device = self.hparams.layer, self.subject.device
        with torch.no_grad():
            keys = prompt_queries(self.subject, [case.prompt for case in cases], layer)["mean"]
        return [
            RetrievedPromptEdit(
                case.case_id,
                self.name,
                texts=(shown(case),),
                layer=layer,
                keys=keys[n : n + 1].clone(),
                radii=torch.full((1,), radius_of(self.hparams.radii, case), device=device),
            )
            for n, case in enumerate(cases)
        ]
