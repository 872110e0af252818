"""Queries for codebooks: the mean over a prompt's tokens of the inputs of ``W_l``, or the last token's input.

Encoders are trained on the queries of thousands of prompts. They are kept in the user's cache, in files of a few hundred prompts
each: an interrupted extraction is resumed, and datasets that share prompts share their queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..edits.codebooks import Query, masked_mean
from ..subjects.subject import Subject
from ..support.artifact import Artifact
from ..support.cache import cache_dir, name_for
from ..support.errors import CaseError
from .blockwise import Blockwise, passes
from .tokens import encode

FORMAT = "clme-queries"
_FILE_PROMPTS = 256


@torch.no_grad()
def prompt_queries(subject: Subject, prompts: Sequence[str], layer: int) -> dict[str, torch.Tensor]:
    """Both queries of each prompt: (P, d_f) float32 each, on the subject's device."""
    rows = [encode(subject.tokenizer, prompt) for prompt in prompts]
    if any(not row for row in rows):
        raise CaseError("an empty prompt has no query")
    queries = {name: torch.empty(len(rows), subject.inner_size, device=subject.device) for name in ("mean", "last")}
    for group in passes(subject, rows):
        walk = Blockwise(subject, [rows[n] for n in group])
        keys = walk.block(layer, walk.up_to(layer)).keys
        queries["mean"][group] = masked_mean(keys, walk.mask)
        queries["last"][group] = keys[:, -1].float()
    return queries


def stored_queries(subject: Subject, prompts: Sequence[str], layer: int, query: Query) -> torch.Tensor:
    """One query of each prompt, (P, d_f) float32 on CPU: from the cache (StudyError if a file is damaged), or computed now."""
    identity = {"format": FORMAT, "version": 2, **subject.identity, "device": subject.device.type, "layer": layer}
    folder = cache_dir() / "queries" / name_for(f"{subject.name}-layer-{layer}", identity)
    hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    needed = dict(zip(hashes, prompts))
    files = [Artifact(file, identity) for file in sorted(folder.glob("*.safetensors"))]
    stored = [(file, file.read(with_tensors=False)[0].get("prompts", [])) for file in files]
    missing = sorted(
        needed.keys() - set().union(*(keys for _, keys in stored)), key=lambda key: (len(needed[key]), key)
    )
    with tqdm(total=len(missing), desc=f"queries of layer {layer}", unit="prompt", disable=not missing) as bar:
        for first in range(0, len(missing), _FILE_PROMPTS):
            part = missing[first : first + _FILE_PROMPTS]
            file = Artifact(folder / f"{name_for('prompts', {'sha256': part})}.safetensors", identity)
            file.write(prompt_queries(subject, [needed[key] for key in part], layer), prompts=part)
            stored.append((file, part))
            bar.update(len(part))
    rows: dict[str, torch.Tensor] = {}
    for file, keys in stored:
        if indices := [n for n, key in enumerate(keys) if key in needed]:
            rows.update(zip([keys[n] for n in indices], file.rows(query, indices)))
    return torch.stack([rows[key] for key in hashes])
