"""Text for training a subject further: functions and comment-statement pairs from the packages that embedded CSNE is mined from.

No text occurs in a case. A function is excluded if it is a target or neighbour of embedded CSNE, or a near-duplicate of one (by the rule that
deduplicates CSNE); a comment or statement is excluded if it has the words of an intent, rephrased intent, snippet or neighbour of embedded
CNLE. Some packages are held out entirely, to measure what was learnt.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Literal

from .embedded_cnle import read_rows
from .embedded_csne import PACKAGES, MinedFunction, distinct, load_content, package_functions, sources
from .paper import CNLE, CSNE
from .source_code import parsed

HELD_OUT = ("joblib", "networkx", "seaborn")  # distributions
_HELD_OUT_TEXTS = 100  # at most, of each kind
_FUNCTIONS, _PAIRS = 300, 2_000  # at most, per distribution
_LONGEST = 120  # characters of a statement
_SAYS_NOTHING = re.compile(r"[\[({]*[\w.-]*[\])}]*|'[^']*'")  # names and constants, empty collections
_OF_A_METHOD = re.compile(r"\b(self|cls|super)\b")
_NOT_A_REQUEST = re.compile(
    r"https?:|TODO|FIXME|XXX|HACK|noqa|type: |pragma|\b(above|below|here|see|we|this|these|that|it|also|if|when)\b",
    re.I,
)
# a comment that begins with a request for what the next statement does
_REQUEST = re.compile(
    r"(?:"
    r"add|adjust|aggregate|align|allocate|allow|append|apply|assign|average|avoid|backup|break|broadcast|build|"
    r"calculate|call|capitalize|cast|center|change|check|choose|clean|clear|clip|clone|close|collapse|collect|combine|"
    r"compare|compile|compute|concat|concatenate|construct|convert|copy|count|create|crop|cut|decode|decrease|"
    r"deduplicate|define|delete|determine|disable|discard|display|divide|download|draw|drop|dump|duplicate|enable|"
    r"encode|ensure|enumerate|escape|estimate|evaluate|exclude|execute|expand|export|extend|extract|fetch|fill|filter|"
    r"find|flatten|flip|force|format|gather|generate|get|group|handle|hash|hide|ignore|import|include|increase|"
    r"increment|indent|infer|initialize|insert|instantiate|interpolate|invert|iterate|join|keep|limit|list|load|"
    r"locate|look|lookup|lower|lowercase|make|map|mark|mask|match|merge|move|multiply|normalize|obtain|open|order|pad|"
    r"parse|pass|permute|pick|plot|pop|populate|prepare|prepend|preprocess|print|process|project|pull|push|put|query|"
    r"quote|raise|read|rearrange|rebuild|recompute|record|reduce|register|reload|remove|rename|render|reorder|repeat|"
    r"replace|reserve|reset|reshape|resize|resolve|restore|retrieve|return|reverse|rewrite|rotate|round|run|sample|"
    r"save|scale|scan|search|select|send|separate|serialize|set|shift|show|shuffle|simplify|skip|slice|solve|sort|"
    r"split|square|squeeze|stack|start|stop|store|strip|subtract|sum|swap|switch|take|test|transform|translate|"
    r"transpose|trim|truncate|turn|uncompress|unpack|unsqueeze|update|upload|uppercase|use|validate|verify|wait|warn|"
    r"wrap|write|zip"
    r")\b[^:;]*",
    re.I,
)


@dataclass(frozen=True)
class Text:
    """A text to learn."""

    package: str  # the distribution that the text comes from
    kind: Literal["function", "description", "snippet"]
    prompt: str  # what precedes the text; nothing precedes a function
    target: str


def training_texts() -> tuple[list[Text], list[Text]]:
    """The training texts and the held-out texts; StudyError as for embedded CSNE's mining."""
    texts = [*_functions(), *_pairs()]
    held_out: dict[str, list[Text]] = {}
    for text in texts:
        of_kind = held_out.setdefault(text.kind, [])
        if text.package in HELD_OUT and len(of_kind) < _HELD_OUT_TEXTS:
            of_kind.append(text)
    return [text for text in texts if text.package not in HELD_OUT], [*chain(*held_out.values())]


def texts_sha256(texts: list[Text]) -> str:
    """Hash of the texts and their order."""
    return hashlib.sha256(json.dumps([asdict(text) for text in texts]).encode()).hexdigest()


def _functions() -> Iterator[Text]:
    """Functions, every second one followed by its description in CSNE's form."""
    content = load_content()
    fields = MinedFunction.__dataclass_fields__
    of_cases = [MinedFunction(**{name: row[name] for name in fields}) for row in content["targets"] + content["pool"]]
    for distribution, package in sorted(PACKAGES.items()):
        taken = sum(function.package == package for function in of_cases)
        candidates = package_functions(distribution, 2 * (_FUNCTIONS + taken))
        # The first of several near-duplicates is kept, and a case's function comes first.
        others = distinct([*of_cases, *candidates])[len(of_cases) :]
        for n, function in enumerate(others[:_FUNCTIONS]):
            if n % 2:
                yield Text(distribution, "description", CSNE.prompt(function.code), function.doc)
            else:
                yield Text(distribution, "function", "", function.code)


def _pairs() -> Iterator[Text]:
    """Comments directly above a one-line statement, in CNLE's form."""
    targets, pool = read_rows("cnle-targets"), read_rows("cnle-pool")
    seen = {_words(row[field]) for row in targets + pool for field in ("intent", "snippet")}
    seen |= {_words(row["rewritten_intent"]) for row in targets}
    for distribution in sorted(PACKAGES):
        kept = 0
        for _, lines, tree in sources(distribution):
            for node in ast.walk(tree):
                pair = _pair(lines, node)
                words = set(map(_words, pair or ()))
                if pair and kept < _PAIRS and seen.isdisjoint(words):
                    seen |= words
                    kept += 1
                    yield Text(distribution, "snippet", CNLE.prompt(pair[0]), pair[1])


def _words(text: str) -> frozenset[str]:
    """The words of a text: equal for texts that differ only in case, punctuation, spacing or order."""
    return frozenset(re.findall(r"\w+", text.lower()))


def _pair(lines: list[str], node: ast.AST) -> tuple[str, str] | None:
    """(request, snippet) from a one-line statement below a one-line comment that asks for it."""
    if not isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)) or node.lineno < 2:
        return None
    line, comment = (lines[node.lineno - above].strip() for above in (1, 2))
    continued = node.lineno > 2 and lines[node.lineno - 3].strip().startswith("#")
    of_one_line = node.lineno == node.end_lineno and "#" not in line and len(line) <= _LONGEST
    if not comment.startswith("# ") or continued or not of_one_line or not (line + comment).isascii():
        return None
    request = comment[1:].strip().rstrip(".")
    if not 3 <= len(request.split()) <= 20 or not _REQUEST.fullmatch(request) or _NOT_A_REQUEST.search(request):
        return None
    value = node.value  # None of a bare return
    expression = lines[node.lineno - 1][value.col_offset : value.end_col_offset] if value else ""
    if _SAYS_NOTHING.fullmatch(expression) or _OF_A_METHOD.search(line):
        return None
    # Most of CNLE's snippets are expressions, so the assigned or returned value is the answer to the request.
    named = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    snippet = expression if named or isinstance(node, ast.Return) else line
    return (request[0].lower() + request[1:], snippet) if parsed(snippet) else None
