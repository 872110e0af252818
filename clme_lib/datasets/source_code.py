"""Python source: parsing, docstrings and comments taken out, and the sentence that describes a function."""

from __future__ import annotations

import ast
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
_OPENINGS = re.compile(r"(This|These|That|We|I|Maybe|Note|It|Also|And|But|If|When|For|Please|Notes?:)\b")


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, or None when ``code`` is not Python of this interpreter's version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def single_function(code: str) -> Function | None:
    """The function that ``code`` defines, or None when it is anything but one function."""
    tree = parsed(code)
    node = tree.body[0] if tree and len(tree.body) == 1 else None
    return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def bare_code(lines: list[str], function: Function, longest: int | None = None) -> str | None:
    """A function's text from its ``def`` on, not indented, without its docstring, its comments and lines that hold no more.

    None when its docstring shares a line with code or is all it has, when it is too long or cannot be tokenized.

    Args:
        lines: the source that ``function`` was parsed from.
        longest: most characters, counted with the comments.
    """
    kept, body = lines[function.lineno - 1 : function.end_lineno], function.body
    if ast.get_docstring(function, clean=False) is not None:
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
    return "\n".join(line for n, line in enumerate(lines) if line or n not in columns).strip("\n")


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph; None with fewer than three words or more than sixty."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
    return sentence if 3 <= len(sentence.split()) <= 60 else None


def description(docstring: str) -> str | None:
    """The first sentence with its markup taken out, or None when it is not a description that stands alone."""
    sentence = first_sentence(_ROLE.sub(r"\1", docstring).replace("``", "`"))
    if sentence is None or not sentence.endswith(".") or sentence.endswith(("e.g.", "i.e.", "etc.", "vs.")):
        return None
    stands_alone = 4 <= len(sentence.split()) <= 30 and sentence[0].isupper() and sentence.isascii()
    if not stands_alone or _POINTER.search(sentence) or _OPENINGS.match(sentence) or sentence.count("`") % 2:
        return None
    return sentence
