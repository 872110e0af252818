"""An edit is a value: plain tensors that say which module's output changes and how."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, MutableSequence, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from ..support.errors import StudyError

if TYPE_CHECKING:
    from .codebooks import Codebook


@dataclass(frozen=True)
class Layout:
    """Where a pass that reads prompts, with or without more text after them, has its tokens."""

    real: torch.Tensor  #: (B, T) True at tokens, False at padding
    prompt_end: torch.Tensor  #: (B,) the last column of each prompt; what follows is treated as written by the model


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def announced(layout: Layout) -> Iterator[None]:
    """Passes inside the block have this layout, even where blocks are called one by one."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


class PassState:
    """What the hooks know about the forward pass in progress, and what they saw."""

    def __init__(self, edits: Sequence[Edit], rows: Sequence[int] | None) -> None:
        self.edits = list(edits)
        self.rows = None if rows is None else list(rows)
        self.phase = "prefill"  #: for a pass over a prompt; ``decode`` for one that continues a cache
        self.mask: torch.Tensor | None = None  #: (B, T or more) attention mask; None when every column is a token
        self.prompt_end: torch.Tensor | None = None  #: (B,) that of the :class:`Layout`, where one was announced
        self.batch_rows: list[int] = []  #: the rows that the change in progress acts on, which the two above are of
        self.lookups: MutableSequence[Lookup] = []  #: every codebook consultation, in order

    def begin(self, kwargs: dict) -> None:
        """Note phase and attention mask of the pass that starts with these arguments."""
        past = kwargs.get("past_key_values")
        self.phase = "decode" if past is not None and past.get_seq_length() > 0 else "prefill"
        mask = kwargs.get("attention_mask")
        self.mask = mask if mask is not None and mask.dim() == 2 else None
        self.prompt_end = None

    def take_announced(self) -> None:
        """Note the layout that was announced, if there is one."""
        if (layout := _LAYOUT.get()) is not None:
            self.phase, self.mask, self.prompt_end = "prefill", layout.real, layout.prompt_end

    def rows_of(self, batch: int) -> list[int]:
        """Which edit each of ``batch`` rows gets (-1: none)."""
        count = len(self.edits)
        if self.rows is not None and len(self.rows) != batch:
            raise StudyError(f"rows= names {len(self.rows)} rows, but the batch has {batch}")
        if self.rows is None and count not in (1, batch):
            raise StudyError(
                f"{count} edits do not match a batch of {batch} rows: pass one edit, one per row, or rows=[...]"
            )
        return self.rows or ([0] * batch if count == 1 else list(range(batch)))

    def prompt_columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T) True where ``inputs`` (B, T, .) of this pass are of a prompt's tokens: neither padding nor written text."""
        column = torch.arange(inputs.shape[1], device=inputs.device)
        return self._real(inputs) & (column <= self.last_columns(inputs)[1][:, None])

    def last_columns(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B,) and columns (B,) of ``inputs`` (B, T, .) at which prompts end."""
        rows = torch.arange(len(inputs), device=inputs.device)
        if self.prompt_end is not None:
            return rows, self.prompt_end
        return rows, (self._real(inputs) * torch.arange(1, inputs.shape[1] + 1, device=inputs.device)).argmax(dim=-1)

    def next_token_columns(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) and columns (N,) of ``inputs`` (B, T, .) after which a token is written, when texts are generated."""
        if self.prompt_end is None:
            return self.last_columns(inputs)
        column = torch.arange(inputs.shape[1], device=inputs.device)
        rows, columns = (self._real(inputs) & (column >= self.prompt_end[:, None])).nonzero().T
        return rows, columns

    def _real(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T) True at tokens, False at padding."""
        if self.mask is None:
            return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return self.mask[:, -inputs.shape[1] :].bool()


@dataclass(frozen=True)
class Lookup:
    """One consultation of codebooks: by which rows of the batch, and of each the distance to the nearest key and whether it fired."""

    phase: str
    rows: list[int]
    distances: torch.Tensor
    fired: torch.Tensor


Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PassState], torch.Tensor]


@dataclass(frozen=True)
class EditLog:
    """How an edit came about."""

    steps: int = 0  #: optimiser updates made
    losses: tuple[float, ...] = ()  #: before each update, in evaluation order; empty for editors without one
    seconds: float = 0.0  #: wall clock of the batch the edit was made in, divided by its size
    batch: int = 1  #: how many cases that batch held
    peak_memory_mib: float = 0.0  #: high-water mark while editing (allocator on CUDA, resident set on CPU)
    initial_sha256: str = ""  #: hash of a randomly drawn start value, empty when there is none


@dataclass(frozen=True, eq=False)
class Edit:
    """What one editor made of one case. Subclasses hold the tensors and register by their ``kind``, their name in saved files."""

    case_id: int
    editor: str
    log: EditLog = field(default_factory=EditLog, kw_only=True)
    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Edit]]] = {}
    changes_prompts: ClassVar[bool] = False  #: it puts text before prompts and changes no output (edits/prompts.py)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        known = cls.kinds.get(cls.kind, cls)
        # Running a notebook's cell again defines the same class anew.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__} needs its own kind: {cls.kind!r} is {known.__qualname__}'s")
        whole = cls.parts is Edit.parts
        acts = whole and not cls.changes_prompts
        if acts and cls.tensors is not Edit.tensors and cls.stack.__func__ is Edit.stack.__func__:  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__qualname__} has tensors but no stack() that says how they change an output")
        cls.kinds[cls.kind] = cls

    @staticmethod
    def compose(edits: Sequence[Edit]) -> Edit:
        """One edit that does what ``edits`` (at least one) do when they are applied one after the other.

        Neighbours are joined where that is possible: factors are concatenated, dense updates added, codebooks become one, of whose
        entries the nearest counts. ``case_id``, ``editor`` and ``log`` are those of the last edit that changes anything.
        """
        parts: list[Edit] = []
        for part in (part for edit in edits for part in edit.parts if not part.changes_nothing):
            joined = parts[-1].joined(part) if parts else None
            parts[-1:] = [*parts[-1:], part] if joined is None else [joined]
        if len(parts) < 2:
            return parts[0] if parts else edits[-1]
        last = parts[-1]
        return Composite(last.case_id, last.editor, parts=tuple(parts), log=last.log)

    def joined(self, later: Edit) -> Edit | None:
        """This edit and a later one as one of the same kind; None where that is impossible."""
        return None

    @property
    def changes_nothing(self) -> bool:
        """Whether the model is used as it is."""
        return not self.layers and not self.to_prompts

    @property
    def to_prompts(self) -> list[Edit]:
        """The parts that change prompts."""
        return [part for part in self.parts if part.changes_prompts]

    @property
    def to_outputs(self) -> Edit:
        """This edit without the parts that change prompts."""
        kept = [part for part in self.parts if not part.changes_prompts]
        return self if len(kept) == len(self.parts) else Edit.compose([Unedited(self.case_id, self.editor), *kept])

    @property
    def parts(self) -> tuple[Edit, ...]:
        """The edits that this one is composed of, in order; itself alone if of none."""
        return (self,)

    @property
    def stacked_with(self) -> Hashable:
        """Edits of which this is equal are applied to their rows together, by :meth:`stack`."""
        return self.kind

    @property
    def first_call_only(self) -> bool:
        """Whether only the first generation after an edit is the edited model's (a defect of the released A-GRACE)."""
        return False

    @property
    def lookups(self) -> tuple[Codebook, ...] | None:
        """The codebooks that decide by their queries alone whether a text changes; None if only generating it can tell."""
        return None

    def deltas(self) -> dict[int, torch.Tensor] | None:
        """The update (d, d_f) of each layer's weight, written out; None if the edit is not an update of weights."""
        return None

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks whose ``down_proj`` output changes, in ascending order."""
        acting = [part for part in self.parts if not part.changes_prompts]
        return tuple(sorted({int(name.split(".")[0]) for part in acting for name in part.tensors()}))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The edit's tensors by name, ``LAYER.NAME``, as they are saved."""
        return {}

    def settings(self) -> dict:
        """What else a saved edit has to say, as JSON values."""
        return {}

    def describe(self) -> dict:
        """The edit but for its tensors, as JSON values."""
        made = {"kind": self.kind, "case_id": self.case_id, "editor": self.editor}
        return {**made, "log": asdict(self.log), "settings": self.settings()}

    @staticmethod
    def restored(description: dict, tensors: dict[str, torch.Tensor]) -> Edit:
        """The edit that :meth:`describe` and :meth:`tensors` were taken from; StudyError for an unknown kind."""
        if (kind := description["kind"]) not in Edit.kinds:
            raise StudyError(f"unknown kind of edit {kind!r}: import the module that defines it first")
        fields = {name: description[name] for name in ("case_id", "editor")} | description["settings"]
        log = EditLog(**{**description["log"], "losses": tuple(description["log"]["losses"])})
        return Edit.kinds[kind].from_tensors(tensors, **fields, log=log)

    @property
    def sha256(self) -> str:
        """Hash of what the edit does: kinds, settings and tensors, not who made it or how."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(json.dumps([part.kind, part.settings()], sort_keys=True).encode())
            for name, tensor in sorted(part.tensors().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], **fields) -> Edit:
        """Rebuild the edit from what :meth:`tensors` and :meth:`settings` gave."""
        return cls(**fields)

    @classmethod
    def stack(cls, edits: Sequence[Edit], layer: int, device: torch.device) -> Change:
        """A function that applies ``edits[rows[b]]`` to row b at ``layer``: (inputs, outputs, rows, state) -> outputs."""
        raise TypeError(f"{cls.__qualname__} has no tensors to apply")


@dataclass(frozen=True, eq=False)
class Unedited(Edit):
    """The model as it is: the baseline row of every table."""

    kind: ClassVar[str] = "unedited"


@dataclass(frozen=True, eq=False)
class Composite(Edit):
    """Edits of several kinds or layers, applied in order: each acts on what the ones before it gave."""

    parts: tuple[Edit, ...] = ()  # takes the place of a property
    kind: ClassVar[str] = "composite"

    @property
    def first_call_only(self) -> bool:
        return all(part.first_call_only for part in self.parts)

    @property
    def lookups(self) -> tuple[Codebook, ...] | None:
        of_parts = [part.lookups for part in self.parts]
        return None if None in of_parts else tuple(book for books in of_parts for book in books or ())

    def deltas(self) -> dict[int, torch.Tensor] | None:
        summed: dict[int, torch.Tensor] = {}
        for part in self.parts:
            if (deltas := part.deltas()) is None:
                return None
            summed |= {layer: summed.get(layer, 0) + delta for layer, delta in deltas.items()}
        return summed

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{n}:{name}": tensor for n, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    def settings(self) -> dict:
        return {"parts": [part.describe() for part in self.parts]}

    @classmethod
    def from_tensors(cls, tensors, **fields) -> Composite:
        descriptions = fields.pop("parts")
        of_parts: list[dict[str, torch.Tensor]] = [{} for _ in descriptions]
        for name, tensor in tensors.items():
            n, _, own_name = name.partition(":")
            of_parts[int(n)][own_name] = tensor
        return cls(**fields, parts=tuple(map(Edit.restored, descriptions, of_parts)))
