"""Embedded CSNE: functions and the first sentence of their docstring, mined from the packages the study installs.

Nothing mined is committed. The set is built once on the user's machine from pinned, pure-Python sources (no standard
library and no torch: their text depends on the build), so every supported Python gives the same set; its
SHA-256 is committed in ``embedded/csne.json`` and checked. Rules follow CodeSearchNet's construction: docstring and comments cut
out of the code, first sentence as the description, at most 256 tokens, near-duplicates removed.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import io
import json
import re
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from .. import embedded_subject
from ..errors import StudyError
from ..jsonl import write_text
from ..prompts import make_prompt
from ..seeds import seed_of
from .cases import Case
from .neighbours import nearest
from .renaming import Substitutes, eligible_names, rename, verified

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
PACKAGE_QUOTA = 155  # of 2,800: well under the bound of 15 % from one package
MAX_TOKENS = 256
MAX_CHARACTERS = 1_500  # nothing longer has 256 tokens or fewer in practice; spares the costly checks

# tests, vendored and generated files, and numpy.distutils, which wheels for Python 3.12 and later leave out
_SKIPPED_PARTS = re.compile(
    r"test|vendor|distutils|extern|_libs|deprecat|conftest|__config__|version|generated|benchmark", re.I
)
_ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`")
_POINTER = re.compile(
    r"https?:|www\.|TODO|FIXME|XXX|[Dd]eprecat|\b[Ss]ee\b|[Ss]ame as|[Ss]imilar to|[Jj]ust like|[Ll]ike `|above|below|"
    r"[Ww]rapper for|[Aa]lias|[Oo]verrid|[Rr]eference implementation|docstring|[Nn]ot implemented|>>>|\||\.\.|^\W",
)
_OPENINGS = re.compile(r"(This|These|That|We|I|Maybe|Note|It|Also|And|But|If|When|For|Please|Notes?:)\b")


@dataclass(frozen=True)
class MinedFunction:
    """One accepted function: where it is from, its code without docstring and comments, and its description."""

    origin: str  # "package path qualified.name"
    package: str
    code: str
    doc: str


def load() -> list[Case]:
    """The embedded CSNE cases; see :func:`load_content`."""
    return _cases(load_content())


def is_mined() -> bool:
    """Whether the set is in the cache, so that loading it mines nothing."""
    return cached().is_file()


def cached() -> Path:
    """Where the committed set is kept once it has been mined."""
    return embedded_subject.cache_dir() / "datasets" / f"csne-{_committed()['sha256'][:16]}.json"


def _committed() -> dict:
    return json.loads((_resource() / "csne.json").read_text(encoding="utf-8"))


def load_content() -> dict:
    """Targets and pool as plain data (see :func:`build`): mined on first use (under a minute), then read from the cache.

    Raises:
        StudyError: a package is missing or differs from its pin, so the set would not be the committed one.
    """
    committed, file = _committed(), cached()
    if file.is_file():
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content_sha256(content) == committed["sha256"]:
                return content
        # damaged or edited: mined anew below
    _require_pinned(committed["packages"])
    content = build()
    if content_sha256(content) != committed["sha256"]:
        raise StudyError(
            f"the mined CSNE set has SHA-256 {content_sha256(content)}, committed is {committed['sha256']}: "
            "an installed package was modified; reinstall with `pip install --force-reinstall -c constraints.txt -e .`"
        )
    write_text(file, json.dumps(content))
    return content


def _require_pinned(pinned: dict[str, str]) -> None:
    installed = installed_versions()
    different = [
        f"{name} {installed.get(name, 'not installed')} (pinned: {version})"
        for name, version in sorted(pinned.items())
        if installed.get(name) != version
    ]
    if different:
        raise StudyError(
            f"embedded CSNE is mined from pinned packages, and these differ: {', '.join(different)}. "
            "Install with `pip install -c constraints.txt -e .`, or use source='published' or a file."
        )


def build() -> dict:
    """Mine, rename, and find neighbours; returns the set as plain data, ``{"targets": [...], "pool": [...]}``."""
    functions = mine()
    trees = {f.origin: _definition(f.code) for f in functions}
    substitutes = Substitutes(trees.values())
    targets: list[tuple[MinedFunction, str]] = []
    pool: list[MinedFunction] = []
    for function in sorted(functions, key=lambda f: seed_of("csne", f.origin)):
        variant = ""
        if len(targets) < TARGETS and len(eligible_names(trees[function.origin])) >= 2:
            mapping = substitutes.choose(trees[function.origin])
            variant = rename(function.code, mapping)
            if len(mapping) < 2 or not verified(function.code, variant, mapping):
                variant = ""
        if variant:
            targets.append((function, variant))
        else:
            pool.append(function)
    pool = pool[:POOL]
    neighbours = nearest(
        [f.code for f, _ in targets],
        [f.code for f in pool],
        allowed=lambda target, other: targets[target][0].doc != pool[other].doc,
        groups=([f.package for f, _ in targets], [f.package for f in pool]),
        from_other_groups=2,
    )
    return {
        "targets": [
            {"case_id": n, **asdict(f), "variant": variant, "neighbours": near}
            for n, ((f, variant), near) in enumerate(zip(targets, neighbours))
        ],
        "pool": [asdict(f) for f in pool],
    }


def mine() -> list[MinedFunction]:
    """All accepted functions, package by package in name order, near-duplicates and repeated sentences removed."""
    found: list[MinedFunction] = []
    for distribution, package in sorted(PACKAGES.items()):
        found += _distinct(_package_functions(distribution, package))[:PACKAGE_QUOTA]
    return _distinct(found)


def content_sha256(content: dict) -> str:
    """Hash of the set, independent of JSON's layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Installed versions of the mined distributions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def first_sentence(docstring: str) -> str | None:
    """The description a docstring opens with, or None when it is not one that stands alone."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    text = _ROLE.sub(r"\1", " ".join(paragraph.split())).replace("``", "`")
    sentence = re.split(r"(?<=[.!?])\s", text)[0]
    if not sentence.endswith(".") or sentence.endswith(("e.g.", "i.e.", "etc.", "vs.")):
        return None
    words = sentence.split()
    good = 4 <= len(words) <= 30 and sentence[0].isupper() and sentence.isascii()
    if not good or _POINTER.search(sentence) or _OPENINGS.match(sentence) or sentence.count("`") % 2:
        return None
    return sentence


def _package_functions(distribution: str, package: str) -> Iterator[MinedFunction]:
    """Functions of one distribution, files in an order given by their paths' hashes, until there are enough."""
    files = [
        file
        for file in importlib.metadata.files(distribution) or []
        if file.suffix == ".py" and file.parts[0] == package and not _SKIPPED_PARTS.search(str(file))
    ]
    accepted = 0
    for file in sorted(files, key=lambda file: seed_of("csne", file.as_posix())):
        try:
            source = Path(str(file.locate())).read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in third-party sources
                tree = ast.parse(source)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = source.split("\n")
        for name, node in _definitions(tree):
            mined = _accept(lines, name, node)
            if mined:
                accepted += 1
                yield MinedFunction(f"{package} {file.as_posix()} {name}", package, *mined)
        if accepted >= 1.5 * PACKAGE_QUOTA:  # some of them will prove near-duplicates
            return


