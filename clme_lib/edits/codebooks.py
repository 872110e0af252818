"""Memories: edits that act on a module's output where a query is near enough to a key, as GRACE's, A-GRACE's and NeuralDB's do.

GRACE's codebook grows by its authors' rule (Hartvigsen et al. 2023). If a new entry's ball meets the nearest old entry's and both have the same
target, the old radius grows to reach the new key, and no entry is added; if the targets differ, both radii become half of the distance. In every
memory a new entry replaces an old one with the same key, so the later of two edits of one prompt counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from ..support.errors import StudyError
from .base import Change, Edit, Lookup, PassState
from .encoder import Encoder

Query = Literal["mean", "last"]
_ENTRIES = ("keys", "values", "radii")
_SAME_KEY = (
    1e-4  # relative distance between keys that is only rounding; keys of different prompts are much further apart
)


@dataclass(frozen=True, eq=False)
class Codebook(Edit):
    """GRACE's memory: where a query is within a key's radius, the output of ``W_l`` is replaced by that key's value.

    The query is the input of ``W_l`` at the last real column of a row, in the prompt pass and in every decoding
    step; only that column's output is replaced ("replace_last").
    """

    layer: int
    keys: torch.Tensor  #: (n, d_f)
    values: torch.Tensor  #: (n, d)
    radii: torch.Tensor  #: (n,)
    targets: torch.Tensor | None = None  #: (n,) int64, equal for equal targets; None if these are not known
    kind: ClassVar[str] = "codebook"
    every_token: ClassVar[bool] = True  #: whether generated tokens are looked up too, not only the prompt

    @property
    def asked_with(self) -> Query:
        """Which of a prompt's queries is looked up."""
        return "last"

    @property
    def lookups(self):
        return (self,)

    def joined(self, later):
        if type(later) is not type(self) or later.layer != self.layer or not self._asked_like(later):
            return None
        if self.targets is None or later.targets is None:
            return replace(later, targets=None, **joined_entries(self, later, _ENTRIES))
        whole = self
        for entry in range(len(later.keys)):
            whole = whole._with_entry(replace(later, **later._rows(slice(entry, entry + 1))))
        return whole

    def _rows(self, rows: Any) -> dict[str, Any]:
        """The contents of some of the entries."""
        return {name: getattr(self, name)[rows] for name in (*_ENTRIES, "targets")}

    def _with_entry(self, new: Codebook) -> Codebook:
        """This memory with the one entry of ``new``, by the rule above."""
        (distance,), (nearest,), _ = nearest_entry(new.keys, self.keys, self.radii)
        if _replaced(self.keys, new.keys).any() or distance > self.radii[nearest] + new.radii[0]:
            return replace(new, **joined_entries(self, new, (*_ENTRIES, "targets")))
        same = bool(self.targets[nearest] == new.targets[0])  # type: ignore[index]
        radii = self.radii.clone()
        # a key is computed anew, in another batch, when it is looked up: its rounding must not put it outside
        reaching = distance + _SAME_KEY * new.keys[0].norm()
        radii[nearest] = torch.maximum(radii[nearest], reaching) if same else distance / 2
        old = replace(self, radii=radii)
        added = replace(new, **new._rows(slice(0))) if same else replace(new, radii=distance[None] / 2)
        return replace(new, **joined_entries(old, added, (*_ENTRIES, "targets")))

    def _asked_like(self, later: Codebook) -> bool:
        """Whether two codebooks of one class and layer are consulted with the same query at the same tokens."""
        return True

    def nearest(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each query (Q, d_f), the distance to its nearest key (Q,), and whether it is within that key's radius (Q,)."""
        distance, _, fired = nearest_entry(queries, self.keys.to(queries), self.radii.to(queries))
        return distance, fired

    def asked(self, inputs: torch.Tensor, state: PassState) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Rows and columns (N,) of ``inputs`` (B, T, d_f) where it is consulted in a pass, and the queries (N, d_f or encoded)."""
        where = state.next_token_columns(inputs)
        return where, inputs[where]

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{self.layer}.{name}": getattr(self, name) for name in _ENTRIES}
        return named if self.targets is None else named | {f"{self.layer}.targets": self.targets}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        layer = int(next(iter(tensors)).split(".")[0])
        entries: Any = {name: tensors.get(f"{layer}.{name}") for name in (*_ENTRIES, "targets")}
        return cls(**fields, layer=layer, **entries)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        # Missing entries of smaller codebooks lie infinitely far away.
        keys, values, radii = (
            pad_sequence([getattr(edit, name) for edit in edits], True, missing).to(device)
            for name, missing in zip(_ENTRIES, (torch.inf, 0.0, -1.0))
        )

        def change(inputs, outputs, rows, state):
            if state.phase == "decode" and not cls.every_token:
                return outputs
            where, queries = edits[0].asked(inputs, state)
            books = rows[where[0]]
            queries = queries.to(keys.dtype)
            if len(keys) == 1:  # a codebook that all rows share is not copied for each of them: it may be large
                distances = _distances(queries, keys[0])
            else:
                distances = (keys[books] - queries[:, None]).norm(dim=-1)
            nearest = distances.argmin(dim=-1)
            distance = distances[torch.arange(len(queries), device=device), nearest]
            fired = distance <= radii[books, nearest]
            if state.prompt_end is None:  # lookups are recorded for generated texts, not for passes over given texts
                state.lookups.append(Lookup(state.phase, list(state.batch_rows), distance, fired))
            replaced = values[books, nearest].to(outputs.dtype)
            return outputs.index_put(where, torch.where(fired[:, None], replaced, outputs[where]))

        return change


@dataclass(frozen=True, eq=False)
class PromptCodebook(Codebook):
    """A-GRACE's memory: consulted once per text, in the prompt pass, with a query that represents the whole prompt.

    As in GRACE, the last prompt column's output is replaced. With ``first_call_only``, a defect of the released program,
    only the first generation after an edit (of the edit and rephrased prompts) consults the codebook; all later ones are the
    unedited subject's.
    """

    query: Query = "mean"  #: mean of the inputs of ``W_l`` over the prompt's tokens, or the ``last`` token's input
    encoder: Encoder | None = None  #: encodes keys and queries; the keys are then (n, 256)
    first_call_only: bool = False
    kind: ClassVar[str] = "prompt-codebook"
    every_token: ClassVar[bool] = False

    @property
    def asked_with(self):
        return self.query

    @property
    def stacked_with(self):
        # a fold's edits share their encoder's tensors
        return self.kind, self.query, self.encoder and self.encoder.first.weight.data_ptr()

    def _asked_like(self, later):
        if (self.query, self.first_call_only) != (later.query, later.first_call_only):
            return False
        if self.encoder is None or later.encoder is None:
            return self.encoder is later.encoder
        return self.encoder.equals(later.encoder)

    def _encoded(self, queries: torch.Tensor) -> torch.Tensor:
        return queries if self.encoder is None else self.encoder.to(queries.device)(queries)

    def nearest(self, queries):
        return super().nearest(self._encoded(queries))

    def asked(self, inputs, state):
        where = state.last_columns(inputs)
        mean = self.query == "mean"
        queries = self._encoded(masked_mean(inputs, state.prompt_columns(inputs)) if mean else inputs[where].float())
        if not queries.isfinite().all():
            raise StudyError(f"a query of layer {self.layer} is not finite: use float32, or check the prompt's mask")
        return where, queries

    def settings(self) -> dict:
        architecture = self.encoder.architecture if self.encoder else None
        return {"query": self.query, "first_call_only": self.first_call_only, "architecture": architecture}

    def tensors(self) -> dict[str, torch.Tensor]:
        named = super().tensors()
        if self.encoder is None:
            return named
        named[f"{self.layer}.encoded-keys"] = named.pop(f"{self.layer}.keys")
        return named | {f"{self.layer}.encoder.{name}": part for name, part in self.encoder.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        if architecture := fields.pop("architecture"):
            weights = {name.partition(".encoder.")[2]: tensor for name, tensor in tensors.items()}
            fields["encoder"] = Encoder.from_tensors(weights, architecture)
        tensors = {name.replace("encoded-keys", "keys"): tensor for name, tensor in tensors.items()}
        return super().from_tensors(tensors, **fields)


@dataclass(frozen=True, eq=False)
class AdditiveCodebook(Edit):
    """NeuralDB's memory: at every token whose key is within a cosine of an entry's key, the nearest entry's residual is added to the output of ``W_l``."""

    layer: int
    keys: torch.Tensor  #: (n, d_f)
    residuals: torch.Tensor  #: (n, d)
    gates: torch.Tensor  #: (n,) cosines
    kind: ClassVar[str] = "additive-codebook"

    def added(self, queries: torch.Tensor) -> torch.Tensor:
        """What it adds to the output (Q, d) where the input is one of ``queries`` (Q, d_f)."""
        cosines = cosine_similarity(queries[:, None], self.keys.to(queries), dim=-1)
        cosine, nearest = cosines.max(dim=-1)
        fired = cosine > self.gates.to(queries)[nearest]
        return torch.where(fired[:, None], self.residuals.to(queries)[nearest], 0.0)

    def joined(self, later):
        if type(later) is not AdditiveCodebook or later.layer != self.layer:
            return None
        return replace(later, **joined_entries(self, later, ("keys", "residuals", "gates")))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.layer}.{name}": getattr(self, name) for name in ("keys", "residuals", "gates")}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        layer = int(next(iter(tensors)).split(".")[0])
        return cls(**fields, layer=layer, **{name.split(".")[1]: tensor for name, tensor in tensors.items()})

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        # Missing entries of smaller memories have a gate that no cosine passes.
        keys, residuals, gates = (
            pad_sequence([getattr(edit, name) for edit in edits], True, missing).to(device)
            for name, missing in zip(("keys", "residuals", "gates"), (0.0, 0.0, 2.0))
        )
        directions = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)

        def change(inputs, outputs, rows, state):
            queries = inputs.to(directions.dtype)
            queries = queries / queries.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            if len(directions) == 1:  # as for a codebook
                cosines = queries @ directions[0].T
            else:
                cosines = torch.einsum("btf,bnf->btn", queries, directions[rows])
            # padding is never an entry, however near it is
            cosine, nearest = torch.where(gates[rows][:, None] > 1, -2.0, cosines).max(dim=-1)
            fired = cosine > gates[rows].gather(1, nearest)
            if state.prompt_end is None:
                where = state.last_columns(inputs)
                distances = (1 - cosine[where]).clamp(min=0)  # Rounding may make a cosine larger than 1.
                state.lookups.append(Lookup(state.phase, list(state.batch_rows), distances, fired[where]))
            added = residuals[rows[:, None], nearest].to(outputs.dtype)
            return torch.where(fired[..., None], outputs + added, outputs)

        return change


