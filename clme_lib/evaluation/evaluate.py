"""Generate and score: from a batch of edited cases to records (paper section III-D).

Effectiveness and generalization are greedy, with as many tokens as the target has; so is specificity, with 16 tokens, compared with
the subject's own unedited answers; fluency is top-5 sampling of 64 tokens. Beside the paper's protocol, the first two go on to 64
tokens, or to the end of text (metrics/free.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from ..datasets.cases import Case
from ..edits.base import Edit, EditLog
from ..forward.tokens import token_budget, tokenize
from ..metrics.base import FREE_TEXTS, TEXTS, scores_of
from ..metrics.free import FREE_TOKENS, STUDY_METRICS
from ..subjects.settings import Preset
from ..subjects.subject import Subject
from ..support.errors import StudyError
from ..support.seeds import DEFAULT_SEED, generator
from .generation import FLUENCY_TOKENS, SPECIFICITY_TOKENS, Generated, Request, first_tokens, generate, gumbel
from .records import UNKNOWN, Record, evaluated, finite, frame, text_hashes
from .unedited import answers_for, unchanged

SINGLE = "single"


@dataclass(frozen=True)
class Circumstances:
    """What all records of an editor in a run have in common, and how they are made."""

    editor: str
    run: str = ""
    source: str = ""
    preset: Preset = "clean"
    seed: int = DEFAULT_SEED  # of the fluency sampling, which is the same for all editors
    protocol: str = SINGLE
    metrics: tuple[str, ...] | None = STUDY_METRICS  # None leaves them to be computed later (``clme score``)
    folds: Mapping[int, int] = field(default_factory=dict)  # each case's fold, by case id
    start: str = UNKNOWN
    library: str = UNKNOWN
    commit: str = UNKNOWN

    def record(self, subject: str, case: Case, position: int = 1, **fields) -> Record:
        """The record of a case with these fields; a case that could not be edited or scored has the reason as its ``error``."""
        return Record(
            **{name: value for name, value in vars(self).items() if name in Record.model_fields},
            subject=subject,
            dataset=case.dataset,
            position=position,
            fold=self.folds.get(case.case_id, 0),
            case_id=case.case_id,
            case_sha256=case.sha256,
            **fields,
        )


def evaluate(
    subject: Subject,
    cases: Sequence[Case],
    edits: Sequence[Edit],
    *,
    seed: int = DEFAULT_SEED,
    preset: Preset = "clean",
    metrics: Sequence[str] = STUDY_METRICS,
) -> pd.DataFrame:
    """Score edits, one per case in the cases' order; returns a row for each, in the form of :func:`clme_lib.evaluation.records.frame`.

    ``seed`` determines the fluency sampling, which is the same for all editors; with the preset ``compat`` the text for a target is as
    long as the target tokenised alone; :func:`clme_lib.metrics.base.list_metrics` names the ``metrics``.
    """
    if [case.case_id for case in cases] != [edit.case_id for edit in edits]:
        raise StudyError("edits and cases differ: pass one edit per case, in the cases' order")
    editor = edits[0].editor if edits else ""
    circumstances = Circumstances(editor, preset=preset, seed=seed, metrics=tuple(metrics))
    return frame(score(subject, cases, edits, circumstances))


def score(
    subject: Subject,
    cases: Sequence[Case],
    edits: Sequence[Edit],
    circumstances: Circumstances,
    *,
    position: int = 1,
    logs: Mapping[int, EditLog] | None = None,
) -> list[Record]:
    """Records of a batch of cases, each evaluated on the subject as its edit makes it, which then holds ``position`` edits.

    ``logs`` say how each case was edited, by its id, where that is not its edit's own log.
    """
    written_of_cases = _generate_all(subject, cases, edits, circumstances)
    answers = iter(answers_for(subject, [prompt for case in cases for prompt in case.unrelated]))
    records = []
    for case, edit, written in zip(cases, edits, written_of_cases):
        texts = {name: [text.text for text in written[name]] for name in (*TEXTS, *FREE_TEXTS)}
        looked_up = [text for name in TEXTS[:-1] for text in written[name]]
        has_codebook = any(text.distance is not None for text in looked_up)
        log = edit.log if logs is None else logs.get(case.case_id, EditLog())
        record = circumstances.record(
            subject.name,
            case,
            position,
            edit_seconds=log.seconds,
            edit_batch=log.batch,
            steps=log.steps,
            loss=finite(log.losses[-1]) if log.losses else None,
            peak_memory_mib=finite(log.peak_memory_mib),
            initial_sha256=log.initial_sha256,
            distances=[text.distance and float(f"{text.distance:.6g}") for text in looked_up] if has_codebook else None,
            fired=[bool(text.fired) for text in looked_up] if has_codebook else None,
            texts=texts,
            sha256={name: text_hashes(written_texts) for name, written_texts in texts.items()},
            answers=[next(answers) for _ in case.unrelated],
            free_tokens=[len(text.ids) for name in FREE_TEXTS for text in written[name]],
            target_tokens=len(tokenize(subject.tokenizer, case.prompt, case.target).target_ids),
        )
        if circumstances.metrics is not None:
            scores = scores_of(evaluated(record, case, record.answers or ()), circumstances.metrics)
            record = record.model_copy(update={"scores": scores})
        records.append(record)
    return records


def _generate_all(
    subject: Subject, cases: Sequence[Case], edits: Sequence[Edit], circumstances: Circumstances
) -> list[dict[str, list[Generated]]]:
    """What is written for every case, by measure.

    The text of the target's length is the beginning of the free one.
    """
    budgets = _budgets(subject, cases, circumstances)
    texts = iter(write(subject, requests_of(subject, cases, edits, circumstances), edits))
    written = []
    for case, budget in zip(cases, budgets):
        counts = 1, len(case.rephrased), len(case.unrelated), 1 + len(case.rephrased)
        of_case = {name: [next(texts) for _ in range(count)] for name, count in zip(TEXTS, counts)}
        for name, free in zip(TEXTS, FREE_TEXTS):
            of_case[free] = [first_tokens(subject, text, FREE_TOKENS, with_end=False) for text in of_case[name]]
            of_case[name] = [first_tokens(subject, text, budget) for text in of_case[name]]
        written.append(of_case)
    return written


def _budgets(subject: Subject, cases: Sequence[Case], circumstances: Circumstances) -> list[int]:
    return [token_budget(subject.tokenizer, case.prompt, case.target, circumstances.preset) for case in cases]


def requests_of(
    subject: Subject, cases: Sequence[Case], edits: Sequence[Edit], circumstances: Circumstances
) -> list[Request]:
    """The texts that an evaluation asks for: of each case, in the order of its measures."""
    requests: list[Request] = []
    for n, (case, budget) in enumerate(zip(cases, _budgets(subject, cases, circumstances))):
        own = [case.prompt, *case.rephrased]
        # the same draws for every editor, so that editors are compared on them
        noise = gumbel(len(own), generator(circumstances.seed, subject.name, case.dataset, case.case_id))
        requests += [Request(prompt, max(budget, FREE_TOKENS), n) for prompt in own]
        # the released program's second and third call
        later = -1 if edits[n].first_call_only else n
        requests += [Request(prompt, SPECIFICITY_TOKENS, later) for prompt in case.unrelated]
        requests += [Request(prompt, FLUENCY_TOKENS, later, noise[row]) for row, prompt in enumerate(own)]
    return requests


def write(subject: Subject, requests: Sequence[Request], edits: Sequence[Edit]) -> list[Generated]:
    """The text of every request; those that no edit can change are the unedited subject's, which are kept."""
    unedited = unchanged(subject, requests, edits)
    changed = iter(generate(subject, [request for n, request in enumerate(requests) if n not in unedited], edits))
    return [unedited[n] if n in unedited else next(changed) for n in range(len(requests))]
