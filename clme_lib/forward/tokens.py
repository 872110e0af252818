"""Joining prompt and target, and which columns carry labels (paper section III-C).

Every prompt ends in a colon. The colon is the *lookup token*: the token at which all editors read their key
and, because the next token is the target's first, the first column that predicts a label. With a prompt of
``P`` tokens and a target of ``T`` tokens joined by one space, the labels ``y_1..y_T`` are predicted by the columns
``P-1 .. P+T-2`` (zero-based).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..subjects.settings import Preset
from ..support.errors import CaseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRow:
    """The input of a forward pass over one row; columns count from the row's first token, padding included."""

    inputs: tuple[int, ...]  # token ids to read
    pads: int  # how many of the first are padding
    lookup: int  # the first column an edit touches (the lookup token's)
    first_label: int  # the column that predicts the first label
    target_ids: tuple[int, ...]  # the labels, predicted by the columns from there on

    @classmethod
    def of(cls, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> TokenRow:
        """A prompt and its target, without the last token, which predicts nothing. The lookup token predicts the target's first."""
        lookup = len(prompt_ids) - 1
        return cls((*prompt_ids, *target_ids[:-1]), 0, lookup, lookup, tuple(target_ids))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens up to the lookup token."""
        return self.inputs[: self.lookup + 1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without special tokens (the study never adds BOS or EOS)."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, end: bool = False) -> TokenRow:
    """Tokenise ``prompt + " " + target`` once and slice it at the prompt's own length.

    With ``end`` the last label is the end of text, which an edited model should write after the target.

    Raises:
        StudyError: the target is empty, the prompt does not end in a colon token, or the prompt's tokens are not
            a prefix of the joined tokens (then no column could be called the lookup token).
    """
    prompt_ids = encode(tokenizer, prompt)
    joined = encode(tokenizer, prompt + " " + target)
    if not target.strip() or len(joined) <= len(prompt_ids):
        raise CaseError(f"the target of prompt {prompt[-60:]!r} is empty: an edit needs at least one target token")
    if joined[: len(prompt_ids)] != prompt_ids:
        raise CaseError(
            f"the tokenizer merges the end of the prompt {prompt[-60:]!r} with the target {target[:30]!r}: "
            "no position separates the two. Use a tokenizer that splits at the space after a colon."
        )
    if not str(tokenizer.decode(prompt_ids[-1:])).endswith(":"):
        raise CaseError(f"the last token of the prompt {prompt[-60:]!r} does not decode to a colon")
    return TokenRow.of(prompt_ids, [*joined[len(prompt_ids) :], *end_ids(tokenizer, end)])


def end_ids(tokenizer: PreTrainedTokenizerBase, end: bool) -> list[int]:
    """The ids of the end of text that is learnt after a target, or nothing."""
    return [tokenizer.eos_token_id] if end else []


def token_budget(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, preset: Preset) -> int:
    """How many new tokens the target's generation may use: as many as the target has in context, which a perfect edit generates.

    ``compat`` counts the target tokenised alone, like the paper's released program: too short or too long for some targets.
    """
    if preset == "compat":
        return len(encode(tokenizer, target))
    return len(tokenize(tokenizer, prompt, target).target_ids)
