"""Scores of free texts, in addition to the paper's: a subject writes up to 64 tokens whatever the target's length, and decides when to stop.

The paper's protocol writes exactly as many tokens as the target has, so it reveals the target's length, and never tests whether the
model stops; and it compares strings, so equivalent code and code that does not parse both count as wrong.
Free texts are cut at the first line break; in code, at the first one outside brackets and strings that no indented line follows.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from .base import FREE_TEXTS, Evaluated, Metric, register_metric
from .paper import PAPER_METRICS
from .text import exact_match

FREE_TOKENS = 64
Judgement = Callable[[str, Evaluated], float | None]

# a string in any quotes, a comment, a line continuation, or any other character
_PIECE = re.compile(
    r"""('''|\"{3})(?:\\.|(?!\1).)*(?:\1|\Z)|(["'])(?:\\.|(?!\2)[^\\\n])*(?:\2|(?=\n)|\Z)|\#[^\n]*|\\\n|.""", re.DOTALL
)
_FENCE = re.compile(r"\s*```\w*[ \t]*\n?")


def first_statement(code: str) -> str:
    """``code`` up to the first line break outside brackets and strings that no indented line follows."""
    depth = 0
    for match in _PIECE.finditer(code):
        piece = match[0]
        if piece in "([{":
            depth += 1
        elif piece in ")]}":
            depth = max(0, depth - 1)
        elif piece == "\n" and depth == 0 and not re.match(r"[ \t]+\S", code[match.end() :]):
            return code[: match.start()]
    return code


def _is_code(evaluated: Evaluated) -> bool:
    return "target" in evaluated.code


def cut(text: str, evaluated: Evaluated) -> str:
    """A free text up to the end of its first statement or line."""
    return (first_statement(text) if _is_code(evaluated) else text.partition("\n")[0]).strip()


def _syntax(code: str) -> str | None:
    """The syntax tree as text; None if there is no statement, or the code is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        try:
            tree = ast.parse(code)
            return ast.dump(tree) if tree.body else None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _same_text(text: str, evaluated: Evaluated) -> float | None:
    target = evaluated.case.target.strip()
    # A text that is cut after one statement or line can never equal a target that has several.
    return float(text == target) if cut(target, evaluated) == target else None


def _same_code(text: str, evaluated: Evaluated) -> float | None:
    expected = _syntax(evaluated.case.target.strip()) if _is_code(evaluated) else None
    return None if expected is None or _same_text(text, evaluated) is None else float(_syntax(text) == expected)


def _parses(text: str, evaluated: Evaluated) -> float | None:
    return float(_syntax(text) is not None) if _is_code(evaluated) else None


@cache
def _chrf_metric():
    from sacrebleu.metrics import CHRF

    return CHRF()


def _chrf(text: str, evaluated: Evaluated) -> float | None:
    if _is_code(evaluated):
        return None
    return round(_chrf_metric().sentence_score(text, [evaluated.case.target]).score / 100, 3)


def _mean(judge: Judgement, measure: str, evaluated: Evaluated) -> float | None:
    """Mean over a measure's free texts; None if there are none, or they cannot be judged."""
    judged = [judge(cut(text, evaluated), evaluated) for text in evaluated.texts.get(measure, ())]
    values = [value for value in judged if value is not None]
    return sum(values) / len(values) if values else None


def _stops(evaluated: Evaluated) -> float | None:
    """Whether the text after the edit prompt ended before reaching 64 tokens."""
    return float(evaluated.free_tokens[0] < FREE_TOKENS) if evaluated.free_tokens else None


def _overrun(evaluated: Evaluated) -> float | None:
    """Number of tokens after the target, if the text after the edit prompt begins with the target."""
    if not evaluated.free_tokens or not evaluated.texts[FREE_TEXTS[0]][0].strip().startswith(evaluated.case.target):
        return None
    return float(max(0, evaluated.free_tokens[0] - evaluated.target_tokens))


def opens_with_fence(text: str) -> bool:
    """Whether a text begins with a code fence."""
    return _FENCE.match(text) is not None


def _kept_without_fence(evaluated: Evaluated) -> float | None:
    """Share of neighbours whose text is the unedited subject's, ignoring a code fence at the beginning of either.

    A text without its fence is shorter than a text that had none, so they are compared up to the end of the shorter one.
    """
    pairs = [(_FENCE.sub("", edited, 1), _FENCE.sub("", plain, 1)) for edited, plain in _neighbours(evaluated)]
    kept = [a == b or (bool(a and b) and (a.startswith(b) or b.startswith(a))) for a, b in pairs]
    return sum(kept) / len(kept) if kept else None


def _answer_in_neighbours(evaluated: Evaluated) -> float | None:
    """Share of neighbours that the edited subject, but not the unedited one, answers with the target."""
    answered = [
        _begins_alike(edited, evaluated) > _begins_alike(plain, evaluated) for edited, plain in _neighbours(evaluated)
    ]
    return sum(answered) / len(answered) if answered else None


def _begins_alike(text: str, evaluated: Evaluated) -> bool:
    """Whether a text begins with the target, or a longer target begins with the text."""
    text, target = text.strip(), evaluated.case.target.strip()
    return bool(text) and (text.startswith(target) or target.startswith(text))


def _neighbours(evaluated: Evaluated) -> list[tuple[str, str]]:
    return list(zip(evaluated.texts["specificity"], evaluated.answers))


def _fired(evaluated: Evaluated) -> Sequence[bool]:
    """Whether a codebook fired at each rephrased prompt."""
    return evaluated.fired[1 : 1 + len(evaluated.texts["generalization"])]


def _fires(evaluated: Evaluated) -> float | None:
    return sum(fired) / len(fired) if (fired := _fired(evaluated)) else None


def _right_where_fired(evaluated: Evaluated) -> float | None:
    """Share of texts equal to the target (under the paper's protocol) among the rephrased prompts at which a codebook fired."""
    texts = [text.strip() for text, fired in zip(evaluated.texts["generalization"], _fired(evaluated)) if fired]
    return sum(exact_match([text], [evaluated.case.target]) for text in texts) / len(texts) if texts else None


def _free(suffix: str, title: str, judge: Judgement, binary: bool) -> list[Metric]:
    """A metric for the text after the edit prompt, and one for the texts after the rephrased prompts."""
    return [
        Metric(f"{measure}_{suffix}", f"{short} {title}", measure, partial(_mean, judge, measure), binary)
        for measure, short in zip(FREE_TEXTS, ("Eff.", "Gen."))
    ]


_METRICS = [
    *_free("em", "free EM", _same_text, True),
    *_free("code", "same code", _same_code, True),
    *_free("chrf", "chrF", _chrf, False),
    Metric("parses", "Parses", FREE_TEXTS[0], partial(_mean, _parses, FREE_TEXTS[0]), True),
    Metric("stops", "Stops", FREE_TEXTS[0], _stops, True),
    Metric("overrun", "Overrun", FREE_TEXTS[0], _overrun, highest=FREE_TOKENS, higher_is_better=False),
    Metric("kept_without_fence", "Spec. kept, no fence", "specificity", _kept_without_fence),
    Metric(
        "answer_in_neighbours", "Answer in neighbours", "specificity", _answer_in_neighbours, higher_is_better=False
    ),
    Metric("fires", "Fires", "generalization", _fires, higher_is_better=None),
    Metric("right_where_fired", "Right where fired", "generalization", _right_where_fired),
]
FREE_METRICS = tuple(register_metric(replace(metric, order=20 + n)).name for n, metric in enumerate(_METRICS))
STUDY_METRICS = (*PAPER_METRICS, *FREE_METRICS)  # a run's default metrics
