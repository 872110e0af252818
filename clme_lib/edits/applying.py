"""Running a model as edited, row by row, through forward hooks on ``down_proj``: its weights are never changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch.utils.hooks import RemovableHandle

from ..support.errors import StudyError
from .base import Change, Edit, PassState

DownProj = Callable[[int], torch.nn.Linear]  # gives W_l of a zero-based layer


@contextlib.contextmanager
def applying(
    decoder: torch.nn.Module, down_proj: DownProj, edits: Sequence[Edit], rows: Sequence[int] | None = None
) -> Iterator[PassState]:
    """Run a model as edited: edit ``rows[b]`` acts on row b of every batch inside the block.

    Args:
        decoder: the stack of blocks, called once a forward pass.
        rows: index into ``edits`` for each row, -1 for an unedited row. Default: one edit for all rows, or one per row.

    Raises:
        StudyError: an edit does not fit the model or changes prompts, or rows and batch differ in length.
    """
    for edit in edits:
        if edit.to_prompts:
            raise StudyError(
                f"the edit of case {edit.case_id} by {edit.editor} puts text before prompts, which is impossible in a pass over given tokens: "
                "write texts with clme_lib.generate"
            )
    state, handles = attach(decoder, down_proj, edits, rows)
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def attach(
    decoder: torch.nn.Module, down_proj: DownProj, edits: Sequence[Edit], rows: Sequence[int] | None = None
) -> tuple[PassState, list[RemovableHandle]]:
    """What :func:`applying` does at its start: the state of the passes to come, and the registered hooks."""
    state = PassState(edits, rows)
    if rows is not None and any(not -1 <= row < len(state.edits) for row in rows):
        raise StudyError(f"rows= must name edits 0 to {len(state.edits) - 1} or -1 for none")
    for edit in state.edits:
        check_fits(edit, down_proj)
    modules = {layer: down_proj(layer) for layer in sorted({layer for edit in state.edits for layer in edit.layers})}
    # All hooks are made before the first is registered: making them may run out of memory.
    hooks = [(module, _layer_hook(state, layer, module.weight.device)) for layer, module in modules.items()]
    begin = decoder.register_forward_pre_hook(lambda _m, _args, kwargs: state.begin(kwargs), with_kwargs=True)
    return state, [begin, *(module.register_forward_hook(hook) for module, hook in hooks)]


def _layer_hook(state: PassState, layer: int, device: torch.device) -> Callable:
    changes = _changes(state.edits, layer, device)
    # A change acts on the same rows in most passes of a generation, so their tensors are kept.
    placed: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    placed_for: list[int] | None = None

    def hook(module, args, output):
        nonlocal placed, placed_for
        inputs = args[0]
        if inputs.dim() == 2:  # (B, d_f): an update of weights treats single columns like any others
            if any(part.lookups for edit in state.edits for part in edit.parts):
                raise StudyError(f"layer {layer} has a codebook, which cannot be consulted for single columns")
            return hook(module, (inputs[:, None],), output[:, None])[:, 0]
        owners = state.rows_of(len(inputs))
        if owners != placed_for:
            placed, placed_for = [_place(owners, members, device) for members, _ in changes], list(owners)
        state.take_announced()
        for (_, change), (rows, index, stacked) in zip(changes, placed):
            state.batch_rows = rows
            if len(rows) == len(owners):
                output = change(inputs, output, stacked, state)
            elif rows:
                whole = state.mask, state.prompt_end
                state.mask, state.prompt_end = (part if part is None else part[index] for part in whole)
                changed = change(inputs[index], output[index], stacked, state)
                state.mask, state.prompt_end = whole
                output = output.index_copy(0, index, changed)
        return output

    return hook


def _place(owners: list[int], position: dict[int, int], device) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The rows that belong to some edits, as a list, and the ``position`` of each row's edit, as a tensor."""
    rows = [row for row, edit in enumerate(owners) if edit in position]
    stacked = [position[owners[row]] for row in rows]
    index, of_rows = torch.tensor([rows, stacked], device=device, dtype=torch.long)
    return rows, index, of_rows


def _changes(edits: Sequence[Edit], layer: int, device: torch.device) -> list[tuple[dict[int, int], Change]]:
    """Which edits change a layer's output, and how: edits of one kind together, the parts of composed ones in order.

    Each change comes with its edits, and each edit's position among the stacked ones: edits that are equal in effect
    are stacked once.
    """
    parts = [[part for part in edit.parts if layer in part.layers] for edit in edits]
    changes = []
    for turn in range(max(map(len, parts), default=0)):
        together: dict[Hashable, list[int]] = {}
        for n, own in enumerate(parts):
            if turn < len(own):
                together.setdefault(own[turn].stacked_with, []).append(n)
        for members in together.values():
            stacked = list({id(parts[n][turn]): parts[n][turn] for n in members}.values())
            places = {id(part): place for place, part in enumerate(stacked)}
            position = {n: places[id(parts[n][turn])] for n in members}
            changes.append((position, stacked[0].stack(stacked, layer, device)))
    return changes


def check_fits(edit: Edit, down_proj: DownProj) -> None:
    """Raise StudyError unless the edit's layers and widths exist in the model."""
    for part in edit.parts:
        for name, tensor in part.tensors().items():
            layer, kind = name.split(".", 1)
            d, d_f = down_proj(int(layer)).weight.shape
            sizes = {"left": (d, None), "right": (None, d_f), "keys": (None, d_f), "values": (None, d),
                     "delta": (d, d_f), "residuals": (None, d), "encoder.first.weight": (None, d_f)}.get(kind, tensor.shape)  # fmt: skip
            if any(size not in (actual, None) for size, actual in zip_longest(sizes, tensor.shape)):
                raise StudyError(
                    f"edit of case {part.case_id} by {part.editor}: {name} has shape {tuple(tensor.shape)}, which does not "
                    f"fit a model with d={d}, d_f={d_f}: was it made for another subject?"
                )