@cache
def tokenizer():
    """The embedded subject's, which counts tokens where no other is at hand."""
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
    doc = first_sentence(docstring) if docstring else None
    if doc is None:
        return None
    code = _without_docstring_and_comments(lines, node)
    if code is None or not code.isascii() or code.count("\n") < 2:
        return None
    return (code, doc) if len(tokenizer().encode(code, add_special_tokens=False).ids) <= MAX_TOKENS else None


def _without_docstring_and_comments(lines: list[str], node: ast.FunctionDef) -> str | None:
    doc = node.body[0]
    signature_end = max(doc.lineno - 1, node.lineno)
    kept = [*lines[node.lineno - 1 : signature_end], *lines[doc.end_lineno or 0 : node.end_lineno]]
    code = textwrap.dedent("\n".join(kept))
    if len(code) > 2 * MAX_CHARACTERS:  # comments are still in it
        return None
    try:
        comments = [
            token.start
            for token in tokenize.generate_tokens(io.StringIO(code).readline)
            if token.type == tokenize.COMMENT
        ]
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return None
    rows = code.split("\n")
    for row, column in comments:
        rows[row - 1] = rows[row - 1][:column].rstrip() or "\0"
    code = "\n".join(row for row in rows if row != "\0").strip("\n")
    if len(code) > MAX_CHARACTERS:
        return None
    try:
        again = ast.parse(code)
    except (SyntaxError, ValueError):
        return None
    node.decorator_list = []
    expected = ast.Module(body=[node], type_ignores=[])
    node.body = node.body[1:]
    # what is left must be the same function: a docstring sharing its line with code, or a dedent inside a string, is not
    same = ast.dump(again) == ast.dump(expected)
    return code if same else None


