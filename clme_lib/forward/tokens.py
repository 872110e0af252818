"""Prompt templates, joining prompt and target, and which columns carry labels (paper section III-C; one template a data set).

Every prompt ends in a colon. The colon is the *lookup token*: the token at which all editors read their key
and, because the next token is the target's first, the first column that predicts a label. With a prompt of
``P`` tokens and a target of ``T`` tokens joined by one space, the labels ``y_1..y_T`` are predicted by the columns
``P-1 .. P+T-2`` (zero-based).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..subjects.settings import Preset
from ..support.errors import StudyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenRow(Protocol):
    """What a forward pass over one row has to know (columns count from the row's first token, padding included)."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Token ids to read."""

    @property
    def pads(self) -> int:
        """How many of the first ``inputs`` are padding."""

    @property
    def lookup(self) -> int:
        """The first column an edit touches."""

    @property
    def first_label(self) -> int:
        """The column that predicts the first label."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The labels, predicted by the columns from ``first_label`` on."""


@dataclass(frozen=True)
class Tokenized:
    """One prompt and target as token ids, the target *as tokenised in context*."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    pads = 0

    @property
    def lookup(self) -> int:
        """Column of the lookup token (the prompt's final colon)."""
        return len(self.prompt_ids) - 1

    @property
    def first_label(self) -> int:
        """The lookup token predicts the target's first token."""
        return self.lookup

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads to predict every label: prompt and target without its last token."""
        return self.prompt_ids + self.target_ids[:-1]


@dataclass(frozen=True)
class PlacedRow:
    """A row whose columns are given, not derived from its text; see :class:`TokenRow`."""

    inputs: tuple[int, ...]
    pads: int
    lookup: int
    first_label: int
    target_ids: tuple[int, ...]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without special tokens (the study never adds BOS or EOS)."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> Tokenized:
    """Tokenise ``prompt + " " + target`` once and slice it at the prompt's own length.

    Raises:
        StudyError: the target is empty, the prompt does not end in a colon token, or the prompt's tokens are not
            a prefix of the joined tokens (then no column could be called the lookup token).
    """
    prompt_ids = encode(tokenizer, prompt)
    joined = encode(tokenizer, prompt + " " + target)
    if not target.strip() or len(joined) <= len(prompt_ids):
        raise StudyError(f"the target of prompt {prompt[-60:]!r} is empty: an edit needs at least one target token")
    if joined[: len(prompt_ids)] != prompt_ids:
        raise StudyError(
            f"the tokenizer merges the end of the prompt {prompt[-60:]!r} with the target {target[:30]!r}: "
            "no column separates the two. Use a tokenizer that splits at the space after a colon."
        )
    if not str(tokenizer.decode(prompt_ids[-1:])).endswith(":"):
        raise StudyError(f"the last token of the prompt {prompt[-60:]!r} does not decode to a colon")
    return Tokenized(tuple(prompt_ids), tuple(joined[len(prompt_ids) :]))


def token_budget(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, preset: Preset) -> int:
    """How many new tokens the target's generation may use.

    ``clean`` counts the target as tokenised in context, which is what a perfect edit emits. ``compat`` counts it
    tokenised alone, as the paper's released program does: too short or too long for some targets.
    """
    if preset == "compat":
        return len(encode(tokenizer, target))
    return len(tokenize(tokenizer, prompt, target).target_ids)
