"""How relevant a mined snippet is to its intent, in five levels (paper section III-C): by a language model, or offline.

Only *very relevant* pairs become cases. The offline scorer counts words that intent and snippet share; it separates gross
mismatches and stands in where no model can be asked. The agreement of either with people is measured by :mod:`.agreement`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..neighbours import subtokens
from .endpoint import Endpoint
from .stages import StageRow, stage_row

LEVELS = ("irrelevant", "slightly relevant", "partly relevant", "mostly relevant", "very relevant")
INSTRUCTION = (
    "You judge pairs of a natural-language intent and a Python snippet. Say how well the snippet does what the intent asks, with one of these "
    "levels and nothing else: " + "; ".join(f"{n} = {level}" for n, level in enumerate(LEVELS, 1)) + "."
)
_NUMBER = re.compile(r"(?<![\d.])([1-5])(?!\.?\d)")


class OfflineScorer:
    """Levels by the share of the snippet's words that the intent has."""

    def settings(self) -> dict:
        """For the stage's manifest."""
        return {"scorer": "offline"}

    def score(self, rows: Sequence[StageRow]) -> Iterator[StageRow]:
        """Each row's ``level``."""
        for row in rows:
            asked = set(subtokens(row["intent"]))
            words = {word for word in subtokens(row["snippet"]) if len(word) > 1}
            share = len(words & asked) / len(words) if words else 0.0
            yield stage_row(row["id"], level=LEVELS[min(4, int(share * 10))])


class ModelScorer:
    """Levels by a language model at temperature 0."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def settings(self) -> dict:
        """For the stage's manifest."""
        return {"scorer": "model", "instruction": INSTRUCTION, **self.endpoint.settings()}

    def score(self, rows: Sequence[StageRow]) -> Iterator[StageRow]:
        """Each row's ``level``; an answer that names none drops the row."""
        questions = [f"Intent: {row['intent']}\nSnippet: {row['snippet']}" for row in rows]
        for row, answer in zip(rows, self.endpoint.ask(INSTRUCTION, questions)):
            level = parse_level(answer)
            yield stage_row(row["id"], None if level else "unusable answer", level=level)


def parse_level(answer: str) -> str | None:
    """The level that an answer names, by its number or in words; None when it names none or several."""
    text = answer.strip().lower()
    in_words = [level for level in LEVELS if re.search(rf"\b{level}\b", text)]
    levels = in_words or list({LEVELS[int(number) - 1] for number in _NUMBER.findall(text)})
    return levels[0] if len(levels) == 1 else None
