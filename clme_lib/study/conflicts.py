"""Contradictory edits in one model: the second edit of a prompt has another target, or the unedited model's answer as its target, which
should revert the first edit (not in the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from ..datasets.base import dataset_title
from ..datasets.cases import Case
from ..datasets.paper import CNLE
from ..datasets.registry import selection_cases
from ..editors.base import Editor
from ..editors.registry import load_editor
from ..edits.base import Edit
from ..evaluation.generation import SPECIFICITY_TOKENS, Request, generate
from ..evaluation.unedited import answers_for
from ..forward.tokens import token_budget
from ..metrics.text import exact_match, exact_match_rate
from ..subjects.subject import Subject
from ..support.errors import StudyError
from ..support.journal import journal_beside
from ..support.seeds import seed_of
from .tables import editor_name, in_order, interval, table, write_csv

EDITORS = ("ft-l", "rome", "grace-tuned", "in-context")
# shares measured for a pair of edits: with the first edit alone; with the second alone, as the control; with both; and with both when
# the second reverts the first
SHARES = {
    "first": "First edit right",
    "second_alone": "Second target, edited alone",
    "second": "Second target written",
    "still_first": "First target still written",
    "restored": "Original answer restored",
    "neighbours_first": "Neighbours unchanged: after the first edit",
    "neighbours_second": "Neighbours unchanged: after the second target",
    "neighbours_restored": "Neighbours unchanged: after editing back",
}


@table
def conflict_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Results of two edits of one prompt, from the file that ``clme measure conflicts`` writes; shares with 95% intervals over cases."""
    for editor in in_order(measured["editor"].unique()):
        for dataset, rows in measured[measured["editor"] == editor].groupby("dataset", sort=False):
            shown = {title: str(interval(rows[name], not name.startswith("n"))) for name, title in SHARES.items()}
            yield {"Data": dataset_title(str(dataset)), "Editor": editor_name(editor), "n": str(len(rows)), **shown}


def measure_conflicts(
    subject: Subject,
    file: Path,
    editors: Sequence[str] = EDITORS,
    cases: int | None = 10,
    datasets: Sequence[str] = (CNLE.name,),
) -> pd.DataFrame:
    """Edit each prompt twice, the second time in the model that holds the first edit; written as CSV, a row for each editor and case.

    The second target is the next case's. Cases whose original answer is empty cannot be edited back and are left out.

    Args:
        file: the table to write; finished measurements are kept beside it, so that an interrupted command resumes.
        cases: use this many of each dataset's selection cases, from the first (None: all 30).

    Raises:
        StudyError: an editor must be trained first.
    """
    rows = []
    with journal_beside(file, lambda row: (row["identity"], row["case_id"])) as done:
        for dataset in datasets:
            chosen, _ = selection_cases(dataset, cases)
            originals = _original_answers(subject, chosen)
            for name in editors:
                editor = load_editor(name, subject)
                if editor.needs_training:
                    raise StudyError(f"{name} must be trained before it edits; choose an editor that needs no training")
                following = [*chosen[1:], chosen[0]]
                pairs = [pair for pair in zip(chosen, following, originals) if pair[2]]
                for case, other, original in tqdm(pairs, desc=f"{dataset} {name}", unit="case"):
                    identity = seed_of(
                        subject.fingerprint, subject.dtype_name, name, editor.hparams, case.sha256, other.sha256
                    )
                    row: dict[str, Any] = {"identity": identity, "case_id": case.case_id}
                    if row not in done:
                        measured = _edited_twice(
                            editor, case, replace(case, target=other.target), replace(case, target=original)
                        )
                        done.append({**row, "measured": measured})
                    rows.append({"editor": name, "dataset": dataset, "case_id": case.case_id, **done[row]["measured"]})
        return write_csv(pd.DataFrame(rows), file)


def _original_answers(subject: Subject, cases: Sequence[Case]) -> list[str]:
    """The subject's texts after the edit prompts, each as long as the case's target."""
    return [text.strip() for text in _written(subject, cases, [case.prompt for case in cases])]


def _edited_twice(editor: Editor, case: Case, second: Case, original: Case) -> dict[str, float]:
    """A case's ``SHARES``: of texts that match their target, and of neighbours' answers that equal the unedited subject's."""
    subject = editor.subject
    (first,) = editor.edit([case])
    later = editor.of(subject.edited(first))
    edits = [first, *(Edit.compose([first, later.edit([target])[0]]) for target in (second, original))]
    alone, of_both, of_back = _written(subject, [case, second, original], [case.prompt] * 3, edits)
    (of_first,) = _written(subject, [case], [case.prompt], edits[1:2])
    kept = []
    for edit in edits:
        neighbours = generate(subject, [Request(prompt, SPECIFICITY_TOKENS, 0) for prompt in case.unrelated], [edit])
        kept.append(exact_match_rate([text.text for text in neighbours], answers_for(subject, case.unrelated)))
    (of_second,) = _written(subject, [second], [case.prompt], editor.edit([second]))
    right = (alone, case), (of_second, second), (of_both, second), (of_first, case), (of_back, original)
    shares = [exact_match([text.strip()], [asked.target.strip()]) for text, asked in right]
    return dict(zip(SHARES, [*shares, *kept]))


def _written(subject: Subject, cases: Sequence[Case], prompts: Sequence[str], edits: Sequence[Edit] = ()) -> list[str]:
    """Texts after the prompts, as long as the cases' targets; the n-th is written under the n-th edit, if any are given."""
    budgets = [token_budget(subject.tokenizer, case.prompt, case.target, "clean") for case in cases]
    acting = range(len(edits)) if edits else [-1] * len(cases)
    requests = [Request(prompt, budget, n) for prompt, budget, n in zip(prompts, budgets, acting)]
    return [text.text for text in generate(subject, requests, edits)]
