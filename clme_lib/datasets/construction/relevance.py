"""How relevant a mined snippet is to its intent, in five levels (paper section III-C): by a language model, or offline.

Only *very relevant* pairs become cases. The offline scorer counts words that intent and snippet share; it separates gross
mismatches and stands in where no model can be asked. The agreement of either with people is measured by :mod:`.agreement`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..neighbours import subtokens
from .endpoint import Endpoint
from .stages import StageRow, Step, stage_row

LEVELS = ("irrelevant", "slightly relevant", "partly relevant", "mostly relevant", "very relevant")
INSTRUCTION = (
    "You judge pairs of a natural-language intent and a Python snippet. Say how well the snippet does what the intent asks, with one of these "
    "levels and nothing else: " + "; ".join(f"{n} = {level}" for n, level in enumerate(LEVELS, 1)) + "."
)
_FIELDS = {"level": str}
_NUMBER = re.compile(r"(?<![\d.])([1-5])(?!\.?\d)")


def _score_offline(rows: Sequence[StageRow]) -> Iterator[StageRow]:
    """A level by the share of the snippet's words that the intent has."""
    for row in rows:
        in_intent = set(subtokens(row["intent"]))
        words = {word for word in subtokens(row["snippet"]) if len(word) > 1}
        share = len(words & in_intent) / len(words) if words else 0.0
        yield stage_row(row["id"], level=LEVELS[min(4, int(share * 10))])


OFFLINE_SCORER = Step({"scorer": "offline"}, _score_offline, fields=_FIELDS)


def model_scorer(endpoint: Endpoint) -> Step:
    """Gives each row its ``level`` by a language model at temperature 0; an answer that names none drops the row."""

    def score(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        questions = [f"Intent: {row['intent']}\nSnippet: {row['snippet']}" for row in rows]
        for row, answer in zip(rows, endpoint.ask(INSTRUCTION, questions)):
            level = parse_level(answer)
            yield stage_row(row["id"], None if level else "unusable answer", level=level)

    return Step({"scorer": "model", "instruction": INSTRUCTION, **endpoint.settings}, score, fields=_FIELDS)


def parse_level(answer: str) -> str | None:
    """The level that an answer names, by its number or in words; None when it names none or several."""
    text = answer.strip().lower()
    in_words = [level for level in LEVELS if re.search(rf"\b{level}\b", text)]
    levels = in_words or list({LEVELS[int(number) - 1] for number in _NUMBER.findall(text)})
    return levels[0] if len(levels) == 1 else None
