"""Edits that update weights, kept as factors or as a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from .base import Change, Edit


@dataclass(frozen=True, eq=False)
class LowRankUpdate(Edit):
    """``W_l <- W_l + left @ right`` at each layer of ``factors``: layer -> (left (d, r), right (r, d_f)).

    ``keys`` (layer -> (r, d_f)) are the keys that the update was solved for, if later edits need them; they change no output.
    """

    factors: dict[int, tuple[torch.Tensor, torch.Tensor]]
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    kind: ClassVar[str] = "low-rank"

    def delta(self, layer: int) -> torch.Tensor:
        """The update of ``W_layer`` written out, (d, d_f)."""
        return torch.matmul(*self.factors[layer])

    def deltas(self):
        return {layer: self.delta(layer) for layer in self.factors}

    def joined(self, later):
        if not isinstance(later, LowRankUpdate):
            return None
        factors = self.factors | later.factors
        for layer in self.factors.keys() & later.factors.keys():
            lefts, rights = zip(self.factors[layer], later.factors[layer])
            factors[layer] = torch.cat(lefts, dim=1), torch.cat(rights)
        keys = self.keys | later.keys
        for layer in self.keys.keys() & later.keys.keys():
            keys[layer] = torch.cat([self.keys[layer], later.keys[layer]])
        return replace(later, factors=factors, keys=keys)

    def tensors(self) -> dict[str, torch.Tensor]:
        sides = ("left", "right")
        named = {f"{n}.{side}": part for n, pair in self.factors.items() for side, part in zip(sides, pair)}
        return named | {f"{n}.keys": part for n, part in self.keys.items()}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        keys = {n: tensors[f"{n}.keys"] for n in layers if f"{n}.keys" in tensors}
        return cls(**fields, factors={n: (tensors[f"{n}.left"], tensors[f"{n}.right"]) for n in layers}, keys=keys)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        pairs = [edit.factors[layer] for edit in edits]
        rank = max(left.shape[1] for left, _ in pairs)
        # Smaller ranks are padded with zeros, which add nothing.
        lefts = torch.stack([pad(left, (0, rank - left.shape[1])) for left, _ in pairs]).to(device)
        rights = torch.stack([pad(right, (0, 0, 0, rank - right.shape[0])) for _, right in pairs]).to(device)

        def change(inputs, outputs, rows, state):
            if len(edits) == 1:  # Factors that all rows share are not copied for each.
                return outputs + (inputs.to(rights.dtype) @ rights[0].T @ lefts[0].T).to(outputs.dtype)
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

    def deltas(self):
        return {self.layer: self.delta}

    def joined(self, later):
        if not isinstance(later, DenseUpdate) or later.layer != self.layer:
            return None
        return replace(later, delta=self.delta + later.delta)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.layer}.delta": self.delta}

    @classmethod
    def from_tensors(cls, tensors, **fields):
        ((name, delta),) = tensors.items()
        return cls(**fields, layer=int(name.split(".")[0]), delta=delta)

    @classmethod
    def stack(cls, edits, layer, device) -> Change:
        deltas = [edit.delta.to(device) for edit in edits]

        def change(inputs, outputs, rows, state):
            changed = outputs.clone()
            # Rows of the same edit share a product: copying a (d, d_f) matrix for every row would cost more than the product.
            for index in rows.unique().tolist():
                own = rows == index
                changed[own] += (inputs[own].to(deltas[index].dtype) @ deltas[index].T).to(outputs.dtype)
            return changed

        return change