def _replaced(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(n,) which of the ``old`` keys (n, d) are also among the ``new`` ones (m, d)."""
    distances = _distances(old, new.to(old))
    return (distances <= _SAME_KEY * old.norm(dim=-1, keepdim=True)).any(dim=-1)


def joined_entries(old: Any, new: Any, names: Sequence[str]) -> dict[str, Any]:
    """The joined contents of two memories by name, each a tensor or a tuple with a value per key: the old entries whose key is not among
    the new ones, and then the new entries."""
    kept = ~_replaced(old.keys, new.keys)
    entries: dict[str, Any] = {}
    for name in names:
        before, added = getattr(old, name), getattr(new, name)
        if isinstance(added, tuple):
            entries[name] = (*(value for value, stays in zip(before, kept.tolist()) if stays), *added)
        else:
            entries[name] = torch.cat([before[kept], added])
    return entries


def _distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(Q, n) of queries (Q, d) to keys (n, d), as exact for near keys as for others."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_entry(
    queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each query (Q, d), the nearest of ``keys`` (n, d): the distance, the key's index, and whether it is within the key's radius (n,)."""
    distance, nearest = _distances(queries, keys).min(dim=-1)
    return distance, nearest, distance <= radii[nearest]


def masked_mean(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, d_f) over the columns where (B, T) ``mask`` is true, in float32: (B, d_f)."""
    # Multiplying by zero would not remove a NaN or infinity from a padding column.
    summed = torch.where(mask.bool()[..., None], keys.float(), 0.0).sum(dim=1)
    return summed / mask.sum(dim=1, keepdim=True, dtype=torch.float32)
