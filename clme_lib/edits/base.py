"""An edit is a value: plain tensors that say which module's output changes and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..support.errors import StudyError


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


@dataclass(frozen=True)
class Lookup:
    """One consultation of codebooks: the phase, which rows of the batch asked, and for each of them the distance to the
    nearest key and whether it fired."""

    layer: int
    phase: str
    rows: list[int]
    distances: torch.Tensor
    fired: torch.Tensor


Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Applied"], torch.Tensor]


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
