"""Edit, generate, score: what one batch of cases becomes (paper section III-D).

Each measure is one generation over the whole batch, row by row from differently edited models:
effectiveness and generalization (greedy, as many tokens as the target has), specificity (greedy, 16 tokens,
compared with the subject's own unedited answers) and fluency (top-5 sampling, 64 tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..datasets.cases import Case
from ..edits.base import Edit
from ..forward.tokens import token_budget
from ..metrics.text import exact_match_rate, fluency, preserved_scores, target_scores
from ..subjects.settings import Preset
from ..subjects.subject import Subject
from ..support.errors import StudyError
from ..support.seeds import DEFAULT_SEED, generator
from .generation import FLUENCY_TOKENS, SPECIFICITY_TOKENS, Generated, Request, generate, gumbel
from .records import UNSCORED, Record, finite, frame, text_hashes
from .unedited import answers_for, unchanged


def evaluate(
    subject: Subject,
    cases: Sequence[Case],
    edits: Sequence[Edit],
    *,
    seed: int = DEFAULT_SEED,
    preset: Preset = "clean",
) -> pd.DataFrame:
    """Score edits: one row per case (see :class:`clme_lib.evaluation.records.Record` for the columns).

    Args:
        edits: one per case, in the cases' order.
        seed: of the fluency sampling, which is the same for all editors.
        preset: ``compat`` limits generation to the target's length tokenised alone.
    """
    return frame(score(subject, cases, edits, seed=seed, preset=preset, run="", source="", folds_of={}))


def score(
    subject: Subject,
    cases: Sequence[Case],
    edits: Sequence[Edit],
    *,
    seed: int,
    preset: Preset,
    run: str,
    source: str,
    folds_of: dict[int, int],
    scored: bool = True,
) -> list[Record]:
    """Records of a batch of cases and their edits.

    Args:
        scored: False keeps the texts, and what specificity is compared with, to be scored later (scoring.py).
    """
    if [case.case_id for case in cases] != [edit.case_id for edit in edits]:
        raise StudyError("edits and cases differ: pass one edit per case, in the cases' order")
    written = _generate_all(subject, cases, edits, seed, preset)
    answers = iter(answers_for(subject, [prompt for case in cases for prompt in case.unrelated]))
    records = []
    for case, edit, (effect, general, specific, sampled) in zip(cases, edits, written):
        expected = [next(answers) for _ in case.unrelated]
        texts = {
            "effectiveness": [one.text for one in effect],
            "generalization": [one.text for one in general],
            "specificity": [one.text for one in specific],
            "fluency": [one.text for one in sampled],
        }
        looked_up = [*effect, *general, *specific]
        has_codebook = any(one.distance is not None for one in looked_up)
        records.append(
            _record(
                _identity(subject, case, edit.editor, preset, run, source, folds_of),
                scores_of(texts, case.target, expected) if scored else {"answers": expected, "error": UNSCORED},
                {f"generated_{name}": found for name, found in texts.items()},
                {f"sha256_{name}": text_hashes(found) for name, found in texts.items()},
                edit_seconds=edit.log.seconds,
                edit_batch=edit.log.batch,
                steps=edit.log.steps,
                loss=finite(edit.log.losses[-1]) if edit.log.losses else None,
                peak_memory_mib=finite(edit.log.peak_memory_mib),
                initial_sha256=edit.log.initial_sha256,
                distances=[_rounded(one.distance) for one in looked_up] if has_codebook else None,
                fired=[bool(one.fired) for one in looked_up] if has_codebook else None,
            )
        )
    return records


def scores_of(texts: Mapping[str, Sequence[str]], target: str, answers: Sequence[str]) -> dict[str, float | None]:
    """The score columns of a record, from its texts by measure, the case's target and the unedited subject's answers."""
    scores = {
        "effectiveness": _mean_scores([target_scores(text, target) for text in texts["effectiveness"]]),
        "generalization": _mean_scores([target_scores(text, target) for text in texts["generalization"]]),
        "specificity": preserved_scores(texts["specificity"], answers) if answers else {},
    }
    return {
        **{f"{measure}_{metric}": value for measure, found in scores.items() for metric, value in found.items()},
        "specificity_rate": exact_match_rate(texts["specificity"], answers) if answers else None,
        "fluency": fluency(texts["fluency"]),
    }


def failed(
    subject: Subject,
    case: Case,
    editor: str,
    preset: Preset,
    run: str,
    source: str,
    folds_of: dict[int, int],
    error: str,
) -> Record:
    """The record of a case that could not be edited or scored: no scores, and the reason."""
    return _record(_identity(subject, case, editor, preset, run, source, folds_of), error=error)


def _record(*groups: dict, **fields) -> Record:
    """A record from groups of fields."""
    return Record.model_validate({name: value for group in (*groups, fields) for name, value in group.items()})


def _identity(subject, case, editor, preset, run, source, folds_of) -> dict:
    return {
        "run": run,
        "subject": subject.name,
        "dataset": case.dataset,
        "source": source,
        "editor": editor,
        "preset": preset,
        "fold": folds_of.get(case.case_id, 0),
        "case_id": case.case_id,
        "case_sha256": case.sha256,
    }


def _generate_all(
    subject: Subject, cases: Sequence[Case], edits: Sequence[Edit], seed: int, preset: Preset
) -> list[tuple[list[Generated], list[Generated], list[Generated], list[Generated]]]:
    """(effectiveness, generalization, specificity, fluency) texts of every case."""
    requests: list[Request] = []
    counts = []
    for n, case in enumerate(cases):
        budget = token_budget(subject.tokenizer, case.prompt, case.target, preset)
        own = [case.prompt, *case.rephrased]
        # the same draws for every editor, so that editors are compared on them
        noise = gumbel(len(own), generator(seed, subject.name, case.dataset, case.case_id))
        requests += [Request(prompt, budget, n) for prompt in own]
        # the released program's second and third call
        later = -1 if edits[n].first_call_only else n
        requests += [Request(prompt, SPECIFICITY_TOKENS, later) for prompt in case.unrelated]
        requests += [Request(prompt, FLUENCY_TOKENS, later, noise[row]) for row, prompt in enumerate(own)]
        counts.append((1, len(case.rephrased), len(case.unrelated), len(own)))
    still = unchanged(subject, requests, edits)
    others = generate(subject, [request for n, request in enumerate(requests) if n not in still], edits)
    made = iter(others)
    texts = iter([still[n] if n in still else next(made) for n in range(len(requests))])
    return [tuple([next(texts) for _ in range(count)] for count in four) for four in counts]  # type: ignore[misc]


def _rounded(distance: float | None) -> float | None:
    return None if distance is None else float(f"{distance:.6g}")


def _mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    return {metric: sum(one[metric] for one in scores) / len(scores) for metric in scores[0]} if scores else {}
