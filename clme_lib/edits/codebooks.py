"""GRACE's and A-GRACE's memories: edits that replace a module's output where a query is near enough to a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..support.errors import StudyError
from .base import Change, Edit, Lookup
from .encoder import Encoder

if TYPE_CHECKING:
    from .base import Applied


@dataclass(frozen=True, eq=False)
class Codebook(Edit):
    """GRACE's memory: where a query is within a key's radius, the output of ``W_l`` is replaced by that key's value.

    Attributes:
        layer: the block l.
        keys: (n, d_f); values: (n, d); radii: (n,).

    The query is the input of ``W_l`` at the last real column of a row, in the prompt pass and in every decoding
    step; only that column's output is replaced ("replace_last").
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    radii: torch.Tensor
    kind: ClassVar[str] = "codebook"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

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

        def change(inputs, outputs, rows, applied):
            batch, column = torch.arange(len(inputs), device=device), applied.last_column(inputs.shape[1])
            return books.look_up(inputs[batch, column], outputs, column, rows, applied, applied.batch_rows)

        return change


class _Books:
    """Codebooks whose queries are of one kind, stacked."""

    def __init__(self, edits: Sequence[Codebook], layer: int, device: torch.device) -> None:
        size = max(len(edit.keys) for edit in edits)
        pad = torch.nn.functional.pad
        # missing entries of smaller codebooks lie infinitely far away
        self.keys = torch.stack([pad(e.keys, (0, 0, 0, size - len(e.keys)), value=torch.inf) for e in edits]).to(device)
        self.values = torch.stack([pad(e.values, (0, 0, 0, size - len(e.values))) for e in edits]).to(device)
        self.radii = torch.stack([pad(e.radii, (0, size - len(e.radii)), value=-1.0) for e in edits]).to(device)
        self.layer = layer

    def look_up(self, queries, outputs, column, books, applied: Applied, batch_rows: list[int]) -> torch.Tensor:
        """``outputs`` (B, T, d) with the nearest value of codebook ``books[b]`` at ``column[b]``, where its key is near enough."""
        batch = torch.arange(len(queries), device=queries.device)
        found = (self.keys[books] - queries.to(self.keys.dtype)[:, None]).norm(dim=-1)
        nearest = found.argmin(dim=-1)
        distance = found[batch, nearest]
        fired = distance <= self.radii[books, nearest]
        applied.lookups.append(Lookup(self.layer, applied.phase, batch_rows, distance, fired))
        changed = outputs.clone()
        old = outputs[batch, column]
        changed[batch, column] = torch.where(fired[:, None], self.values[books, nearest].to(outputs.dtype), old)
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
        return named | {f"{self.layer}.encoder.{name}": one for name, one in self.encoder.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> PromptCodebook:
        layer = int(next(iter(tensors)).split(".")[0])
        named = {name.removeprefix(f"{layer}."): one for name, one in tensors.items()}
        if architecture := fields.pop("architecture"):
            weights = {name.removeprefix("encoder."): one for name, one in named.items()}
            fields["encoder"] = Encoder.from_tensors(weights, architecture)
        keys = named["encoded-keys"] if architecture else named["keys"]
        return cls(**fields, layer=layer, keys=keys, values=named["values"], radii=named["radii"])

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        # edits of one encoder and kind of query are asked together; a fold's edits share their encoder's tensors
        groups: dict[tuple, list[int]] = {}
        for n, edit in enumerate(edits):
            groups.setdefault((edit.query, edit.encoder and edit.encoder.first.weight.data_ptr()), []).append(n)
        group_of, place = torch.empty(2, len(edits), dtype=torch.long, device=device)
        parts = []
        for g, members in enumerate(groups.values()):
            group_of[members], place[members] = g, torch.arange(len(members), device=device)
            encoder = edits[members[0]].encoder
            parts.append(
                (
                    edits[members[0]].query,
                    encoder.to(device) if encoder else None,
                    _Books([edits[n] for n in members], layer, device),
                )
            )

        def change(inputs, outputs, rows, applied):
            if applied.phase == "decode":
                return outputs
            column = applied.last_column(inputs.shape[1]).to(device).expand(len(inputs))
            mask = applied.real_columns(inputs)
            for g, (query, encoder, books) in enumerate(parts):
                mine = (group_of[rows] == g).nonzero()[:, 0]
                if not len(mine):
                    continue
                asked = inputs[mine, column[mine]].float() if query == "last" else masked_mean(inputs[mine], mask[mine])
                asked = asked if encoder is None else encoder(asked)
                if not asked.isfinite().all():
                    raise StudyError(
                        f"a query of layer {layer} is not finite: use float32, or look at the prompt's mask"
                    )
                batch_rows = [applied.batch_rows[n] for n in mine.tolist()]
                changed = books.look_up(asked, outputs[mine], column[mine], place[rows[mine]], applied, batch_rows)
                outputs = outputs.index_copy(0, mine, changed)
            return outputs

        return change


Query = Literal["mean", "last"]


def masked_mean(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, d_f) over the columns where (B, T) ``mask`` is true, in float32: (B, d_f)."""
    weights = mask.to(torch.float32)
    # zero weight does not hide a NaN or an infinity that a padding column may hold
    summed = torch.where(mask.bool()[..., None], keys.float(), 0.0).sum(dim=1)
    return summed / weights.sum(dim=1, keepdim=True)
