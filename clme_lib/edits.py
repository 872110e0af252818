"""An edit is a value: plain tensors that say which module's output changes and how (design idea 1).

Nothing here modifies a model. :func:`applying` registers forward hooks on ``down_proj`` modules and removes them
again, so the base weights are bit-identical before, during and after, whatever happens inside the block.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from .encoder import Encoder
from .errors import StudyError
from .queries import Query, masked_mean

if TYPE_CHECKING:
    from .subjects import Subject


@dataclass(frozen=True)
class EditLog:
    """How an edit came about.

    Attributes:
        steps: optimiser updates made.
        losses: the loss before each update, in evaluation order; empty for editors without one.
        seconds: wall-clock seconds of the batch the edit was made in, divided by its size.
        batch: how many cases that batch held.
        peak_memory_mib: high-water mark while editing (allocator on CUDA, resident set on CPU), in MiB.
        initial_sha256: hash of a randomly drawn start value, empty when there is none.
    """

    steps: int = 0
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    batch: int = 1
    peak_memory_mib: float = 0.0
    initial_sha256: str = ""


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """What one editor made of one case. Subclasses hold the tensors.

    ``kind`` names the subclass in saved files.
    """

    case_id: int
    editor: str
    log: EditLog = field(default_factory=EditLog, kw_only=True)
    kind: ClassVar[str] = ""

    @property
    def first_call_only(self) -> bool:
        """Whether only the first generation after an edit is the edited model's (a defect of the released A-GRACE)."""
        return False

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Blocks whose ``down_proj`` output changes."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The edit's tensors by name, as they are saved."""

    def settings(self) -> dict:
        """What else a saved edit has to say, as JSON values."""
        return {}

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], **fields) -> Edit:
        """Rebuild the edit from what :meth:`tensors` and :meth:`settings` gave."""

    @classmethod
    @abstractmethod
    def stack(cls, edits: Sequence[Edit], layer: int, device: torch.device) -> Change:
        """A function that applies ``edits[rows[b]]`` to row b at ``layer``: (inputs, outputs, rows, applied) -> outputs."""


@dataclass(frozen=True, eq=False)
class Unedited(Edit):
    """The model as it is: the baseline row of every table."""

    kind: ClassVar[str] = "unedited"

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> Unedited:
        return cls(**fields)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        return lambda inputs, outputs, rows, applied: outputs


@dataclass(frozen=True, eq=False)
class LowRankUpdate(Edit):
    """``W_l <- W_l + left @ right`` at each layer.

    Attributes:
        factors: layer -> (left (d, r), right (r, d_f)).
    """

    factors: dict[int, tuple[torch.Tensor, torch.Tensor]]
    kind: ClassVar[str] = "low-rank"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.factors))

    def delta(self, layer: int) -> torch.Tensor:
        """The update of ``W_layer`` written out, (d, d_f)."""
        left, right = self.factors[layer]
        return left @ right

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {}
        for layer, (left, right) in self.factors.items():
            named[f"{layer}.left"], named[f"{layer}.right"] = left, right
        return named

    @classmethod
    def from_tensors(cls, tensors, **fields) -> LowRankUpdate:
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        return cls(**fields, factors={n: (tensors[f"{n}.left"], tensors[f"{n}.right"]) for n in layers})

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        pairs = [edit.factors[layer] for edit in edits]
        rank = max(left.shape[1] for left, _ in pairs)
        # smaller ranks are padded with zeros, which add nothing
        lefts = torch.stack([torch.nn.functional.pad(a, (0, rank - a.shape[1])) for a, _ in pairs]).to(device)
        rights = torch.stack([torch.nn.functional.pad(b, (0, 0, 0, rank - b.shape[0])) for _, b in pairs]).to(device)

        def change(inputs, outputs, rows, applied):
            inner = torch.einsum("btf,brf->btr", inputs.to(rights.dtype), rights[rows])
            return outputs + torch.einsum("btr,bdr->btd", inner, lefts[rows]).to(outputs.dtype)

        return change


@dataclass(frozen=True, eq=False)
class DenseUpdate(Edit):
    """``W_l <- W_l + delta`` at one layer; ``delta`` has shape (d, d_f) and is kept in float32.

    Merging it into 16-bit weights would distort it: most of its entries are below half a unit in the last place.
    """

    layer: int
    delta: torch.Tensor
    kind: ClassVar[str] = "dense"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.layer}.delta": self.delta}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> DenseUpdate:
        ((name, delta),) = tensors.items()
        return cls(**fields, layer=int(name.split(".")[0]), delta=delta)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        deltas = [edit.delta.to(device) for edit in edits]

        def change(inputs, outputs, rows, applied):
            changed = outputs.clone()
            # one product an edit, not a row: copying a (d, d_f) matrix for every row would dwarf the product itself
            for index in rows.unique().tolist():
                mine = rows == index
                changed[mine] += (inputs[mine].to(deltas[index].dtype) @ deltas[index].T).to(outputs.dtype)
            return changed

        return change


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


Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Applied"], torch.Tensor]
KINDS: dict[str, type[Edit]] = {
    kind.kind: kind for kind in (Unedited, LowRankUpdate, DenseUpdate, Codebook, PromptCodebook)
}


@dataclass(frozen=True)
class Lookup:
    """One consultation of codebooks: the phase, which rows of the batch asked, and for each of them the distance to the
    nearest key and whether it fired."""

    layer: int
    phase: str
    rows: list[int]
    distances: torch.Tensor
    fired: torch.Tensor


