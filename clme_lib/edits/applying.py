"""Running a subject as edited, row by row, through forward hooks.

Nothing here modifies a model. :func:`applying` registers hooks on ``down_proj`` modules and removes them again, so the
base weights are bit-identical before, during and after, whatever happens inside the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..support.errors import StudyError
from .base import Applied, Edit, Unedited
from .codebooks import Codebook, PromptCodebook
from .weights import DenseUpdate, LowRankUpdate

if TYPE_CHECKING:
    from ..subjects.subject import Subject


KINDS: dict[str, type[Edit]] = {
    kind.kind: kind for kind in (Unedited, LowRankUpdate, DenseUpdate, Codebook, PromptCodebook)
}


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

    # which rows a change acts on, as the hook needs it, for the owners it was made for: the same in each pass of a generation
    placed: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    known: list[int] | None = None

    def place(owners: list[int]) -> None:
        nonlocal known
        placed.clear()
        for members, _ in changes:
            at = {edit: n for n, edit in enumerate(members)}
            mine = [row for row, edit in enumerate(owners) if edit in at]
            stacked = torch.tensor([at[owners[row]] for row in mine], device=device, dtype=torch.long)
            placed.append((mine, torch.tensor(mine, device=device, dtype=torch.long), stacked))
        known = list(owners)

    def hook(_module, args, output):
        inputs = args[0]
        owners = applied.rows_of(len(inputs))
        if owners != known:
            place(owners)
        for (_, change), (mine, index, stacked) in zip(changes, placed):
            applied.batch_rows = mine
            if len(mine) == len(owners):
                output = change(inputs, output, stacked, applied)
            elif mine:
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
