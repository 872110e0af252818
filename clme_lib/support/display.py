"""Showing what others wrote: text of a data set, of a model, of a file stays text on a page, in a table and in a terminal.

On a page every character but letters, digits and spaces becomes a numeric reference, so that nothing of it can be markup of
HTML, Markdown, MyST or Jinja, and it stays on one line of the source. Characters that a page or a terminal cannot hold
(control characters, lone surrogates) are shown as Python would write them, such as ``\\x1b``.
"""

from __future__ import annotations

EMPTY = "(nothing)"


def inline(text: str) -> str:
    """Text inside a sentence or cell, its line breaks as ⏎; HTML that is valid inside Markdown as well."""
    return "".join(map(_inline, text))


def inline_code(text: str) -> str:
    """Code inside a sentence or cell. White space around it is left out."""
    return f'<code dir="ltr">{inline(text.strip() or EMPTY)}</code>'  # dir keeps right-to-left marks to themselves


def code_block(text: str) -> str:
    """Code as a paragraph of its own, every line break where it is."""
    return f'<pre><code dir="ltr">{"".join(map(_reference, text or EMPTY))}</code></pre>'


def printable(text: str) -> str:
    """Text for a terminal: line breaks and tabs stay, what a terminal would obey is written out."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else _written_out(character) for character in text
    )


def _inline(character: str) -> str:
    return "⏎" if character == "\n" else _reference(character)


def _reference(character: str) -> str:
    if character.isalnum() or character == " ":
        return character
    number = ord(character)
    # what HTML has no place for: control characters but tab and line feed, surrogates, and the noncharacters
    if (number < 0x20 and character not in "\t\n") or 0x7F <= number < 0xA0 or 0xD800 <= number < 0xE000:
        return inline(_written_out(character))
    if 0xFDD0 <= number < 0xFDF0 or number & 0xFFFE == 0xFFFE:
        return inline(_written_out(character))
    return f"&#{number};"


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
