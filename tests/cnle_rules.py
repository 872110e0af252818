"""The rules of embedded CNLE's hand-written rows; a row that breaks one fails the tests."""

import ast
import importlib
import io
import re
import sys
import tokenize

SNIPPET_LENGTH = (15, 90)
MAX_SNIPPET_JACCARD = 0.7

# what a bare name stands for in snippets that, like CoNaLa's, leave the import out
ALIASES = {
    "np": "numpy",
    "pd": "pandas",
    "plt": "matplotlib.pyplot",
    "sns": "seaborn",
    "ET": "xml.etree.ElementTree",
}
LIBRARIES = {"numpy", "pandas", "matplotlib", "seaborn", "scipy", "sklearn", "requests", "PIL", "bs4"}


def problems(targets: list[dict], pool: list[dict]) -> list[str]:
    """Every rule a row breaks, one line each; empty when all is well."""
    broken = []
    ids = [row["case_id"] for row in targets]
    if len(set(ids)) != len(ids):
        broken.append("case_id: not unique")
    low, high = SNIPPET_LENGTH
    earlier: list[tuple[str, set[str]]] = []
    intents: set[str] = set()
    for row in [*targets, *pool]:
        snippet, where = row["snippet"], f"{row.get('case_id', 'pool')}: {row['snippet']}"
        if not low <= len(snippet) <= high or "\n" in snippet or snippet != snippet.strip() or not snippet.isascii():
            broken.append(f"{where}: not one trimmed ASCII line of {low} to {high} characters")
        try:
            if missing := missing_attributes(snippet):
                broken.append(f"{where}: does not exist: {', '.join(missing)}")
        except SyntaxError:
            broken.append(f"{where}: does not parse")
            continue
        tokens = code_tokens(snippet)
        for earlier_snippet, earlier_tokens in earlier:
            if jaccard(tokens, earlier_tokens) > MAX_SNIPPET_JACCARD:
                broken.append(f"{where}: too close to {earlier_snippet}")
        earlier.append((snippet, tokens))
        wordings = [row["intent"], *([row["rewritten_intent"]] if "rewritten_intent" in row else [])]
        for wording in wordings:
            if not 4 <= len(wording.split()) <= 30 or not wording.isascii() or wording.count("`") % 2:
                broken.append(f"{where}: wording needs 4 to 30 ASCII words and paired back-quotes: {wording}")
        if len(wordings) == 2 and jaccard(*(set(re.findall(r"[a-z0-9_]+", text.lower())) for text in wordings)) > 0.7:
            broken.append(f"{where}: the rewritten intent repeats the intent")
        if row["intent"].lower() in intents:
            broken.append(f"{where}: intent used twice")
        intents.add(row["intent"].lower())
    return broken


def code_tokens(snippet: str) -> set[str]:
    """The set of Python tokens of a snippet."""
    skipped = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
    return {t.string for t in tokenize.generate_tokens(io.StringIO(snippet).readline) if t.type not in skipped}


def jaccard(left: set, right: set) -> float:
    """Size of the intersection over size of the union."""
    return len(left & right) / len(left | right) if left | right else 1.0


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
        elif isinstance(node, ast.Attribute) and (dotted := dotted_name(node)) and dotted[0] not in assigned:
            root = ALIASES.get(dotted[0], dotted[0])
            if root.split(".")[0] in LIBRARIES | sys.stdlib_module_names:
                named.append((root, dotted[1:]))
    return [".".join([module, *path]) for module, path in named if not exists(module, path)]


def dotted_name(node: ast.expr) -> list[str]:
    """The parts of a name like ``os.path.join``; none for what does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def exists(module: str, path: list[str]) -> bool:
    try:
        current = importlib.import_module(module)
    except ImportError:
        return module.split(".")[0] in LIBRARIES
    for part in path:
        if not hasattr(current, part):
            try:
                importlib.import_module(f"{current.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        current = getattr(current, part)
    return True