class Applied:
    """What the hooks know about the forward pass in progress, and what they saw.

    Attributes:
        phase: ``prefill`` for a pass over a prompt, ``decode`` for one that continues a cache.
        batch_rows: the rows of the batch that the change in progress acts on.
        lookups: every codebook consultation, in order.
    """

    def __init__(self, edits: Sequence[Edit], rows: Sequence[int] | None) -> None:
        self.edits = list(edits)
        self.rows = None if rows is None else list(rows)
        self.phase = "prefill"
        self.mask: torch.Tensor | None = None
        self.batch_rows: list[int] = []
        self.lookups: list[Lookup] = []

    def begin(self, kwargs: dict) -> None:
        """Note phase and attention mask of the pass that starts."""
        past = kwargs.get("past_key_values")
        self.phase = "decode" if past is not None and past.get_seq_length() > 0 else "prefill"
        mask = kwargs.get("attention_mask")
        self.mask = mask if mask is not None and mask.dim() == 2 else None

    def rows_of(self, batch: int) -> list[int]:
        """Which edit each of ``batch`` rows gets (-1: none)."""
        if self.rows is not None:
            if len(self.rows) != batch:
                raise StudyError(f"rows= names {len(self.rows)} rows but the batch has {batch}")
            return self.rows
        if len(self.edits) == 1:
            return [0] * batch
        if len(self.edits) != batch:
            raise StudyError(
                f"{len(self.edits)} edits meet a batch of {batch} rows: pass one edit, one per row, or rows=[...]"
            )
        return list(range(batch))

    def real_columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T) True where ``inputs`` (B, T, .) of this pass are of real tokens, not of padding."""
        if self.mask is None:
            return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return self.mask[:, -inputs.shape[1] :].bool()

    def last_column(self, width: int) -> torch.Tensor:
        """(B,) the last real column of each row within the ``width`` columns of this forward pass."""
        batch = self.mask.shape[0] if self.mask is not None else 1
        if self.mask is None or width == 1:
            return torch.full((batch,), width - 1, device=self.mask.device if self.mask is not None else None)
        mask = self.mask[:, -width:].long()
        return (mask * torch.arange(1, width + 1, device=mask.device)).argmax(dim=-1)


@contextlib.contextmanager
def applying(subject: Subject, edits: Sequence[Edit], rows: Sequence[int] | None = None) -> Iterator[Applied]:
    """Run ``subject`` as edited: edit ``rows[b]`` acts on row b of every batch inside the block.

    Args:
        edits: one edit (acts on all rows), or several.
        rows: index into ``edits`` for each row, -1 for an unedited row. Default: one edit for all rows, or one per row.

    Yields:
        Applied: collects codebook lookups.

    Raises:
        StudyError: an edit does not fit the subject, or rows and batch differ in length.
    """
    applied = Applied(edits, rows)
    if rows is not None and any(not -1 <= row < len(applied.edits) for row in rows):
        raise StudyError(f"rows= must name edits 0 to {len(applied.edits) - 1} or -1 for none")
    for edit in applied.edits:
        check_fits(edit, subject)
    handles = [
        subject.decoder.register_forward_pre_hook(lambda _m, _args, kwargs: applied.begin(kwargs), with_kwargs=True)
    ]
    try:
        for layer in sorted({layer for edit in applied.edits for layer in edit.layers}):
            handles.append(subject.down_proj(layer).register_forward_hook(_layer_hook(applied, layer, subject.device)))
        yield applied
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(applied: Applied, layer: int, device: torch.device) -> Callable:
    changes = []
    for kind in KINDS.values():
        members = [n for n, edit in enumerate(applied.edits) if type(edit) is kind and layer in edit.layers]
        if members:
            changes.append((members, kind.stack([applied.edits[n] for n in members], layer, device)))

    def hook(_module, args, output):
        inputs = args[0]
        owners = applied.rows_of(len(inputs))
        for members, change in changes:
            place = {edit: n for n, edit in enumerate(members)}
            mine = [row for row, edit in enumerate(owners) if edit in place]
            applied.batch_rows = mine
            stacked = torch.tensor([place[owners[row]] for row in mine], device=device, dtype=torch.long)
            if len(mine) == len(owners):
                output = change(inputs, output, stacked, applied)
            elif mine:
                index = torch.tensor(mine, device=device)
                whole, applied.mask = applied.mask, applied.mask[index] if applied.mask is not None else None
                changed = change(inputs[index], output[index], stacked, applied)
                applied.mask = whole
                output = output.index_copy(0, index, changed)
        return output

    return hook


def check_fits(edit: Edit, subject: Subject) -> None:
    """Raise StudyError unless the edit's layers and widths exist in the subject."""
    widths = {"left": (0, subject.hidden_size), "right": (1, subject.inner_size), "keys": (1, subject.inner_size),
              "values": (1, subject.hidden_size), "encoder.first.weight": (1, subject.inner_size)}  # fmt: skip
    for name, tensor in edit.tensors().items():
        layer, part = name.split(".", 1)
        weight = subject.down_proj(int(layer)).weight
        axis, size = widths.get(part, (0, tensor.shape[0]))
        if tensor.shape[axis] != size or (part == "delta" and tensor.shape != weight.shape):
            raise StudyError(
                f"edit of case {edit.case_id} by {edit.editor}: {name} has shape {tuple(tensor.shape)}, which does not "
                f"fit {subject.name} (d={subject.hidden_size}, d_f={subject.inner_size}): made for another subject?"
            )
