"""Embedded CNLE: hand-written intent, rewritten intent and one-line snippet, in the style of CoNaLa.

Two JSON Lines files beside this module: ``cnle-targets.jsonl`` (``case_id``, ``topic``, ``intent``,
``rewritten_intent``, ``snippet``) and ``cnle-pool.jsonl`` (non-targeted: ``topic``, ``intent``, ``snippet``). To add rows,
append them with the next free ``case_id`` and run the tests: they check every rule in :func:`problems`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import re
import sys
import tokenize
from importlib import resources
from pathlib import Path

from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from . import neighbours
from .base import DataSet
from .cases import Case
from .neighbours import NEIGHBOURS, nearest

TARGET_FIELDS = ("case_id", "topic", "intent", "rewritten_intent", "snippet")
POOL_FIELDS = ("topic", "intent", "snippet")
SNIPPET_LENGTH = (15, 90)
MAX_SNIPPET_JACCARD = 0.7

# what a bare name stands for in snippets that, like CoNaLa's, leave the import out
_ALIASES = {
    "np": "numpy",
    "pd": "pandas",
    "plt": "matplotlib.pyplot",
    "sns": "seaborn",
    "ET": "xml.etree.ElementTree",
}
_LIBRARIES = {"numpy", "pandas", "matplotlib", "seaborn", "scipy", "sklearn", "requests", "PIL", "bs4"}


def read_rows(name: str) -> list[dict]:
    """Rows of ``cnle-targets`` or ``cnle-pool``; StudyError names file, line and field of a malformed one."""
    file = resources.files("clme_lib") / "datasets" / "embedded" / f"{name}.jsonl"
    fields = TARGET_FIELDS if name == "cnle-targets" else POOL_FIELDS
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StudyError(f"{file}, line {number}: not JSON: {error}") from error
        if tuple(row) != fields:
            raise StudyError(f"{file}, line {number}: fields {list(row)}, expected {list(fields)}")
        rows.append(row)
    return rows


def load(dataset: DataSet) -> list[Case]:
    """All embedded CNLE cases, each with its five nearest pool intents (TF-IDF), which are found once and kept in the user's cache."""
    targets, pool = read_rows("cnle-targets"), read_rows("cnle-pool")
    found = _known(cached(), len(targets), len(pool))
    if found is None:
        found = nearest(
            [row["intent"] for row in targets],
            [row["intent"] for row in pool],
            allowed=lambda target, other: targets[target]["snippet"] != pool[other]["snippet"],
        )
        write_text(cached(), json.dumps(found))
    return [
        Case(
            case_id=row["case_id"],
            dataset=dataset.name,
            prompt=dataset.prompt(row["intent"]),
            target=row["snippet"],
            rephrased=(dataset.prompt(row["rewritten_intent"]),),
            unrelated=tuple(dataset.prompt(pool[n]["intent"]) for n in chosen),
        )
        for row, chosen in zip(targets, found)
    ]


def cached() -> Path:
    """Where the neighbours of these rows, as this version of the library finds them, are kept (they may not be there yet)."""
    digest = hashlib.sha256(Path(neighbours.__file__).read_bytes())
    for name in ("cnle-targets", "cnle-pool"):
        digest.update(json.dumps(read_rows(name)).encode())
    return cache_dir() / "datasets" / f"cnle-{digest.hexdigest()[:16]}.json"


def _known(file: Path, targets: int, pool: int) -> list[list[int]] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        complete = len(found) == targets and all(len(near) == NEIGHBOURS for near in found)
        return found if complete and all(0 <= one < pool for near in found for one in near) else None
    except (OSError, ValueError, TypeError):  # not there, or damaged: found anew
        return None


def code_tokens(snippet: str) -> set[str]:
    """The set of Python tokens of a snippet."""
    skipped = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
    return {t.string for t in tokenize.generate_tokens(io.StringIO(snippet).readline) if t.type not in skipped}


def calls(snippet: str) -> set[str]:
    """Dotted names (or method names) of the calls in a snippet."""
    names = set()
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Call):
            dotted = _dotted(node.func)
            names.add(".".join(dotted) if dotted else getattr(node.func, "attr", "?"))
    return names


def missing_attributes(snippet: str) -> list[str]:
    """Module attributes a snippet names that do not exist; libraries that are not installed are passed over."""
    tree = ast.parse(snippet)
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    named: list[tuple[str, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named += [(node.module or "", [alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute) and (dotted := _dotted(node)) and dotted[0] not in assigned:
            root = _ALIASES.get(dotted[0], dotted[0])
            if root.split(".")[0] in _LIBRARIES | sys.stdlib_module_names:
                named.append((root, dotted[1:]))
    return [".".join([module, *path]) for module, path in named if not _exists(module, path)]


def problems(targets: list[dict], pool: list[dict]) -> list[str]:
    """Every rule a row breaks, one line each; empty when all is well."""
    found = []
    ids = [row["case_id"] for row in targets]
    if len(set(ids)) != len(ids):
        found.append("case_id: not unique")
    low, high = SNIPPET_LENGTH
    seen: list[tuple[str, set[str]]] = []
    intents: set[str] = set()
    for row in [*targets, *pool]:
        snippet, where = row["snippet"], f"{row.get('case_id', 'pool')}: {row['snippet']}"
        if not low <= len(snippet) <= high or "\n" in snippet or snippet != snippet.strip() or not snippet.isascii():
            found.append(f"{where}: not one trimmed ASCII line of {low} to {high} characters")
        try:
            if missing := missing_attributes(snippet):
                found.append(f"{where}: does not exist: {', '.join(missing)}")
        except SyntaxError:
            found.append(f"{where}: does not parse")
            continue
        tokens = code_tokens(snippet)
        for other, other_tokens in seen:
            if jaccard(tokens, other_tokens) > MAX_SNIPPET_JACCARD:
                found.append(f"{where}: too close to {other}")
        seen.append((snippet, tokens))
        wordings = [row["intent"], *([row["rewritten_intent"]] if "rewritten_intent" in row else [])]
        for wording in wordings:
            if not 4 <= len(wording.split()) <= 30 or not wording.isascii() or wording.count("`") % 2:
                found.append(f"{where}: wording needs 4 to 30 ASCII words and paired back-quotes: {wording}")
        if len(wordings) == 2 and jaccard(_words(wordings[0]), _words(wordings[1])) > 0.7:
            found.append(f"{where}: the rewritten intent repeats the intent")
        if row["intent"].lower() in intents:
            found.append(f"{where}: intent used twice")
        intents.add(row["intent"].lower())
    return found


def jaccard(one: set, other: set) -> float:
    """Size of the intersection over size of the union."""
    return len(one & other) / len(one | other) if one | other else 1.0


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_]+", text.lower()))


def _dotted(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _exists(module: str, path: list[str]) -> bool:
    try:
        current = importlib.import_module(module)
    except ImportError:
        return module.split(".")[0] in _LIBRARIES
    for part in path:
        if not hasattr(current, part):
            try:
                importlib.import_module(f"{current.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        current = getattr(current, part)
    return True
