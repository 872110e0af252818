"""Embedded CNLE: hand-written intent, rewritten intent and one-line snippet, in the style of CoNaLa.

JSON Lines files in ``embedded``: ``cnle-targets.jsonl`` (``case_id``, ``topic``, ``intent``,
``rewritten_intent``, ``snippet``), ``cnle-pool.jsonl`` (non-targeted: ``topic``, ``intent``, ``snippet``) and ``cnle-checks.jsonl``
(``case_id``, ``setup``, ``test``: what :class:`~clme_lib.support.sandbox.Check` is made of). To add rows, append them with the next free
``case_id`` and run the tests: they check every rule (``tests/cnle_rules.py``, ``tests/test_checks.py``).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.reading import parse_json
from ..support.sandbox import Check
from . import neighbours
from .base import EMBEDDED, Dataset
from .cases import Case
from .neighbours import NEIGHBOURS, nearest

FIELDS = {
    "cnle-targets": ("case_id", "topic", "intent", "rewritten_intent", "snippet"),
    "cnle-pool": ("topic", "intent", "snippet"),
    "cnle-checks": ("case_id", "setup", "test"),
}


def read_rows(name: str) -> list[dict]:
    """Rows of ``cnle-targets`` or ``cnle-pool``; StudyError names file, line and field of a malformed one."""
    file = EMBEDDED / f"{name}.jsonl"
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = parse_json(line, f"{file}, line {number}")
        if tuple(row) != FIELDS[name]:
            raise StudyError(f"{file}, line {number}: fields {list(row)}, expected {list(FIELDS[name])}")
        rows.append(row)
    return rows


def load(dataset: Dataset) -> list[Case]:
    """All embedded CNLE cases, each with its five nearest pool intents (TF-IDF), which are computed once and cached."""
    targets, pool = read_rows("cnle-targets"), read_rows("cnle-pool")
    checks = {row["case_id"]: Check(row["setup"], row["test"]) for row in read_rows("cnle-checks")}
    intents = [row["intent"] for row in pool]
    cases = [
        Case.of(
            dataset,
            row["case_id"],
            row["intent"],
            row["snippet"],
            [row["rewritten_intent"]],
            [intents[n] for n in entries],
        )
        for row, entries in zip(targets, _neighbours(targets, pool))
    ]
    return [replace(case, check=checks.get(case.case_id)) for case in cases]


def cached() -> Path:
    """The cache file of these rows' neighbours as this version of the library computes them (it may not exist yet)."""
    digest = hashlib.sha256(Path(neighbours.__file__).read_bytes())
    for name in ("cnle-targets", "cnle-pool"):
        digest.update(json.dumps(read_rows(name)).encode())
    return cache_dir() / "datasets" / f"cnle-{digest.hexdigest()[:16]}.json"


def _neighbours(targets: list[dict], pool: list[dict]) -> list[list[int]]:
    """Each target's neighbours as pool indices, computed again if the file is absent or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        near = json.loads(cached().read_text(encoding="utf-8"))
        complete = [len(entries) for entries in near] == [NEIGHBOURS] * len(targets)
        if complete and all(0 <= entry < len(pool) for entries in near for entry in entries):
            return near
    near = nearest(
        [row["intent"] for row in targets],
        [row["intent"] for row in pool],
        allowed=lambda target, entry: targets[target]["snippet"] != pool[entry]["snippet"],
    )
    write_text(cached(), json.dumps(near))
    return near


def calls(snippet: str) -> set[str]:
    """Dotted names (or method names) of the calls in a snippet."""
    functions = [node.func for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    names = {ast.unparse(function): function for function in functions}
    return {
        name if re.fullmatch(r"[\w.]+", name) else getattr(function, "attr", "?") for name, function in names.items()
    }
