"""How relevant a mined snippet is to its intent, in five levels (paper section III-C): by a language model, or offline.

Only *very relevant* pairs become cases. The offline scorer asks how much an intent helps a small code model to write the snippet::

    help = mean over the snippet's tokens of log p(token | its intent) - log p(token | another intent)

Whatever makes a snippet likely after any intent cancels out. The levels' thresholds were chosen on hand-labelled pairs
(``benchmarks/relevance.py`` measures how well the scorer agrees with these labels); :mod:`.agreement` measures any scorer's agreement
with people.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence

from ...support.seeds import seed_of
from .. import embedded_cnle
from ..paper import CNLE
from .endpoint import Endpoint
from .stages import StageRow, Step, stage_row

LEVELS = ("very irrelevant", "irrelevant", "neutral", "relevant", "very relevant")
THRESHOLDS = (0.29, 0.61, 0.83, 1.19)  # the smallest help, in nats per token, of each level except the first
INSTRUCTION = (
    "You judge pairs of a natural-language intent and a Python snippet. Say how well the snippet does what the intent asks, with one of these "
    "levels and nothing else: " + "; ".join(f"{n} = {level}" for n, level in enumerate(LEVELS, 1)) + "."
)
SCORER = "smollm2-135m-code"  # the offline scorer's subject
Losses = Callable[[Sequence[tuple[str, str]]], list[float]]
_FIELDS = {"level": str}
_NUMBER = re.compile(r"(?<![\d.])([1-5])(?!\.?\d)")
# longer names first, because shorter ones are parts of them
_LEVEL = re.compile(rf"\b(not )?({'|'.join(sorted(LEVELS, key=len, reverse=True))})\b")
_AT_ONCE = 64  # pairs
_MOST_CHARACTERS = 2_000  # of a pair; it cannot have more tokens than characters


def offline_scorer(losses: Losses) -> Step:
    """Gives each row its ``level`` by how much its intent helps; the row also has that amount, in nats per token.

    Args:
        losses: maps (prompt, text) pairs to the mean loss of each text after its prompt, by the subject :data:`SCORER`.
    """

    def score(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        fit = []
        for row in rows:
            if len(row["intent"]) + len(row["snippet"]) > _MOST_CHARACTERS:
                yield stage_row(row["id"], "too long to be scored")
            else:
                fit.append(row)
        for first in range(0, len(fit), _AT_ONCE):
            part = fit[first : first + _AT_ONCE]
            helps = intents_help([(row["intent"], row["snippet"]) for row in part], losses)
            for row, gain in zip(part, helps):
                yield stage_row(row["id"], level=LEVELS[bisect(THRESHOLDS, gain)], help=round(gain, 4))

    return Step({"scorer": SCORER, "thresholds": list(THRESHOLDS)}, score, fields={**_FIELDS, "help": float})


def intents_help(pairs: Sequence[tuple[str, str]], losses: Losses) -> list[float]:
    """By how many nats per token each (intent, snippet) pair's snippet is likelier after its own intent than after another.

    The other intent is drawn from the embedded pool for each pair, so that no pair's value depends on the rest.
    """
    pool = {row["intent"] for row in embedded_cnle.read_rows("cnle-pool")}
    texts = [snippet.strip() for _, snippet in pairs]
    intents = [intent for intent, _ in pairs]
    others = [min(pool - {intent}, key=lambda other: seed_of("relevance", intent, other)) for intent in intents]
    after_own, after_other = (
        losses([(CNLE.prompt(intent), text) for intent, text in zip(given, texts)]) for given in (intents, others)
    )
    return [other - own for own, other in zip(after_own, after_other)]


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
    in_words = {level for negated, level in _LEVEL.findall(text) if not negated}
    levels = in_words or {LEVELS[int(number) - 1] for number in _NUMBER.findall(text)}
    return levels.pop() if len(levels) == 1 else None
