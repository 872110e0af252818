"""Showing untrusted text: the text of a dataset, a model or a file stays plain text on a page, in a table and in a terminal.

On a page every character that can be markup of HTML, Markdown, MyST, Jinja or TeX where it stands becomes a numeric reference, and
the text stays on one line of the source. Characters that a page or a terminal cannot hold (control characters, lone
surrogates) are shown as Python would write them, such as ``\\x1b``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

EMPTY = "(nothing)"
# In a sentence: what is active in Markdown where it stands (white space at the ends, a list's beginning, a bare address), and all
# punctuation but some that is not active anywhere else. In code: all but letters, digits and spaces.
_ACTIVE = re.compile(
    r"^[ %]| $|^\d(?=\d*[.)](?!\w))|(?<!\w)[-+:]|:(?=/)|(?<=www)\.|_|[^\w ,.;'?!%/()+:–→-]", re.IGNORECASE
)
_IN_CODE = re.compile(r"[^\w ]|_")


class Markup(str):
    """Markup of ours, in which others' text is escaped: :func:`inline` returns it as it is. Any text derived from it is plain again."""


def inline(text: object) -> Markup:
    """Text inside a sentence or cell, its line breaks as ⏎; HTML that is valid inside Markdown as well."""
    return text if isinstance(text, Markup) else Markup(_ACTIVE.sub(_reference, _in_one_line(str(text))))


def inline_code(text: str) -> Markup:
    """Code inside a sentence or cell. White space around it is left out."""
    # dir limits the effect of right-to-left marks to the element
    return Markup(f'<code dir="ltr">{_IN_CODE.sub(_reference, _in_one_line(text.strip() or EMPTY))}</code>')


def code_block(text: str) -> Markup:
    """Code as a separate block that keeps every line break."""
    return Markup(f'<pre><code dir="ltr">{_IN_CODE.sub(_reference, text or EMPTY)}</code></pre>')


def printable(text: str) -> str:
    """Text for a terminal: line breaks and tabs stay, other control characters are written out."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else _written_out(character) for character in text
    )


def on_terminal(main: Callable[..., int]) -> Callable[..., int]:
    """Make a program's output printable on its terminal; the program ends silently if its reader has gone (``clme list | head``)."""

    @functools.wraps(main)
    def shown(*arguments: Any) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with contextlib.redirect_stdout(sys.stdout and _Printable(sys.stdout)):
                try:
                    return main(*arguments)
                finally:
                    print(end="", flush=True)
        except (_Unwritable, BrokenPipeError) as error:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:  # keeps Python from trying once more at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            cause = error.__cause__ or error
            if isinstance(cause, BrokenPipeError):
                return 128 + signal.SIGPIPE
            print(f"clme: cannot write the output: {cause}", file=sys.stderr)
            return 1

    return shown


class _Unwritable(BaseException):
    """Standard output cannot be written. Like an interruption, this ends the command and is not an error of the current work."""


class _Printable:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._call("write", printable(text))

    def flush(self) -> None:
        self._call("flush")

    def _call(self, name: str, *arguments: str) -> Any:
        try:
            return getattr(self._stream, name)(*arguments)
        except OSError as error:
            raise _Unwritable from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _in_one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _reference(match: re.Match[str]) -> str:
    character, number = match[0], ord(match[0])
    # what HTML has no place for: control characters but tab and line feed, surrogates, and the noncharacters
    if (number < 0x20 and character not in "\t\n") or 0x7F <= number < 0xA0 or 0xD800 <= number < 0xE000:
        return inline(_written_out(character))
    if 0xFDD0 <= number < 0xFDF0 or number & 0xFFFE == 0xFFFE:
        return inline(_written_out(character))
    return f"&#{number};"


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
