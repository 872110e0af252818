"""What the unedited subject writes: the answers that specificity compares with, and every text that an edit cannot change.

Generated once per subject, weights, dtype and kind of device, and kept in the user's cache by prompt and decoding. A
codebook changes a text only where it fires: :func:`unchanged` finds the requests for which it does not, from the queries
alone, so that nothing is generated again for each of several editors. The unedited row of a table never reads its texts from
here: it generates anew, and so measures how much two generations of the same model differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from ..edits.base import Edit
from ..edits.codebooks import Codebook, PromptCodebook
from ..forward.blockwise import Blockwise, passes
from ..forward.prompt_keys import stored_queries
from ..forward.tokens import encode
from ..subjects.subject import Subject
from ..support.cache import cache_dir
from ..support.journal import append_rows, read_rows
from .generation import SPECIFICITY_TOKENS, Generated, Request, generate


def answers_for(subject: Subject, prompts: Sequence[str]) -> list[str]:
    """Greedy 16-token continuations of ``prompts`` by the unedited subject."""
    return [one.text for one in unedited(subject, [Request(prompt, SPECIFICITY_TOKENS) for prompt in prompts])]


def unedited(subject: Subject, requests: Sequence[Request]) -> list[Generated]:
    """What the subject writes without any edit: from the cache, or generated now."""
    file = _cache_file(subject)
    known = _known(file)
    keys = [_key(request) for request in requests]
    missing = {key: replace(request, edit=-1) for key, request in zip(keys, requests) if key not in known}
    if missing:
        made = generate(subject, list(missing.values()))
        rows = {key: {"key": key, "text": one.text, "ids": one.ids} for key, one in zip(missing, made)}
        append_rows(file, rows.values())
        known.update(rows)
        # what another process appended meanwhile is missed, and at worst generated again
        _read[file] = (file.stat().st_size, known)
    return [Generated(known[key]["text"], known[key]["ids"]) for key in keys]


def unchanged(subject: Subject, requests: Sequence[Request], edits: Sequence[Edit]) -> dict[int, Generated]:
    """The requests whose text is the unedited subject's, by their place in ``requests``: those without an edit, and those whose
    codebook fires neither at the prompt nor, where it is asked there, at any token written."""
    still = {n: Generated("") for n, request in enumerate(requests) if request.edit == -1}
    asked = [n for n, request in enumerate(requests) if isinstance(edits[request.edit], Codebook) and n not in still]
    for (layer, query), mine in _by_query(requests, edits, asked).items():
        queries = stored_queries(subject, [requests[n].prompt for n in mine], layer, query).to(subject.device)
        for n, one in zip(mine, queries):
            distance, fired = edits[requests[n].edit].nearest(one[None])  # type: ignore[attr-defined]
            if not fired.any():
                still[n] = Generated("", distance=distance.item(), fired=False)
    order = sorted(still)
    texts = dict(zip(order, unedited(subject, [requests[n] for n in order])))
    fires_later = _fires_later(subject, requests, edits, texts)
    return {
        n: replace(still[n], text=one.text, ids=one.ids)
        for n, one in texts.items()
        if n not in fires_later
    }  # fmt: skip


def _by_query(requests: Sequence[Request], edits: Sequence[Edit], asked: Sequence[int]) -> dict[tuple, list[int]]:
    groups: dict[tuple, list[int]] = {}
    for n in asked:
        edit = edits[requests[n].edit]
        assert isinstance(edit, Codebook)
        groups.setdefault((edit.layer, edit.query if isinstance(edit, PromptCodebook) else "last"), []).append(n)
    return groups


@torch.no_grad()
def _fires_later(
    subject: Subject, requests: Sequence[Request], edits: Sequence[Edit], texts: dict[int, Generated]
) -> set[int]:
    """Which of ``texts`` a codebook that is asked at every token would have changed."""
    by_layer: dict[int, list[int]] = {}
    for n, one in texts.items():
        edit = edits[requests[n].edit] if requests[n].edit >= 0 else None
        if isinstance(edit, Codebook) and not isinstance(edit, PromptCodebook) and len(one.ids) > 1:
            by_layer.setdefault(edit.layer, []).append(n)
    found = set()
    for layer, mine in by_layer.items():
        # the last token written is never read
        rows = [encode(subject.tokenizer, requests[n].prompt) + list(texts[n].ids[:-1]) for n in mine]
        for part in passes(subject, rows):
            walk = Blockwise(subject, [rows[k] for k in part])
            keys = walk.block(layer, walk.up_to(layer)).keys
            for k, own in zip(part, keys):
                written = len(texts[mine[k]].ids) - 1
                if edits[requests[mine[k]].edit].nearest(own[-written:].float())[1].any():  # type: ignore[attr-defined]
                    found.add(mine[k])
    return found


_read: dict[Path, tuple[int, dict[str, dict]]] = {}


def _known(file: Path) -> dict[str, dict]:
    """The cache's rows by key; read again only when another process has made the file grow."""
    size = file.stat().st_size if file.is_file() else 0
    if _read.get(file, (None, {}))[0] != size:
        _read[file] = (size, {row["key"]: row for row in read_rows(file)})
    return _read[file][1]


def _key(request: Request) -> str:
    noise = None if request.noise is None else hashlib.sha256(request.noise.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps([request.prompt, request.budget, noise]).encode()).hexdigest()


def _cache_file(subject: Subject) -> Path:
    settings = {
        "fingerprint": subject.fingerprint,
        "dtype": subject.dtype_name,
        "device": subject.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "unedited" / f"{subject.name.replace('/', '--')}-{key}.jsonl"
