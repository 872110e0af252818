"""Edits that do not change the model but put texts before its prompts.

They act where a prompt is given as text: when texts are generated, or their likelihood is computed
(:func:`~clme_lib.evaluation.generation.as_read`). In a pass over given tokens there is nothing that they could change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Edit
from .codebooks import joined_entries, nearest_entry


@dataclass(frozen=True)
class Reading:
    """The text read before a prompt; if keys were looked up, also the distance to the nearest key and whether the prompt is within its radius."""

    before: str
    distance: float | None = None
    fired: bool | None = None


@dataclass(frozen=True, eq=False)
class PromptEdit(Edit):
    """The model reads ``texts``, in their order, before every prompt."""

    texts: tuple[str, ...]
    kind: ClassVar[str] = "prompt"
    changes_prompts: ClassVar[bool] = True

    @property
    def asked_at(self) -> int | None:
        """The layer whose mean key of a prompt decides which text is read before it; None if no key is looked up."""
        return None

    def readings(self, queries: torch.Tensor) -> list[Reading]:
        """What is read before each of P prompts whose mean keys are ``queries`` (P, d_f; P rows of any width if no key is looked up)."""
        return [Reading("".join(self.texts))] * len(queries)

    def joined(self, later):
        return replace(later, texts=self.texts + later.texts) if type(later) is PromptEdit else None

    def settings(self) -> dict:
        return {"texts": list(self.texts)}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        return cls(**{**fields, "texts": tuple(fields["texts"])})


@dataclass(frozen=True, eq=False)
class RetrievedPromptEdit(PromptEdit):
    """The model reads the text whose key is nearest to the prompt's, if the prompt is within that key's radius."""

    layer: int
    keys: torch.Tensor  # (n, d_f), one of each text
    radii: torch.Tensor  # (n,)
    kind: ClassVar[str] = "retrieved-prompt"

    @property
    def asked_at(self):
        return self.layer

    def readings(self, queries):
        nearest = nearest_entry(queries.to(self.keys), self.keys, self.radii)
        return [
            Reading(self.texts[entry] if fired else "", distance, fired)
            for distance, entry, fired in zip(*(part.tolist() for part in nearest))
        ]

    def joined(self, later):
        if type(later) is not type(self) or later.layer != self.layer:
            return None
        return replace(later, **joined_entries(self, later, ("texts", "keys", "radii")))

    def tensors(self):
        return {f"{self.layer}.keys": self.keys, f"{self.layer}.radii": self.radii}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        layer = int(next(iter(tensors)).split(".")[0])
        keys, radii = tensors[f"{layer}.keys"], tensors[f"{layer}.radii"]
        return super().from_tensors({}, **fields, layer=layer, keys=keys, radii=radii)
