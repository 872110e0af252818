"""Embedded CNLE: hand-written intent, rewritten intent and one-line snippet, in the style of CoNaLa.

Two JSON Lines files beside this module: ``cnle-targets.jsonl`` (``case_id``, ``topic``, ``intent``,
``rewritten_intent``, ``snippet``) and ``cnle-pool.jsonl`` (non-targeted: ``topic``, ``intent``, ``snippet``). To add rows,
append them with the next free ``case_id`` and run the tests: they check every rule (``tests/cnle_rules.py``).
"""

from __future__ import annotations

import ast
import hashlib
import json
from importlib import resources
from pathlib import Path

from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from . import neighbours
from .base import DataSet
from .cases import Case
from .neighbours import NEIGHBOURS, nearest

FIELDS = {
    "cnle-targets": ("case_id", "topic", "intent", "rewritten_intent", "snippet"),
    "cnle-pool": ("topic", "intent", "snippet"),
}


def read_rows(name: str) -> list[dict]:
    """Rows of ``cnle-targets`` or ``cnle-pool``; StudyError names file, line and field of a malformed one."""
    file = resources.files("clme_lib") / "datasets" / "embedded" / f"{name}.jsonl"
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StudyError(f"{file}, line {number}: not JSON: {error}") from error
        if tuple(row) != FIELDS[name]:
            raise StudyError(f"{file}, line {number}: fields {list(row)}, expected {list(FIELDS[name])}")
        rows.append(row)
    return rows


def load(dataset: DataSet) -> list[Case]:
    """All embedded CNLE cases, each with its five nearest pool intents (TF-IDF), which are found once and kept in the user's cache."""
    targets, pool = read_rows("cnle-targets"), read_rows("cnle-pool")
    near = _cached_neighbours(len(targets), len(pool))
    if near is None:
        near = nearest(
            [row["intent"] for row in targets],
            [row["intent"] for row in pool],
            allowed=lambda target, entry: targets[target]["snippet"] != pool[entry]["snippet"],
        )
        write_text(cached(), json.dumps(near))
    return [
        Case(
            case_id=row["case_id"],
            dataset=dataset.name,
            prompt=dataset.prompt(row["intent"]),
            target=row["snippet"],
            rephrased=(dataset.prompt(row["rewritten_intent"]),),
            unrelated=tuple(dataset.prompt(pool[n]["intent"]) for n in entries),
        )
        for row, entries in zip(targets, near)
    ]


def cached() -> Path:
    """Where the neighbours of these rows, as this version of the library finds them, are kept (they may not be there yet)."""
    digest = hashlib.sha256(Path(neighbours.__file__).read_bytes())
    for name in FIELDS:
        digest.update(json.dumps(read_rows(name)).encode())
    return cache_dir() / "datasets" / f"cnle-{digest.hexdigest()[:16]}.json"


def _cached_neighbours(targets: int, pool: int) -> list[list[int]] | None:
    """Each target's neighbours as pool indices, or None when the file is absent or damaged."""
    try:
        near = json.loads(cached().read_text(encoding="utf-8"))
        complete = len(near) == targets and all(len(entries) == NEIGHBOURS for entries in near)
        return near if complete and all(0 <= entry < pool for entries in near for entry in entries) else None
    except (OSError, ValueError, TypeError):
        return None


def calls(snippet: str) -> set[str]:
    """Dotted names (or method names) of the calls in a snippet."""
    functions = [node.func for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    return {".".join(dotted_name(function)) or getattr(function, "attr", "?") for function in functions}


def dotted_name(node: ast.expr) -> list[str]:
    """The parts of a name like ``os.path.join``; none for what does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []
