"""Exporting edits as an adapter that peft loads, or merged into a model that transformers loads. Neither needs this library.

Factors ``left (d, r) @ right (r, d_f)`` are a LoRA of ``down_proj`` with ``A = right``, ``B = left`` and ``alpha = r``; smaller
ranks are padded with zeros. Any update of weights can be merged, ``W + delta``, and saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import pad

from ..edits.base import Edit
from ..edits.weights import LowRankUpdate
from ..subjects.subject import Subject
from ..support.errors import StudyError


def export_edits(
    edits: Sequence[Edit], subject: Subject, folder: Path, *, merged: bool = False, allow_rounding: bool = False
) -> str:
    """Write what ``edits`` (at least one) make together of a subject to a new folder; returns what was written, in a sentence.

    Args:
        merged: write the whole model with the updates in its weights, instead of an adapter.
        allow_rounding: merge into 16-bit weights, although most entries of an update are smaller than a weight's rounding step.

    Raises:
        StudyError: the folder exists; an edit does not change weights; an update without factors is to be an adapter; 16-bit weights.
    """
    if folder.exists():
        raise StudyError(f"{folder} already exists; choose another folder")
    whole = Edit.compose([*([subject.edit] if subject.edit else []), *edits])
    if whole.changes_nothing:
        raise StudyError("the edits change nothing: there is nothing to export")
    if (deltas := whole.deltas()) is None:
        refused = [part for part in whole.parts if part.deltas() is None]
        editors = ", ".join(sorted({part.editor for part in refused}))
        if all(part.changes_prompts for part in refused):
            raise StudyError(
                f"the edits of {editors} are text before prompts, which weights cannot hold: put it there yourself (edit.texts), or use "
                "an editor that updates weights"
            )
        raise StudyError(
            f"the edits of {editors} look up a codebook at every prompt, which weights cannot do: run the model with "
            "`with subject.applying(edits): ...`, or use in-context or an editor that updates weights"
        )
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write = partial(_merged, deltas, allow_rounding) if merged else partial(_adapter, whole)
        said = write(subject, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    count = "1 edit" if len(edits) == 1 else f"{len(edits)} edits together"
    return f"{count} in {'a model' if merged else 'an adapter'}: {folder}; {said}"


def _adapter(edit: Edit, subject: Subject, folder: Path) -> str:
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not isinstance(edit, LowRankUpdate):  # composing joins all low-rank updates into one
        raise StudyError(
            f"{edit.editor} updates whole matrices, which a low-rank adapter cannot hold: export the merged model (--merged)"
        )
    rank = max(left.shape[1] for left, _ in edit.factors.values())
    tensors = {}
    for layer, (left, right) in edit.factors.items():
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        missing = rank - left.shape[1]
        tensors[f"{name}.lora_A.weight"] = pad(right, (0, 0, 0, missing)).float().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = pad(left, (0, missing)).float().cpu().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=["down_proj"],
        layers_to_transform=sorted(edit.factors),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=subject.model.name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"rank {rank} in {len(edit.factors)} layers, for {subject.model.name_or_path}"


@torch.no_grad()
def _merged(deltas: dict[int, torch.Tensor], allow_rounding: bool, subject: Subject, folder: Path) -> str:
    if subject.dtype != torch.float32 and not allow_rounding:
        raise StudyError(
            f"the weights are {subject.dtype_name}, where rounding would lose most of an update: load the subject in float32, export an adapter, or pass "
            "--allow-rounding"
        )
    state, changed, entries = subject.model.state_dict(), 0, 0
    kept, meant = 0.0, 0.0
    for layer, delta in deltas.items():
        weight = subject.down_proj(layer).weight
        updated = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        state[f"model.layers.{layer}.mlp.down_proj.weight"] = updated
        changed, entries = changed + int((updated != weight).sum()), entries + weight.numel()
        kept += float((updated.double() - weight.double()).square().sum())
        meant += float(delta.double().square().sum())
    subject.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    subject.tokenizer.save_pretrained(folder)
    ratio = (kept / meant) ** 0.5 if meant else 1.0
    return f"{changed} of {entries} entries in {len(deltas)} matrices changed, by {ratio:.4f} of the update's norm, in {subject.dtype_name}"
