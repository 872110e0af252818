"""An edit is a value: plain tensors that say which module's output changes and how (design idea 1).

Nothing here modifies a model. :func:`applying` registers forward hooks on ``down_proj`` modules and removes them
again, so the base weights are bit-identical before, during and after, whatever happens inside the block.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import StudyError

if TYPE_CHECKING:
    from .subjects import Subject

FORMAT = "clme-edits"
FORMAT_VERSION = 1


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
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Blocks whose ``down_proj`` output changes."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The edit's tensors by name, as they are saved."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], **fields) -> Edit:
        """Rebuild the edit from what :meth:`tensors` gave."""

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
        size = max(len(edit.keys) for edit in edits)
        pad = torch.nn.functional.pad
        # missing entries of smaller codebooks lie infinitely far away
        keys = torch.stack([pad(e.keys, (0, 0, 0, size - len(e.keys)), value=torch.inf) for e in edits]).to(device)
        values = torch.stack([pad(e.values, (0, 0, 0, size - len(e.values))) for e in edits]).to(device)
        radii = torch.stack([pad(e.radii, (0, size - len(e.radii)), value=-1.0) for e in edits]).to(device)

        def change(inputs, outputs, rows, applied):
            batch = torch.arange(len(inputs), device=device)
            column = applied.last_column(inputs.shape[1])
            queries = inputs[batch, column].to(keys.dtype)
            distances = (keys[rows] - queries[:, None]).norm(dim=-1)
            nearest = distances.argmin(dim=-1)
            distance = distances[batch, nearest]
            fired = distance <= radii[rows, nearest]
            applied.lookups.append(Lookup(layer, applied.phase, distance, fired))
            changed = outputs.clone()
            old = outputs[batch, column]
            changed[batch, column] = torch.where(fired[:, None], values[rows, nearest].to(outputs.dtype), old)
            return changed

        return change


Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Applied"], torch.Tensor]
KINDS: dict[str, type[Edit]] = {kind.kind: kind for kind in (Unedited, LowRankUpdate, DenseUpdate, Codebook)}


@dataclass(frozen=True)
class Lookup:
    """One consultation of the codebooks: the phase, and per row the distance to the nearest key and whether it fired."""

    layer: int
    phase: str
    distances: torch.Tensor
    fired: torch.Tensor


class Applied:
    """What the hooks know about the forward pass in progress, and what they saw.

    Attributes:
        phase: ``prefill`` for a pass over a prompt, ``decode`` for one that continues a cache.
        lookups: every codebook consultation, in order.
    """

    def __init__(self, edits: Sequence[Edit], rows: Sequence[int] | None) -> None:
        self.edits = list(edits)
        self.rows = None if rows is None else list(rows)
        self.phase = "prefill"
        self.mask: torch.Tensor | None = None
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
              "values": (1, subject.hidden_size)}  # fmt: skip
    for name, tensor in edit.tensors().items():
        layer, part = name.split(".")
        weight = subject.down_proj(int(layer)).weight
        axis, size = widths.get(part, (0, tensor.shape[0]))
        if tensor.shape[axis] != size or (part == "delta" and tensor.shape != weight.shape):
            raise StudyError(
                f"edit of case {edit.case_id} by {edit.editor}: {name} has shape {tuple(tensor.shape)}, which does not "
                f"fit {subject.name} (d={subject.hidden_size}, d_f={subject.inner_size}): made for another subject?"
            )


def save_edits(path: str | os.PathLike, edits: Sequence[Edit], subject: Subject) -> None:
    """Write edits to one safetensors file whose header says what they are and for which subject."""
    path = Path(path)
    tensors, entries = {}, []
    for n, edit in enumerate(edits):
        for name, tensor in edit.tensors().items():
            tensors[f"{n}.{name}"] = tensor.detach().contiguous().cpu()
        entries.append({"kind": edit.kind, "case_id": edit.case_id, "editor": edit.editor, "log": asdict(edit.log)})
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "subject": subject.name,
        "fingerprint": subject.fingerprint,
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".edits-") as scratch:
        unfinished = Path(scratch) / "edits"
        save_file(tensors, unfinished, metadata={"clme": json.dumps({**header, "edits": entries})})
        os.replace(unfinished, path)


def load_edits(path: str | os.PathLike, subject: Subject) -> list[Edit]:
    """Read edits written by :func:`save_edits`.

    Raises:
        StudyError: not such a file, another version, or edits of another subject.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("clme", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise StudyError(f"{path}: cannot be read as a safetensors file: {error}") from error
    if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
        raise StudyError(f"{path}: not a {FORMAT} file of version {FORMAT_VERSION}; write it with save_edits")
    if header["fingerprint"] != subject.fingerprint:
        raise StudyError(
            f"{path}: the edits were made for {header['subject']} ({header['fingerprint'][:40]}), "
            f"not for {subject.name} ({subject.fingerprint[:40]})"
        )
    edits = []
    for n, entry in enumerate(header["edits"]):
        mine = {name.removeprefix(f"{n}."): t for name, t in tensors.items() if name.startswith(f"{n}.")}
        log = EditLog(**{**entry["log"], "losses": tuple(entry["log"]["losses"])})
        edit = KINDS[entry["kind"]].from_tensors(mine, case_id=entry["case_id"], editor=entry["editor"], log=log)
        check_fits(edit, subject)
        edits.append(edit)
    return edits
