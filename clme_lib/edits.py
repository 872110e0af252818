"""An edit is a value: plain tensors that say which module's output changes and how.

Here are updates of weights; codebooks.py has GRACE's memories, and applying.py runs a subject as edited.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from .applying import Applied

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
