"""An edit is a value: plain tensors that say which module's output changes and how.

Here are updates of weights; codebooks.py has GRACE's memories, and applying.py runs a subject as edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Change, Edit


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
