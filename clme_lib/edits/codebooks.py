"""GRACE's and A-GRACE's memories: edits that replace a module's output where a query is near enough to a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from ..support.errors import StudyError
from .base import Change, Edit, Lookup, PassState
from .encoder import Encoder

Query = Literal["mean", "last"]


@dataclass(frozen=True, eq=False)
class Codebook(Edit):
    """GRACE's memory: where a query is within a key's radius, the output of ``W_l`` is replaced by that key's value.

    Attributes:
        layer: the block l.
        keys: (n, d_f); values: (n, d); radii: (n,).
        every_token: whether tokens that the model has written are looked up too, not the prompt alone.

    The query is the input of ``W_l`` at the last real column of a row, in the prompt pass and in every decoding
    step; only that column's output is replaced ("replace_last").
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    radii: torch.Tensor
    kind: ClassVar[str] = "codebook"
    every_token: ClassVar[bool] = True

    @property
    def asked_with(self) -> Query:
        """Which query of a prompt is looked up."""
        return "last"

    @property
    def lookups(self):
        return (self,)

    def joined(self, later):
        if type(later) is not type(self) or later.layer != self.layer or not self._asked_like(later):
            return None
        entries: Any = {
            name: torch.cat([getattr(self, name), getattr(later, name)]) for name in ("keys", "values", "radii")
        }
        return replace(later, **entries)

    def _asked_like(self, later: Codebook) -> bool:
        """Whether two codebooks of one class and layer are asked with the same query at the same times."""
        return True

    def nearest(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance (Q,) of each query (Q, d_f) to its nearest key, and whether it is within that key's radius (Q,)."""
        distances = torch.cdist(queries, self.keys.to(queries), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(dim=-1)
        distance = distances.gather(-1, nearest[:, None])[:, 0]
        return distance, distance <= self.radii.to(queries)[nearest]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.layer}.{name}": getattr(self, name) for name in ("keys", "values", "radii")}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> Codebook:
        layer = int(next(iter(tensors)).split(".")[0])
        named = {name: tensors[f"{layer}.{name}"] for name in ("keys", "values", "radii")}
        return cls(**fields, layer=layer, **named)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        books = _Books(edits, layer, device)

        def change(inputs, outputs, rows, state):
            where = state.next_token_columns(inputs)
            return books.look_up(inputs[where], outputs, where, rows, state)

        return change


class _Books:
    """Codebooks whose queries are of one kind, stacked."""

    def __init__(self, edits: Sequence[Codebook], layer: int, device: torch.device) -> None:
        size = max(len(edit.keys) for edit in edits)
        # Missing entries of smaller codebooks lie infinitely far away.
        self.keys = torch.stack([pad(e.keys, (0, 0, 0, size - len(e.keys)), value=torch.inf) for e in edits]).to(device)
        self.values = torch.stack([pad(e.values, (0, 0, 0, size - len(e.values))) for e in edits]).to(device)
        self.radii = torch.stack([pad(e.radii, (0, size - len(e.radii)), value=-1.0) for e in edits]).to(device)
        self.layer = layer

    def look_up(self, queries, outputs, where, books, state: PassState, batch_rows: Sequence[int] | None = None):
        """``outputs`` (B, T, d) with the nearest value of a codebook at each of ``where``, if its key is near enough.

        Args:
            queries: (N, d_f) or encoded, one for each of ``where``, N rows and N columns of ``outputs``.
            books: (B,) the codebook of each row.
            batch_rows: the rows' numbers in the whole batch, where they are not the state's.
        """
        row, column = where
        books = books[row]
        distances = (self.keys[books] - queries.to(self.keys.dtype)[:, None]).norm(dim=-1)
        nearest = distances.argmin(dim=-1)
        distance = distances[torch.arange(len(queries), device=queries.device), nearest]
        fired = distance <= self.radii[books, nearest]
        batch_rows = state.batch_rows if batch_rows is None else batch_rows
        if state.prompt_end is None:  # lookups are of generated texts, not of passes over given ones
            state.lookups.append(Lookup(self.layer, state.phase, list(batch_rows), distance, fired))
        changed = outputs.clone()
        replaced = self.values[books, nearest].to(outputs.dtype)
        changed[row, column] = torch.where(fired[:, None], replaced, outputs[row, column])
        return changed


@dataclass(frozen=True, eq=False)
class PromptCodebook(Codebook):
    """A-GRACE's memory: consulted once a text, in the prompt pass, with a query that stands for the whole prompt.

    Attributes:
        query: ``mean`` of the inputs of ``W_l`` over the prompt's real tokens, or the ``last`` token's.
        encoder: what keys and queries went through; None compares them as they are.
        first_call_only: repeat the released program's defect: only the first generation after an edit (of the edit and
            rephrased prompts) consults the codebook, all later ones are the unedited subject's.

    With an encoder the keys have shape (n, 256). What is replaced is the last prompt column's output, as in GRACE.
    """

    query: Query = "mean"
    encoder: Encoder | None = None
    first_call_only: bool = False
    kind: ClassVar[str] = "prompt-codebook"
    every_token: ClassVar[bool] = False

    @property
    def asked_with(self):
        return self.query

    def _asked_like(self, later):
        return (
            (self.query, self.first_call_only) == (later.query, later.first_call_only)
            and (self.encoder is None) == (later.encoder is None)
            and (self.encoder is None or self.encoder.equals(later.encoder))
        )

    def nearest(self, queries):
        return super().nearest(queries if self.encoder is None else self.encoder.to(queries.device)(queries))

    def settings(self) -> dict:
        architecture = self.encoder.architecture if self.encoder else None
        return {"query": self.query, "first_call_only": self.first_call_only, "architecture": architecture}

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.encoder is None:
            return super().tensors()
        named = {f"{self.layer}.{name}": getattr(self, name) for name in ("values", "radii")}
        named[f"{self.layer}.encoded-keys"] = self.keys
        return named | {f"{self.layer}.encoder.{name}": part for name, part in self.encoder.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> PromptCodebook:
        layer = int(next(iter(tensors)).split(".")[0])
        named = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items()}
        if architecture := fields.pop("architecture"):
            weights = {name.removeprefix("encoder."): tensor for name, tensor in named.items()}
            fields["encoder"] = Encoder.from_tensors(weights, architecture)
        keys = named["encoded-keys"] if architecture else named["keys"]
        return cls(**fields, layer=layer, keys=keys, values=named["values"], radii=named["radii"])

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        # Edits with the same encoder and kind of query are asked together; a fold's edits share their encoder's tensors.
        groups: dict[tuple, list[int]] = {}
        for n, edit in enumerate(edits):
            groups.setdefault((edit.query, edit.encoder and edit.encoder.first.weight.data_ptr()), []).append(n)
        group_of, book_of = torch.empty(2, len(edits), dtype=torch.long, device=device)
        parts = []
        for g, members in enumerate(groups.values()):
            group_of[members], book_of[members] = g, torch.arange(len(members), device=device)
            first, books = edits[members[0]], _Books([edits[n] for n in members], layer, device)
            parts.append((first.query, first.encoder.to(device) if first.encoder else None, books))

        def change(inputs, outputs, rows, state):
            if state.phase == "decode":
                return outputs
            column = state.last_column(inputs.shape[1]).to(device).expand(len(inputs))
            mask = state.prompt_columns(inputs)
            for g, (query, encoder, books) in enumerate(parts):
                own = (group_of[rows] == g).nonzero()[:, 0]
                if not len(own):
                    continue
                asked = inputs[own, column[own]].float() if query == "last" else masked_mean(inputs[own], mask[own])
                asked = asked if encoder is None else encoder(asked)
                if not asked.isfinite().all():
                    raise StudyError(
                        f"a query of layer {layer} is not finite: use float32, or look at the prompt's mask"
                    )
                batch_rows = [state.batch_rows[n] for n in own.tolist()]
                where = torch.arange(len(own), device=device), column[own]
                changed = books.look_up(asked, outputs[own], where, book_of[rows[own]], state, batch_rows)
                outputs = outputs.index_copy(0, own, changed)
            return outputs

        return change


def masked_mean(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, d_f) over the columns where (B, T) ``mask`` is true, in float32: (B, d_f)."""
    weights = mask.to(torch.float32)
    # Zero weight does not hide a NaN or an infinity that a padding column may hold.
    summed = torch.where(mask.bool()[..., None], keys.float(), 0.0).sum(dim=1)
    return summed / weights.sum(dim=1, keepdim=True)
