"""Embedded CSNE: functions and the first sentence of their docstring, mined from the packages the study installs.

No mined text is committed. The set is built once on the user's machine from pinned, pure-Python sources (not the standard
library or torch, whose text depends on the build), so every supported Python gives the same set; its
SHA-256 is committed in ``embedded/csne.json`` and checked. The rules follow CodeSearchNet's construction: docstring and comments are cut
out of the code, the first sentence is the description, there are at most 256 tokens, and near-duplicates are removed.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ..subjects import embedded as embedded_subject
from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.seeds import seed_of
from .base import EMBEDDED, Dataset
from .cases import Case
from .neighbours import nearest
from .paper import CSNE
from .renaming import Substitutes, choose_names, rename, verified
from .source_code import bare_code, description, parsed, single_function, source_lines

COMMITTED = EMBEDDED / "csne.json"
# distribution -> import package; all of them are installed with clme_lib itself
PACKAGES = {
    "absl-py": "absl", "accelerate": "accelerate", "fonttools": "fontTools", "fsspec": "fsspec", "gguf": "gguf",
    "huggingface-hub": "huggingface_hub", "jinja2": "jinja2", "joblib": "joblib", "matplotlib": "matplotlib",
    "mpmath": "mpmath", "networkx": "networkx", "nltk": "nltk", "numpy": "numpy", "packaging": "packaging",
    "pandas": "pandas", "pillow": "PIL", "pyarrow": "pyarrow", "pydantic": "pydantic", "requests": "requests",
    "sacrebleu": "sacrebleu", "scikit-learn": "sklearn", "scipy": "scipy", "seaborn": "seaborn", "sympy": "sympy",
    "transformers": "transformers", "urllib3": "urllib3",
}  # fmt: skip
TARGETS = 600
POOL = 2_200
PACKAGE_QUOTA = 155  # of 2,800: well under the limit of 15% from one package
MAX_TOKENS = 256
_MAX_CHARACTERS = 1_500  # in practice, longer code has more than 256 tokens; this avoids the costly checks

# tests, vendored and generated files, and numpy.distutils, which wheels for Python 3.12 and later leave out
_SKIPPED_PARTS = re.compile(
    r"test|vendor|distutils|extern|_libs|deprecat|conftest|__config__|version|generated|benchmark", re.I
)


def load(dataset: Dataset) -> list[Case]:
    """The embedded CSNE cases; see :func:`load_content`."""
    content = load_content()
    codes = [row["code"] for row in content["pool"]]
    return [
        Case.of(
            dataset, row["case_id"], row["code"], row["doc"], [row["variant"]], [codes[n] for n in row["neighbours"]]
        )
        for row in content["targets"]
    ]


def is_mined() -> bool:
    """Whether the set is in the cache, so that loading it mines nothing."""
    return cached().is_file()


def cached() -> Path:
    """The cache file of the committed set once it has been mined."""
    return cache_dir() / "datasets" / f"csne-{_committed()['sha256'][:16]}.json"


def load_content() -> dict:
    """Targets and pool as plain data (see :func:`build`): mined on first use (under a minute), then read from the cache.

    Raises:
        StudyError: a package is missing or differs from its pin, so the set would not be the committed one.
    """
    committed, file = _committed(), cached()
    with contextlib.suppress(OSError, ValueError):  # absent, damaged or edited: mined anew below
        content = json.loads(file.read_text(encoding="utf-8"))
        if content_sha256(content) == committed["sha256"]:
            return content
    installed = installed_versions()
    different = [
        f"{name} {installed.get(name, 'not installed')} (pinned: {version})"
        for name, version in sorted(committed["packages"].items())
        if installed.get(name) != version
    ]
    if different:
        raise StudyError(
            f"embedded CSNE is mined from pinned packages, and the installed ones differ: {', '.join(different)}. "
            "Install with `pip install -c constraints.txt -e .`, or use source='published' or a file."
        )
    content = build()
    if (digest := content_sha256(content)) != committed["sha256"]:
        raise StudyError(
            f"the mined CSNE set has SHA-256 {digest}, but the committed hash is {committed['sha256']}: "
            "an installed package was modified; reinstall with `pip install --force-reinstall -c constraints.txt -e .`"
        )
    write_text(file, json.dumps(content))
    return content


def content_sha256(content: dict) -> str:
    """Hash of the set, independent of JSON's layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def commit_hash() -> str:
    """Mine again and record the set's hash and source packages in ``embedded/csne.json`` (after a pin changed)."""
    digest = content_sha256(build())
    write_text(COMMITTED, json.dumps({"sha256": digest, "packages": installed_versions()}, indent=1) + "\n")
    return digest


def _committed() -> dict:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class MinedFunction:
    """One accepted function: its origin, its code without docstring and comments, and its description."""

    origin: str  # "package path qualified.name"
    package: str
    code: str
    doc: str


