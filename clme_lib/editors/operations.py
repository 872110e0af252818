"""The arithmetic and memory traffic that an editor's algorithm cannot avoid, from which RQ2's floor is computed.

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

    evaluation       P b a block for each prompt; b a block and h for each token
                     written, without what an edit adds to the model

Attention's products add ``2 d`` multiply-adds for every pair of columns it compares. Memory traffic: every weight that
takes part in a pass is read once in it, forward and backward, and in every step of writing; FT-L's optimiser reads four matrices of the size of W and
writes three, each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..subjects.subject import Subject


@dataclass(frozen=True)
class Phase:
    """A part of an edit whose passes run one after another: ``operations`` (floating point) and ``traffic`` (bytes)."""

    name: str
    operations: float
    traffic: float


class Sizes:
    """The sizes of a subject: weights of a block's matrices and of the head, and d and d_f, the sides of an edited matrix."""

    def __init__(self, subject: Subject) -> None:
        self.block = sum(p.numel() for p in subject.blocks[0].parameters() if p.dim() == 2)
        self.blocks = len(subject.blocks)
        self.head = subject.model.lm_head.weight.numel()
        self.hidden, self.inner = subject.hidden_size, subject.inner_size
        self._bytes = subject.dtype.itemsize
        self._weights = (self.blocks * self.block + self.head) * self._bytes
        self._key_width = subject.blocks[0].self_attn.k_proj.out_features

    def read(self, columns: float, blocks: float, rows: int = 1) -> Phase:
        """A forward pass of ``rows`` rows of ``columns`` columns through ``blocks`` blocks, from their first column on."""
        pairs = rows * columns**2 / 2
        operations = 2 * blocks * (rows * columns * self.block + 2 * self.hidden * pairs)
        return Phase("read", operations, blocks * self.block * self._bytes)

    def read_once(self, prompt: int, target: int, layer: int) -> list[Phase]:
        """The reading that optimising at ``layer`` needs once: the whole row up to the layer, and the prompt above it."""
        return [self.read(prompt + target - 1, layer + 1), self.read(prompt, self.blocks - 1 - layer)]

    def read_prompts(self, prompts: Iterable[int]) -> Phase:
        """Whole passes over prompts of these lengths, side by side, and the next token's logits of each."""
        reads = [self.read(prompt, self.blocks) for prompt in prompts]
        operations = sum(read.operations + 2 * self.head for read in reads)
        return Phase("read prompts", operations, self._weights if reads else 0)

    def write(self, texts: Sequence[tuple[int, int]]) -> Phase:
        """Writing texts side by side, each given by the lengths of its prompt and of itself; the prompt's pass gives the first token.

        Every step reads the weights once, and each text's keys and values.
        """
        operations = traffic = 0
        for prompt, length in texts:
            seen = sum(range(prompt + 1, prompt + length))
            operations += (
                2 * (length - 1) * (self.blocks * self.block + self.head) + 4 * self.blocks * self.hidden * seen
            )
            traffic += 2 * self.blocks * self._key_width * seen * self._bytes
        steps = max((length - 1 for _, length in texts), default=0)
        return Phase("write", operations, traffic + steps * self._weights)

    def step(self, columns: float, seen: float, blocks: int, labels: float) -> tuple[float, float]:
        """(operations, bytes) of one forward and backward pass of ``columns`` columns that attend to ``seen`` ones."""
        forward = blocks * (columns * self.block + 2 * self.hidden * columns * seen) + labels * self.head
        return 4 * forward, 2 * (blocks * self.block + self.head) * self._bytes

    def fine_tuning(self, prompt: int, target: int, layer: int, steps: int) -> list[Phase]:
        """``steps`` updates of a whole ``W_l`` by Adam."""
        columns, matrix = prompt + target - 1, self.hidden * self.inner
        operations, traffic = self.step(columns, columns / 2, self.blocks - 1 - layer, target)
        operations += 4 * columns * matrix  # the product with the change, and its gradient
        # the optimiser reads four matrices and writes three
        in_steps = Phase("steps", steps * operations, steps * (traffic + 7 * 4 * matrix))
        return [*self.read_once(prompt, target, layer), in_steps]
