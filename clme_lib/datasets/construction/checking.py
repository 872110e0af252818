"""What is wrong with a dataset in the published layout: ``clme data check PATH``.

Errors make a case meaningless (two cases with one id, a neighbour that is an edit input, a rephrased prompt that repeats the
prompt); warnings name limits of a measure (a target too short for BLEU, code that is not Python 3). Nothing is
changed. Every finding names its cases and says what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...metrics.text import bleu, rouge_l
from ...support.display import printable
from ...support.errors import StudyError
from ..base import Dataset, get_dataset, list_datasets
from ..cases import Case
from ..neighbours import TOO_CLOSE, tfidf
from ..published import parse_record, read_records
from ..renaming import same_up_to_names
from ..source_code import parsed

# end-of-text strings of the embedded and the paper's subjects: a subject stops writing at its own
END_OF_TEXT = ("<|im_end|>", "<|endoftext|>", "</s>")
_TOKEN = re.compile(r"\w+|[^\w\s]")
Level = Literal["error", "warning"]
_Check = tuple[Level, str, str, Callable[[Case], bool]]  # level, problem, remedy, and the test for the problem


@dataclass(frozen=True)
class Finding:
    """One kind of problem, the cases that have it, and what to do."""

    level: Level
    problem: str
    cases: tuple[int | str, ...]
    remedy: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.cases[:8])) + (", ..." if len(self.cases) > 8 else "")
        return printable(f"{self.level}: {self.problem}: {len(self.cases)} ({shown}). {self.remedy}")


@dataclass(frozen=True)
class Lengths:
    """A row of Table III: the number of texts of one kind, and their lengths in words and symbols."""

    text: str
    number: int
    mean: float
    median: float


@dataclass(frozen=True)
class Report:
    """A dataset's counts, lengths and findings."""

    name: str
    dataset: str
    records: int
    cases: int
    lengths: tuple[Lengths, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether there are no errors."""
        return not any(finding.level == "error" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.records} records, {self.cases} readable cases of {self.dataset}"]
        lines += [f"  {'text':24} {'number':>8} {'mean':>8} {'median':>8}   (words and symbols)"]
        lines += [f"  {row.text:24} {row.number:8d} {row.mean:8.1f} {row.median:8.1f}" for row in self.lengths]
        lines += [f"  {finding}" for finding in self.findings] or ["  nothing found"]
        return "\n".join(lines)


def check_file(path: Path | str, dataset: str | None = None) -> Report:
    """Check a file in the published layout.

    Args:
        dataset: ``cnle`` or ``csne``; None: from the file's name, as the authors' loader does (``Conala``, ``CodeSearchNet``).

    Raises:
        StudyError: the file is not a JSON list, or its name does not tell the dataset.
    """
    path = Path(path)
    kind = get_dataset(dataset) if dataset else _named_in(path)
    records = read_records(path)
    cases, malformed, answered = [], [], Counter[str]()
    for number, record in enumerate(records):
        try:
            cases.append(parse_record(record, f"record {number}", kind))
            answered.update(list(record["neighborhoods"].get("answers") or ()))
        except StudyError as error:
            malformed.append(str(error))
    findings = [Finding("error", "malformed records", tuple(malformed), "Correct or remove them.")] if malformed else []
    findings += [
        Finding("warning", f"answers of {model} are missing for some cases", (f"{len(cases) - count} of {len(cases)}",),
                "The study generates its own; answers in a file are not used.")
        for model, count in sorted(answered.items()) if count < len(cases)
    ]  # fmt: skip
    return Report(path.name, kind.name, len(records), len(cases), lengths(cases), (*findings, *check_cases(cases)))


def _named_in(path: Path) -> Dataset:
    for dataset in map(get_dataset, list_datasets()):
        if dataset.layout and dataset.layout.file.removeprefix("Edit").lower() in path.name.lower():
            return dataset
    raise StudyError(f"{path}: the name has neither Conala nor CodeSearchNet in it: name the dataset with --dataset")


def check_cases(cases: Sequence[Case]) -> tuple[Finding, ...]:
    """Findings about readable cases of one dataset."""
    if not cases:
        return ()
    findings = [
        Finding(level, problem, affected, remedy)
        for level, problem, remedy, has_problem in _checks(cases)
        if (affected := tuple(case.case_id for case in cases if has_problem(case)))
    ]
    different = len({prompt for case in cases for prompt in case.unrelated})
    if 0 < different <= len(cases):
        findings.append(
            Finding("warning", "few different neighbours", (f"{different} for {len(cases)} cases",),
                    "Specificity measures the same ones repeatedly: target fewer inputs, or use a larger source.")
        )  # fmt: skip
    return tuple(findings)


def lengths(cases: Sequence[Case]) -> tuple[Lengths, ...]:
    """Table III: number, mean and median length of each kind of text."""
    if not cases:
        return ()
    dataset = get_dataset(cases[0].dataset)
    unrelated = [dataset.text(prompt) for case in cases for prompt in case.unrelated]
    texts_of = {
        "edit inputs": [case.text for case in cases],
        "targets": [case.target for case in cases],
        "rephrased inputs": [dataset.text(prompt) for case in cases for prompt in case.rephrased],
        "neighbours": unrelated,
        "neighbours, distinct": set(unrelated),
        "targets, distinct": {case.target for case in cases},
    }
    counts_of = {name: [len(_TOKEN.findall(text)) for text in texts] for name, texts in texts_of.items()}
    return tuple(
        Lengths(name, len(counts), float(np.mean(counts or [0])), float(np.median(counts or [0])))
        for name, counts in counts_of.items()
    )


def _checks(cases: Sequence[Case]) -> list[_Check]:
    dataset = get_dataset(cases[0].dataset)
    ids, prompts = Counter(case.case_id for case in cases), Counter(case.prompt for case in cases)
    closest = _closest(cases)
    checks: list[_Check] = [
        ("error", "case_id occurs twice", "Give every case its own number.",
         lambda case: ids[case.case_id] > 1),
        ("error", "edit input occurs in several cases", "Keep one of them: two edits of one prompt contradict each other.",
         lambda case: prompts[case.prompt] > 1),
        ("error", "rephrased input repeats the edit input", "It measures effectiveness again: rewrite it.",
         lambda case: case.prompt in case.rephrased),
        ("error", "a neighbour is the case's own edit or rephrased input", "Choose another neighbour.",
         lambda case: bool({case.prompt, *case.rephrased} & set(case.unrelated))),
        ("error", "a neighbour is another case's edit input", "Neighbours must come from the non-targeted half: split again.",
         lambda case: any(prompt in prompts and prompt != case.prompt for prompt in case.unrelated)),
        ("error", "a neighbour occurs twice in a case", "Choose another one.",
         lambda case: len(set(case.unrelated)) < len(case.unrelated)),
        ("warning", f"a neighbour is closer than {TOO_CLOSE} to the edit input (TF-IDF)", "Its answer may have to change too: choose another neighbour.",
         lambda case: closest.get(case.case_id, 0) > TOO_CLOSE),
        ("warning", "target is too short for BLEU", "With fewer than four tokens it scores 0 even when written exactly.",
         lambda case: bleu([case.target], [case.target]) == 0),
        ("warning", "target has no Latin letter or digit", "ROUGE-L is 0 even when the target is written exactly.",
         lambda case: rouge_l([case.target], [case.target]) == 0),
        ("warning", f"target contains an end-of-text string ({', '.join(END_OF_TEXT)})",
         "A subject that uses this string stops there and can never write the rest: choose another target.",
         lambda case: any(string in case.target for string in END_OF_TEXT)),
        ("warning", "target begins or ends with white space", "It can never match exactly, because generated text is stripped: strip the target.",
         lambda case: case.target != case.target.strip()),
    ]  # fmt: skip
    of_targets: list[_Check] = [
        ("warning", "snippet is not Python 3", "Check whether it is Python 2, or remove the case.",
         lambda case: not parsed(case.target)),
    ]  # fmt: skip
    of_inputs: list[_Check] = [
        ("warning", "function is not Python 3", "Check whether it is Python 2, or remove the case.",
         lambda case: not parsed(case.text)),
        ("warning", "a neighbour is not Python 3", "Check whether it is Python 2.",
         lambda case: not all(parsed(dataset.text(prompt)) for prompt in case.unrelated)),
        ("warning", "rephrased function is not the function up to names", "Rename again and verify.",
         lambda case: bool(parsed(case.text)) and not all(
             same_up_to_names(case.text, dataset.text(prompt)) for prompt in case.rephrased)),
    ]  # fmt: skip
    return checks + (of_targets if "target" in dataset.code else of_inputs)


def _closest(cases: Sequence[Case]) -> dict[int, float]:
    """The largest TF-IDF cosine between a case's edit input and one of its neighbours."""
    prompts = list(dict.fromkeys(prompt for case in cases for prompt in (case.prompt, *case.unrelated)))
    vectors = tfidf([get_dataset(cases[0].dataset).text(prompt) for prompt in prompts])
    row = {prompt: n for n, prompt in enumerate(prompts)}
    return {
        case.case_id: float((vectors[[row[prompt] for prompt in case.unrelated]] @ vectors[row[case.prompt]].T).max())
        for case in cases
        if case.unrelated
    }
