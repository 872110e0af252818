"""The unedited subject's own continuations of unrelated prompts: what specificity compares with.

Generated once per subject, weights, dtype, kind of device and decoding settings, and kept in the user's cache by
the prompt's hash. The unedited row of a table never reads a *generation* from here: it generates anew, and so measures
how much two generations of the same model differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .embedded_subject import cache_dir
from .generation import SPECIFICITY_TOKENS, Request, generate
from .jsonl import append_rows, read_rows
from .subjects import Subject


def answers_for(subject: Subject, prompts: Sequence[str]) -> list[str]:
    """Greedy 16-token continuations of ``prompts`` by the unedited subject, cached on disk."""
    file = _cache_file(subject)
    known = {row["prompt_sha256"]: row["answer"] for row in read_rows(file)}
    keys = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts) if key not in known}
    if missing:
        made = generate(subject, [Request(prompt, SPECIFICITY_TOKENS) for prompt in missing.values()])
        rows = [{"prompt_sha256": key, "answer": one.text} for key, one in zip(missing, made)]
        append_rows(file, rows)
        known.update((row["prompt_sha256"], row["answer"]) for row in rows)
    return [known[key] for key in keys]


def _cache_file(subject: Subject) -> Path:
    settings = {
        "fingerprint": subject.fingerprint,
        "dtype": subject.dtype_name,
        "device": subject.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "decoding": f"greedy, {SPECIFICITY_TOKENS} new tokens",
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "answers" / f"{subject.name.replace('/', '--')}-{key}.jsonl"
