"""The generalization inputs: intents in other words (CNLE), functions with other names (CSNE)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from ..renaming import Substitute, Substitutes, choose_names, eligible_names, rename, same_bytecode, verified
from ..source_code import single_function
from .endpoint import Endpoint
from .stages import StageRow, Step, stage_row

INSTRUCTION = (
    "Rewrite the programming request so that another person could have asked it: other words, the same meaning, one sentence. Keep every "
    "name, number and string of the request exactly as it is. Answer with the rewritten request alone."
)
FIELDS = {"rephrased": str}
_CORPUS = 20_000  # functions
_NOT_A_LINE = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029\ufffd]"
)  # line ends, control characters, what was no character


def _rephrase_as_given(rows: Sequence[StageRow]) -> Iterator[StageRow]:
    for row in rows:
        yield _rephrased(row, row.get("rewritten_intent") or "")


# the source's second wording, which CoNaLa's annotated part and the embedded set have; a row without one is dropped
GIVEN_INTENTS = Step({"rephraser": "given"}, _rephrase_as_given, fields=FIELDS)


def model_intents(endpoint: Endpoint) -> Step:
    """Intents rewritten by a language model; an answer that is empty, repeats the intent or is a paragraph drops the row."""

    def rephrase(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        for row, answer in zip(rows, endpoint.ask(INSTRUCTION, [row["intent"] for row in rows])):
            yield _rephrased(row, answer.strip().strip('"'))

    return Step({"rephraser": "model", "instruction": INSTRUCTION, **endpoint.settings}, rephrase, fields=FIELDS)


def _rephrased(row: StageRow, text: str) -> StageRow:
    text, intent = text.strip(), row["intent"]
    reason = None
    if not text:
        reason = "no other wording"
    elif " ".join(text.split()).casefold() == " ".join(intent.split()).casefold():
        reason = "the other wording repeats the intent"
    elif _NOT_A_LINE.search(text) or len(text) > 5 * len(intent) + 100:
        reason = "unusable answer"
    return stage_row(row["id"], reason, rephrased=text)


def renamed(row: StageRow, substitute: Substitute) -> StageRow:
    """A function's ``rephrased`` code: names are chosen, replaced by source position, and verified.

    The variant has the same syntax tree up to the names in both directions, isomorphic symbol tables and the same byte code.
    """
    code = row["code"]
    if not code.isascii():  # positions are in bytes
        return stage_row(row["id"], "not ASCII")
    function = single_function(code)
    if function is None or not eligible_names(function):
        return stage_row(row["id"], "no name to change")
    mapping = choose_names(function, substitute)
    if not mapping:
        return stage_row(row["id"], "no substitute for its names")
    variant = rename(code, mapping)
    if not verified(code, variant, mapping) or not same_bytecode(code, variant, mapping):
        return stage_row(row["id"], "variant not verified")
    return stage_row(row["id"], rephrased=variant, names=mapping)


def corpus_names(corpus: Sequence[str]) -> Step:
    """Renames functions with names that a corpus of functions uses similarly (:class:`~clme_lib.datasets.renaming.Substitutes`).

    Only the first functions of a large corpus are used (a pool is in seeded order), because every name is compared with every other.
    """
    codes = corpus[:_CORPUS]

    def rephrase(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        trees = map(single_function, tqdm(codes, desc="names of the corpus", unit="row"))
        substitutes = Substitutes(filter(None, trees))
        yield from (renamed(row, substitutes.substitute) for row in rows)

    return Step({"names": "corpus", "functions": len(codes)}, rephrase, fields=FIELDS)