def build() -> dict:
    """Mine, rename, and find neighbours; returns the set as plain data, ``{"targets": [...], "pool": [...]}``."""
    functions = mined_functions()
    trees = {f.origin: tree for f in functions if (tree := single_function(f.code))}
    substitutes = Substitutes(trees.values())
    targets: list[tuple[MinedFunction, str]] = []
    pool: list[MinedFunction] = []
    for function in sorted(functions, key=lambda f: seed_of(CSNE.name, f.origin)):
        mapping = choose_names(trees[function.origin], substitutes.substitute) if len(targets) < TARGETS else {}
        variant = rename(function.code, mapping)
        if len(mapping) >= 2 and verified(function.code, variant, mapping):
            targets.append((function, variant))
        else:
            pool.append(function)
    pool = pool[:POOL]
    neighbours = nearest(
        [f.code for f, _ in targets],
        [f.code for f in pool],
        allowed=lambda target, entry: targets[target][0].doc != pool[entry].doc,
        groups=([f.package for f, _ in targets], [f.package for f in pool]),
    )
    return {
        "targets": [
            {"case_id": n, **asdict(f), "variant": variant, "neighbours": near}
            for n, ((f, variant), near) in enumerate(zip(targets, neighbours))
        ],
        "pool": [asdict(f) for f in pool],
    }


def mined_functions() -> list[MinedFunction]:
    """All accepted functions, package by package in name order, near-duplicates and repeated sentences removed."""
    functions: list[MinedFunction] = []
    for distribution in sorted(PACKAGES):
        # Some of them will prove near-duplicates.
        candidates = package_functions(distribution, math.ceil(1.5 * PACKAGE_QUOTA))
        functions += distinct(candidates)[:PACKAGE_QUOTA]
    return distinct(functions)


def installed_versions() -> dict[str, str]:
    """Installed versions of the mined distributions."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def sources(distribution: str) -> Iterator[tuple[str, list[str], ast.Module]]:
    """Path, lines and syntax tree of one distribution's files, in an order given by their paths' hashes."""
    files = [
        file
        for file in importlib.metadata.files(distribution) or []
        if file.suffix == ".py" and file.parts[0] == PACKAGES[distribution] and not _SKIPPED_PARTS.search(str(file))
    ]
    for file in sorted(files, key=lambda file: seed_of(CSNE.name, file.as_posix())):
        try:
            source = Path(str(file.locate())).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if tree := parsed(source):
            yield file.as_posix(), source_lines(source), tree


def package_functions(distribution: str, most: int) -> Iterator[MinedFunction]:
    """Accepted functions of one distribution, file by file until there are ``most``, with all of the last file."""
    package, accepted = PACKAGES[distribution], 0
    for path, lines, tree in sources(distribution):
        for name, node in _definitions(tree):
            if code_and_doc := _accept(lines, name, node):
                accepted += 1
                yield MinedFunction(f"{package} {path} {name}", package, *code_and_doc)
        if accepted >= most:
            return


@cache
def _tokenizer():
    """The embedded subject's tokenizer, which counts the tokens."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(embedded_subject.ensure() / "tokenizer.json"))


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods with their qualified names; functions inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _definitions(node, prefix)


def _accept(lines: list[str], name: str, node: ast.FunctionDef) -> tuple[str, str] | None:
    """(code, description) of a function that meets the rules."""
    if "test" in name.lower() or node.name.startswith("__") or len(node.body) < 2:
        return None
    docstring = ast.get_docstring(node, clean=False)
    doc = description(docstring) if docstring else None
    code = bare_code(lines, node, longest=2 * _MAX_CHARACTERS) if doc else None
    if doc is None or code is None or not code.isascii() or code.count("\n") < 2 or len(code) > _MAX_CHARACTERS:
        return None
    return (code, doc) if len(_tokenizer().encode(code, add_special_tokens=False).ids) <= MAX_TOKENS else None


def distinct(candidates: Iterable[MinedFunction]) -> list[MinedFunction]:
    """Drop functions whose tokens or doc nearly repeat an earlier one's (set Jaccard >= 0.8, multiset >= 0.7)."""
    from sklearn.feature_extraction.text import CountVectorizer

    functions = list(candidates)
    if not functions:
        return []
    bags = [Counter(re.findall(r"\w+", f.code)) for f in functions]
    incidence = CountVectorizer(analyzer=list, binary=True).fit_transform(bags)
    shared = (incidence @ incidence.T).tocoo()
    close: dict[int, list[int]] = {}
    for later, earlier, common in zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist()):
        # compared as integers, so that no rounding decides membership
        if earlier < later and 10 * common >= 8 * (len(bags[later]) + len(bags[earlier]) - common):
            close.setdefault(later, []).append(earlier)
    kept: dict[int, MinedFunction] = {}
    sentences: set[str] = set()
    for n, function in enumerate(functions):
        repeats = any(
            earlier in kept and 10 * (bags[n] & bags[earlier]).total() >= 7 * (bags[n] | bags[earlier]).total()
            for earlier in close.get(n, ())
        )
        if not repeats and function.doc not in sentences:
            sentences.add(function.doc)
            kept[n] = function
    return list(kept.values())


if __name__ == "__main__":
    print(commit_hash())
