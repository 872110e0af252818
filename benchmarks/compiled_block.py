"""Whether compiling pays off: one block's part of a step, forward and backward, without and with ``torch.compile``, in one run.

A step of the fast path runs every block above the edited layer on a batch's touched columns. The first of these blocks is
timed on the real inputs of a batch; *first* is its first compiled call, which compiles; batches of other shapes compile again.

usage: python benchmarks/compiled_block.py, with the options of fast_path.py
"""

import statistics

import torch
from fast_path import main, seconds

from clme_lib.editors.locate_then_edit.learning import rewriting_rows
from clme_lib.forward.partial import PartialForward

ROUNDS = 15


def measure(editor, cases, tokenized):
    """Milliseconds of one block, plain and compiled."""
    subject = editor.subject
    layer = editor.layers[-1]
    if editor.name in ("rome", "memit", "pmet"):
        read_as = "aligned", "in-context"
        tokenized = [row for case in cases for row in rewriting_rows(subject, case, editor.contexts, *read_as)]
    forward = PartialForward(subject, tokenized, layer, from_lookup=editor.from_lookup)
    block = subject.blocks[layer + 1]
    compiled = torch.compile(block.forward, dynamic=True)

    def step(run):
        hidden = (forward.residual + forward.outputs).detach().requires_grad_(True)
        forward.through(run, hidden).sum().backward()

    first = seconds(subject, lambda: step(compiled))
    for run in (block.forward, compiled):
        step(run)  # warm-up
    each = [[seconds(subject, lambda run=run: step(run)) for _ in range(ROUNDS)] for run in (block.forward, compiled)]
    plain, fast = (1000 * statistics.median(times) for times in each)
    return {
        "columns": forward.residual.shape[0] * forward.residual.shape[1],
        "as it is ms": round(plain, 1),
        "compiled ms": round(fast, 1),
        "first s": round(first, 1),
        "ratio": round(plain / fast, 2),
    }


if __name__ == "__main__":
    main(__doc__, measure)
