"""Python source: parsing, removing docstrings and comments, and extracting the sentence that describes a function."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import re
import textwrap
import tokenize
import warnings

Function = ast.FunctionDef | ast.AsyncFunctionDef

_ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`")
_POINTER = re.compile(
    r"https?:|www\.|TODO|FIXME|XXX|[Dd]eprecat|\b[Ss]ee\b|[Ss]ame as|[Ss]imilar to|[Jj]ust like|[Ll]ike `|above|below|"
    r"[Ww]rapper for|[Aa]lias|[Oo]verrid|[Rr]eference implementation|docstring|[Nn]ot implemented|>>>|\||\.\.|^\W"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\betc\.)\s|(?<=\betc\.)\s(?=[A-Z])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs)\.(\s|$)")
_DEEPEST = 150  # levels of a syntax tree
_OPENINGS = re.compile(r"(This|These|That|We|I|Maybe|Note|It|Also|And|But|If|When|For|Please|Notes?:)\b")


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, or None when ``code`` is not Python of this interpreter's version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def source_lines(code: str) -> list[str]:
    """The lines that syntax-tree positions refer to: they end at line feeds and at lone carriage returns, and nowhere else."""
    return code.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def single_function(code: str) -> Function | None:
    """The function that ``code`` defines, or None if it is not exactly one function, or is nested too deeply to process."""
    tree = parsed(code)
    node = tree.body[0] if tree and len(tree.body) == 1 else None
    level: list[ast.AST] = [node] if isinstance(node, Function) else []
    for _ in range(_DEEPEST):
        level = [child for parent in level for child in ast.iter_child_nodes(parent)]
    return node if isinstance(node, Function) and not level else None


def bare_code(lines: list[str], function: Function, longest: int | None = None) -> str | None:
    """A function's text from its ``def`` on, dedented, without docstring and comments and the lines that these leave empty.

    None if its docstring shares a line with code or is its whole body, if it is too long or cannot be tokenized, or if dedenting
    its lines would change anything else, such as a string.

    Args:
        lines: the source that ``function`` was parsed from, by :func:`source_lines`.
        longest: maximum number of characters, including comments.
    """
    kept, body = lines[function.lineno - 1 : function.end_lineno], function.body
    expected = copy.copy(function)
    expected.decorator_list = []
    if ast.get_docstring(function, clean=False) is not None:
        expected.body = body[1:]
        first, end = body[0].lineno - function.lineno, (body[0].end_lineno or 0) - function.lineno + 1
        if len(body) == 1 or first == 0 or body[1].lineno == body[0].end_lineno:
            return None
        del kept[first:end]
    code = textwrap.dedent("\n".join(kept))
    if longest is not None and len(code) > longest:
        return None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    columns = {token.start[0] - 1: token.start[1] for token in tokens if token.type == tokenize.COMMENT}
    lines = [line[: columns[n]].rstrip() if n in columns else line for n, line in enumerate(code.split("\n"))]
    bare = "\n".join(line for n, line in enumerate(lines) if line or n not in columns).strip("\n")
    made = single_function(bare)
    return bare if made and ast.dump(made) == ast.dump(expected) else None


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph; None with fewer than three words or more than sixty."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc("\n".join(source_lines(docstring))))[0]
    sentence = _SENTENCE_END.split(" ".join(paragraph.split()))[0]
    return sentence if 3 <= len(sentence.split()) <= 60 else None


def description(docstring: str) -> str | None:
    """The first sentence without its markup, or None if it is not a self-contained description."""
    sentence = first_sentence(_ROLE.sub(r"\1", docstring).replace("``", "`"))
    if sentence is None or not sentence.endswith(".") or _ABBREVIATION.search(sentence):
        return None
    stands_alone = 4 <= len(sentence.split()) <= 30 and sentence[0].isupper() and sentence.isascii()
    if not stands_alone or _POINTER.search(sentence) or _OPENINGS.match(sentence) or sentence.count("`") % 2:
        return None
    return sentence
