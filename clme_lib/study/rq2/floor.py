"""The floor under an edit: the arithmetic and the memory traffic that its algorithm cannot do without.

For one case alone, with P prompt and T target tokens, b weights in a block, n blocks above the edited layer, a head
of h weights, w of the edited matrix, and S steps. In multiply-adds, each of which is two operations::

    every editor     the prompt and target up to the edited layer: (P + T) b a block
                     the prompt above it: P b a block
    GRACE, A-GRACE   2 S (T n b + T h): touched columns, forward and backward
    ROME family      the same for each of its 6 rows
    MEMIT, PMET      and 6 P b for each written layer, P b for each block
                     from there to the last written one, d_f^2 for each solve
    FT-L             2 S ((P + T) (w + n b) + T h): every column passes W
    MALMEN           (P + T) b for each block down to the lowest edited one and
                     2 T h; its network, for T rows a layer

Attention's products add ``2 d`` multiply-adds for every pair of columns it compares. Memory traffic: every weight that
takes part in a pass is read once in it, forward and backward; FT-L's optimiser reads four matrices of the size of W and
writes three, each step. A phase takes at least the longer of its arithmetic at the device's rate and its traffic at the
device's; the floor is the sum over phases. Rates are measured (:func:`measure_ceilings`): a large product, a large copy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...editors.base import Editor, synchronize
from ...editors.ft_l import FTL
from ...editors.grace import ValueEditor
from ...editors.locate_then_edit.learning import RewritingEditor
from ...editors.malmen.editor import MALMEN
from ...edits.encoder import Encoder
from ...subjects.subject import Subject

_CONTEXT_TOKENS = 10  # of the five templates before a prompt, about
_SIDE = {"cpu": 2_048, "cuda": 8_192}  # of the matrices whose product is timed
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


@dataclass(frozen=True)
class Phase:
    """A part of an edit whose passes follow each other: ``operations`` (floating point) and ``traffic`` (bytes)."""

    name: str
    operations: float
    traffic: float


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: operations and bytes a second, as measured."""

    operations: float
    traffic: float

    def seconds(self, phases: Sequence[Phase]) -> float:
        """Least time that the phases take one after another."""
        return sum(max(one.operations / self.operations, one.traffic / self.traffic) for one in phases)


class _Sizes:
    def __init__(self, subject: Subject) -> None:
        block = [p.numel() for p in subject.blocks[0].parameters() if p.dim() == 2]
        self.block, self.blocks = sum(block), len(subject.blocks)
        self.head = subject.model.lm_head.weight.numel()
        self.hidden, self.inner = subject.hidden_size, subject.inner_size
        self.bytes = subject.dtype.itemsize

    def read(self, columns: float, blocks: float, rows: int = 1) -> Phase:
        """A forward pass of ``rows`` rows of ``columns`` columns through ``blocks`` blocks, from their first column on."""
        pairs = rows * columns**2 / 2
        operations = 2 * blocks * (rows * columns * self.block + 2 * self.hidden * pairs)
        return Phase("read", operations, blocks * self.block * self.bytes)

    def step(self, columns: float, seen: float, blocks: int, labels: float) -> tuple[float, float]:
        """(operations, bytes) of one forward and backward pass of ``columns`` columns that attend to ``seen`` ones."""
        forward = blocks * (columns * self.block + 2 * self.hidden * columns * seen) + labels * self.head
        return 4 * forward, 2 * (blocks * self.block + self.head) * self.bytes


def phases(editor: Editor, prompt: int, target: int, steps: int) -> list[Phase]:
    """The phases of one edit of a case with so many tokens, when it made ``steps`` evaluations of its loss.

    An editor whose operations have not been counted here has none, and no floor.
    """
    values: Any = editor.values
    sizes = _Sizes(editor.subject)
    layers = sorted(getattr(values, "layers", None) or [getattr(values, "layer", 0)])
    above = sizes.blocks - 1 - layers[-1]
    columns = prompt + target - 1
    if not isinstance(editor, FTL | RewritingEditor | MALMEN | ValueEditor):
        return []
    if isinstance(editor, RewritingEditor):
        return _rewriting(editor, sizes, layers, prompt, target, steps)
    if isinstance(editor, MALMEN):
        upper = sizes.blocks - layers[0]
        operations, traffic = sizes.step(columns, columns / 2, upper, target)
        network = editor.network
        weights = sum(p.numel() for p in network.parameters() if p.dim() == 2) if network else 0
        of_network = Phase("network", 2 * target * len(layers) * weights, 4 * weights)
        return [sizes.read(columns, sizes.blocks - upper), Phase("gradient", operations, traffic), of_network]
    read = [sizes.read(columns, layers[-1] + 1), sizes.read(prompt, above)]
    if isinstance(editor, FTL):
        matrix = sizes.hidden * sizes.inner
        operations, traffic = sizes.step(columns, columns / 2, above, target)
        operations += 4 * columns * matrix  # the product with the change, and its gradient
        return [*read, Phase("steps", steps * operations, steps * (traffic + 7 * 4 * matrix))]
    operations, traffic = sizes.step(target, columns, above, target)
    learnt = [*read, Phase("steps", steps * operations, steps * traffic)]
    encoder: Encoder | None = getattr(getattr(editor, "trained", None), "encoder", None)
    if encoder is not None:
        weights = sum(p.numel() for p in encoder.parameters())
        learnt.append(Phase("encoder", 2 * weights, 4 * weights))
    return learnt


def _rewriting(editor: Editor, sizes: _Sizes, layers: list[int], prompt: int, target: int, steps: int) -> list[Phase]:
    rows = len(editor.contexts)  # type: ignore[attr-defined]
    above = sizes.blocks - 1 - layers[-1]
    width = prompt + _CONTEXT_TOKENS * (rows - 1) / rows
    operations, traffic = sizes.step(rows * target, 0, above, rows * target)
    operations += 8 * sizes.hidden * above * rows * target * (width + target)  # attention within a row
    learnt = [sizes.read(width, sizes.blocks, rows), Phase("steps", steps * operations, steps * traffic)]
    if editor.name == "rome":
        return learnt
    again = sum(layers[-1] - layer for layer in layers)  # blocks that the bare prompt is read through to the last layer
    once, more = sizes.read(width, len(layers), rows), sizes.read(prompt, again)
    solves = Phase("solve", 2 * len(layers) * sizes.inner**2, 8 * len(layers) * sizes.inner**2)
    return [*learnt, Phase("write", once.operations + more.operations, once.traffic + more.traffic), solves]


def measure_ceilings(subject: Subject) -> Ceilings:
    """The best of five large matrix products in the subject's dtype, and of five large copies."""
    device, side = subject.device, _SIDE[subject.device.type]
    one, other = (torch.randn(side, side, device=device).to(subject.dtype) for _ in range(2))
    product = _best(lambda: one @ other, device)
    block = torch.zeros(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(block)  # memory that is there already: a new block would be paid for as well
    copy = _best(lambda: target.copy_(block), device)
    return Ceilings(2 * side**3 / product, 2 * block.numel() * 4 / copy)


def _best(act, device: torch.device) -> float:
    times = []
    for _ in range(6):  # the first is a warm-up
        synchronize(device)
        started = time.perf_counter()
        act()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
