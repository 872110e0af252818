"""What a codebook can be asked with: the mean over a prompt's tokens of the inputs of ``W_l``, or the last token's.

Encoders are trained on the queries of thousands of prompts. Those are computed once per subject and layer and kept in
the user's cache, in files of a few hundred prompts each: an interrupted extraction goes on where it stopped, and data
sets that share prompts share their queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..edits.codebooks import Query, masked_mean
from ..subjects.subject import Subject
from ..support.artifact import read_header, read_rows, write_tensors
from ..support.cache import cache_dir
from ..support.errors import StudyError
from .blockwise import Blockwise, passes
from .tokens import encode

FORMAT = "clme-queries"
_FILE_PROMPTS = 256


@torch.no_grad()
def prompt_queries(subject: Subject, prompts: Sequence[str], layer: int) -> dict[str, torch.Tensor]:
    """Both queries of each prompt under the unedited subject: (P, d_f) float32 each, on the subject's device."""
    rows = [encode(subject.tokenizer, prompt) for prompt in prompts]
    if any(not row for row in rows):
        raise StudyError("an empty prompt has no query")
    found = {name: torch.empty(len(rows), subject.inner_size, device=subject.device) for name in ("mean", "last")}
    for mine in passes(subject, rows):
        upward = Blockwise(subject, [rows[n] for n in mine])
        keys = upward.block(layer, upward.up_to(layer)).keys
        found["mean"][mine] = masked_mean(keys, upward.mask)
        found["last"][mine] = keys[:, -1].float()  # rows are padded on the left
    return found


def stored_queries(subject: Subject, prompts: Sequence[str], layer: int, query: Query) -> torch.Tensor:
    """One query of each prompt, (P, d_f) float32 on CPU: from the cache, or computed now.

    Raises:
        StudyError: a cached file is damaged or of another subject.
    """
    folder = _folder(subject, layer)
    hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    wanted = dict(zip(hashes, prompts))
    there = {one for file in folder.glob("*.safetensors") for one in _prompts(file, subject, layer)}
    missing = sorted((one for one in wanted if one not in there), key=lambda one: (len(wanted[one]), one))
    with tqdm(total=len(missing), desc=f"queries of layer {layer}", unit="prompt", disable=not missing) as bar:
        for first in range(0, len(missing), _FILE_PROMPTS):
            part = missing[first : first + _FILE_PROMPTS]
            found = prompt_queries(subject, [wanted[one] for one in part], layer)
            name = hashlib.sha256("".join(part).encode()).hexdigest()[:16]
            header = {**_identity(subject, layer), "prompts": part}
            write_tensors(folder / f"{name}.safetensors", found, header)
            bar.update(len(part))
    rows: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        names = _prompts(file, subject, layer)
        if wanted.keys().isdisjoint(names):
            continue
        places = [n for n, name in enumerate(names) if name in wanted]
        rows.update(zip([names[n] for n in places], read_rows(file, query, places)))
    return torch.stack([rows[one] for one in hashes])


def _folder(subject: Subject, layer: int) -> Path:
    identity = hashlib.sha256(f"{subject.fingerprint}|{subject.device.type}".encode()).hexdigest()[:12]
    safe = "".join(c if c.isalnum() or c in ".-_" else "-" for c in subject.name)
    return cache_dir() / "queries" / f"{safe}-{subject.dtype_name}-{identity}" / f"layer-{layer}"


def _identity(subject: Subject, layer: int) -> dict:
    return {"format": FORMAT, "version": 1, "fingerprint": subject.fingerprint, "layer": layer}


def _prompts(file: Path, subject: Subject, layer: int) -> list[str]:
    header = read_header(file)
    if {name: header.get(name) for name in _identity(subject, layer)} != _identity(subject, layer):
        raise StudyError(f"{file}: not queries of {subject.name} at layer {layer}; remove it")
    return header["prompts"]