def _distinct(functions: Iterator[MinedFunction] | list[MinedFunction]) -> list[MinedFunction]:
    """Drop functions whose tokens nearly repeat an earlier one's (set Jaccard >= 0.8, multiset >= 0.7) or whose doc does."""
    from scipy.sparse import csr_matrix

    functions = list(functions)
    if not functions:
        return []
    bags = [Counter(re.findall(r"\w+", f.code)) for f in functions]
    vocabulary = {word: n for n, word in enumerate(sorted({word for bag in bags for word in bag}))}
    rows = [n for n, bag in enumerate(bags) for _ in bag]
    columns = [vocabulary[word] for bag in bags for word in bag]
    incidence = csr_matrix(([1] * len(rows), (rows, columns)), shape=(len(bags), len(vocabulary)))
    shared = (incidence @ incidence.T).tocoo()
    close: dict[int, list[int]] = {}
    for one, other, common in zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist()):
        # compared as integers: no rounding decides membership
        if other < one and 10 * common >= 8 * (len(bags[one]) + len(bags[other]) - common):
            close.setdefault(one, []).append(other)
    kept: list[MinedFunction] = []
    removed: set[int] = set()
    sentences: set[str] = set()
    for n, function in enumerate(functions):
        repeats = any(
            other not in removed and 10 * (bags[n] & bags[other]).total() >= 7 * (bags[n] | bags[other]).total()
            for other in close.get(n, ())
        )
        if repeats or function.doc in sentences:
            removed.add(n)
            continue
        sentences.add(function.doc)
        kept.append(function)
    return kept


def _definition(code: str) -> ast.FunctionDef:
    node = ast.parse(code).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def _cases(content: dict) -> list[Case]:
    pool = content["pool"]
    return [
        Case(
            case_id=row["case_id"],
            dataset="csne",
            prompt=make_prompt("csne", row["code"]),
            target=row["doc"],
            rephrased=(make_prompt("csne", row["variant"]),),
            unrelated=tuple(make_prompt("csne", pool[n]["code"]) for n in row["neighbours"]),
        )
        for row in content["targets"]
    ]


def _resource():
    return resources.files("clme_lib") / "datasets" / "embedded"


def commit_hash() -> str:
    """Mine anew and record the set's hash and the packages it came from in ``embedded/csne.json`` (after a pin changed)."""
    digest = content_sha256(build())
    content = json.dumps({"sha256": digest, "packages": installed_versions()}, indent=1)
    write_text(Path(str(_resource() / "csne.json")), content + "\n")
    return digest


if __name__ == "__main__":
    print(commit_hash())
