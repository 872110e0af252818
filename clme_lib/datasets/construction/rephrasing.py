"""The generalization inputs: intents in other words (CNLE), functions with other names (CSNE)."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from ..renaming import Substitutes, eligible_names, rename, same_bytecode, verified
from .endpoint import Endpoint
from .stages import Row

INSTRUCTION = (
    "Rewrite the programming request so that another person could have asked it: other words, the same meaning, one sentence. Keep every "
    "name, number and string of the request exactly as it is. Answer with the rewritten request alone."
)
_CORPUS = 20_000
# from a function's code to its new names
Chooser = Callable[[str], dict[str, str]]


class GivenIntents:
    """The source's own second wording, as CoNaLa's annotated part and the embedded set have one."""

    def settings(self) -> dict:
        """For the stage's manifest."""
        return {"rephraser": "given"}

    def rephrase(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Each row's ``rephrased``; a row without another wording is dropped."""
        for row in rows:
            yield _rephrased(row, row.get("rewritten_intent") or "")


class ModelIntents:
    """Rewritten by a language model."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def settings(self) -> dict:
        """For the stage's manifest."""
        return {"rephraser": "model", "instruction": INSTRUCTION, **self.endpoint.settings()}

    def rephrase(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Each row's ``rephrased``; an answer that is empty, repeats the intent or is a paragraph drops the row."""
        for row, answer in zip(rows, self.endpoint.ask(INSTRUCTION, [row["intent"] for row in rows])):
            yield _rephrased(row, answer.strip().strip('"'))


def _rephrased(row: Row, text: str) -> Row:
    reason = None
    if not text.strip():
        reason = "no other wording"
    elif " ".join(text.split()).casefold() == " ".join(row["intent"].split()).casefold():
        reason = "the other wording repeats the intent"
    elif "\n" in text.strip() or len(text) > 5 * len(row["intent"]) + 100:
        reason = "unusable answer"
    return {"id": row["id"], "dropped": reason} if reason else {"id": row["id"], "rephrased": text.strip()}


def renamed(row: Row, choose: Chooser) -> Row:
    """A function's ``rephrased`` code: names chosen, applied by source position, and verified.

    The variant has the same syntax tree up to the names in both directions, isomorphic symbol tables and the same byte code.
    """
    code = row["code"]
    if not code.isascii():  # positions are in bytes
        return {"id": row["id"], "dropped": "not ASCII"}
    try:
        mapping = choose(code)
        variant = rename(code, mapping) if mapping else code
    except (SyntaxError, RecursionError) as error:
        return {"id": row["id"], "dropped": f"could not be renamed: {type(error).__name__}"}
    if not mapping:
        return {"id": row["id"], "dropped": "no substitute for its names" if candidates(code) else "no name to change"}
    if not verified(code, variant, mapping) or not same_bytecode(code, variant, mapping):
        return {"id": row["id"], "dropped": "variant not verified"}
    return {"id": row["id"], "rephrased": variant, "names": mapping}


class CorpusNames:
    """Names that are used alike in a corpus of functions (:class:`~clme_lib.datasets.renaming.Substitutes`), on all cores.

    Of a larger corpus the first functions are taken (a pool comes in seeded order), because every name is compared with every other.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        self._corpus = list(corpus[:_CORPUS])

    def settings(self) -> dict:
        """For the stage's manifest."""
        return {"names": "corpus", "functions": len(self._corpus)}

    def rephrase(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Each row's ``rephrased`` code."""
        functions = tqdm(map(definition, self._corpus), desc="names of the corpus", total=len(self._corpus), unit="row")
        _use(Substitutes(function for function in functions if function is not None))
        workers = min(os.cpu_count() or 1, 1 + len(rows) // 500)
        if workers == 1:
            yield from map(_by_corpus, rows)
            return
        with ProcessPoolExecutor(workers, initializer=_use, initargs=(_substitutes,)) as pool:
            yield from pool.map(_by_corpus, rows, chunksize=50)


_substitutes: Substitutes | None = None  # of this process


def _use(substitutes: Substitutes | None) -> None:
    global _substitutes
    _substitutes = substitutes


def _by_corpus(row: Row) -> Row:
    def choose(code: str) -> dict[str, str]:
        assert _substitutes is not None
        function = definition(code)
        return {} if function is None else _substitutes.choose(function)

    return renamed(row, choose)


def definition(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The one function that ``code`` defines, or None."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef) else None


def candidates(code: str) -> list[str]:
    """Names of the function that may change, none when it is not one function."""
    function = definition(code)
    return [] if function is None else eligible_names(function)
