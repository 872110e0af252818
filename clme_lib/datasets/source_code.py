"""Python source: docstrings and comments taken out, and the sentence that describes a function."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize

MAX_CHARACTERS = 1_500  # nothing longer has 256 tokens or fewer in practice; spares the costly checks


_ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`")
_POINTER = re.compile(
    r"https?:|www\.|TODO|FIXME|XXX|[Dd]eprecat|\b[Ss]ee\b|[Ss]ame as|[Ss]imilar to|[Jj]ust like|[Ll]ike `|above|below|"
    r"[Ww]rapper for|[Aa]lias|[Oo]verrid|[Rr]eference implementation|docstring|[Nn]ot implemented|>>>|\||\.\.|^\W",
)
_OPENINGS = re.compile(r"(This|These|That|We|I|Maybe|Note|It|Also|And|But|If|When|For|Please|Notes?:)\b")


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
