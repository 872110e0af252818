"""What the unedited subject writes: the answers that specificity compares with, and every text that an edit cannot change.

They are generated once per subject, weights, dtype and kind of device, and cached by prompt and decoding. A row of the cache
that was changed, or belongs to another subject, is ignored, and its text is generated again. The unedited row
of a table never uses this cache: it generates its texts again, and so measures how much two generations of the same model differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import transformers

from ..edits.base import Edit
from ..edits.codebooks import Codebook
from ..edits.prompts import Reading
from ..forward.blockwise import Blockwise, passes
from ..forward.prompt_keys import stored_queries
from ..forward.tokens import encode
from ..subjects.subject import Subject
from ..support.cache import cache_dir, name_for
from ..support.journal import Journal
from .generation import SPECIFICITY_TOKENS, Generated, Request, as_read, generate


def answers_for(subject: Subject, prompts: Sequence[str]) -> list[str]:
    """Greedy 16-token continuations of ``prompts`` by the unedited subject."""
    return [answer.text for answer in unedited(subject, [Request(prompt, SPECIFICITY_TOKENS) for prompt in prompts])]


def unedited(subject: Subject, requests: Sequence[Request]) -> list[Generated]:
    """The subject's texts without any edit, from the cache or generated now."""
    known = kept_texts(subject)
    known.refresh()
    keys = [_key(request) for request in requests]
    missing = {key: replace(request, edit=-1) for key, request in zip(keys, requests) if key not in known.rows}
    if missing:
        generated = generate(subject, list(missing.values()))
        rows = [{"key": key, "text": made.text, "ids": made.ids} for key, made in zip(missing, generated)]
        known.append(*({**row, "sha256": _row_sha256(known.path.stem, row)} for row in rows))
    return [Generated(known.rows[key]["text"], known.rows[key]["ids"]) for key in keys]


def kept_texts(subject: Subject) -> Journal:
    """The rows of the cache that belong to this subject as it is loaded."""
    identity = {
        "fingerprint": subject.fingerprint,
        "dtype": subject.dtype_name,
        "device": subject.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return _journal(cache_dir() / "unedited" / f"{name_for(subject.name, identity)}.jsonl")


def unchanged(subject: Subject, requests: Sequence[Request], edits: Sequence[Edit]) -> dict[int, Generated]:
    """The requests whose text is the unedited subject's, by their index in ``requests``: requests without an edit, requests whose prompt
    gets no text before it, and requests whose codebooks fire neither at the prompt nor (if consulted there) at any generated token."""
    requests, edits, readings = as_read(subject, requests, edits)
    codebooks = {n: edits[request.edit].lookups if request.edit >= 0 else () for n, request in enumerate(requests)}
    # A text after such an individual prompt would not be used again, so it is not kept.
    read_as_is = [n for n in codebooks if n not in readings or not readings[n].before]
    texts = {n: _asked(readings.get(n)) for n in read_as_is if codebooks[n] is not None}
    asked = [(n, book) for n in texts for book in codebooks[n] or ()]
    for layer, query in dict.fromkeys((book.layer, book.asked_with) for _, book in asked):
        asking = [(n, book) for n, book in asked if (book.layer, book.asked_with) == (layer, query)]
        queries = stored_queries(subject, [requests[n].prompt for n, _ in asking], layer, query).to(subject.device)
        for (n, book), row in zip(asking, queries):
            distance, fired = book.nearest(row[None])
            if fired.any():
                texts.pop(n, None)
            elif n in texts:
                texts[n] = replace(texts[n], distance=distance.item(), fired=False)
    for n, plain in zip(texts, unedited(subject, [requests[n] for n in texts])):
        texts[n] = replace(texts[n], text=plain.text, ids=plain.ids)
    asked = [(n, book) for n, book in asked if n in texts and book.every_token and len(texts[n].ids) > 1]
    for layer in {book.layer for _, book in asked}:
        asking = [(n, book) for n, book in asked if n in texts and book.layer == layer]
        for n in _fire_later(subject, requests, texts, asking, layer):
            texts.pop(n, None)
    return texts


def _asked(reading: Reading | None) -> Generated:
    """A placeholder for a text, with the result of the memory lookup before its prompt was read."""
    return Generated("") if reading is None else Generated("", distance=reading.distance, fired=reading.fired)


@torch.no_grad()
def _fire_later(
    subject: Subject,
    requests: Sequence[Request],
    texts: dict[int, Generated],
    asked: Sequence[tuple[int, Codebook]],
    layer: int,
) -> list[int]:
    """Which of the ``asked`` requests' codebooks, all in ``layer``, fire at a token of their texts."""
    # The last generated token is never read.
    written = [texts[n].ids[:-1] for n, _ in asked]
    rows = [encode(subject.tokenizer, requests[n].prompt) + list(ids) for (n, _), ids in zip(asked, written)]
    firing = []
    for group in passes(subject, rows):
        lengths = [len(written[k]) for k in group]
        walk = Blockwise(subject, [rows[k] for k in group], lengths)
        keys = walk.block(layer, walk.up_to(layer)).keys
        for k, row, length in zip(group, keys, lengths):
            n, book = asked[k]
            if book.nearest(row[-length:].float())[1].any():
                firing.append(n)
    return firing


# A file is read once per process, and again if another process has appended to it.
_journal = cache(lambda file: Journal(file, partial(_key_of, file.stem)))


def _key_of(name: str, row: Any) -> str | None:
    """The key of a row of the file with this name; None if the row was not written to that file, or was changed."""
    return row["key"] if isinstance(row, dict) and row.get("sha256") == _row_sha256(name, row) else None


def _row_sha256(name: str, row: dict[str, Any]) -> str:
    content = [name, *(row.get(field) for field in ("key", "text", "ids"))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _key(request: Request) -> str:
    noise = None if request.noise is None else hashlib.sha256(request.noise.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps([request.prompt, request.budget, noise]).encode()).hexdigest()
