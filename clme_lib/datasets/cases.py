"""A case: one edit record ``m = (x, y, C, U)``, and how cases are sampled and folded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..support.sandbox import Check
from ..support.seeds import seeded_order
from .base import Dataset, get_dataset

MOST_CASE_ID = 2**63 - 1  # tables of records store ids in 64 bits


def checked_text(text: str) -> str:
    """``text`` if it can be a prompt or target; otherwise ValueError says why not."""
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError("has a NUL character: remove it")
    return text


@dataclass(frozen=True)
class Case:
    """One edit record (paper section III-C); its prompts include the template.

    Attributes:
        case_id: number within its dataset.
        prompt: x, the edit prompt.
        target: y, what the edited model should write after it.
        rephrased: C, prompts with the same meaning and the same target.
        unrelated: U, the neighbours: prompts of the nearest non-targeted inputs, whose answers should not change.
        check: code that tests whether a generated snippet is right, if the case has any; no text depends on it.
    """

    case_id: int
    dataset: str
    prompt: str
    target: str
    rephrased: tuple[str, ...]
    unrelated: tuple[str, ...]
    check: Check | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, dataset: Dataset, case_id: int, text: str, target: str, rephrased: Iterable[str], unrelated: Iterable[str]
    ) -> Case:
        """A case made from texts without the template."""
        others = tuple(map(dataset.prompt, rephrased)), tuple(map(dataset.prompt, unrelated))
        return cls(case_id, dataset.name, dataset.prompt(text), target, *others)

    @property
    def text(self) -> str:
        """The edit input without its template."""
        return get_dataset(self.dataset).text(self.prompt)

    @property
    def sha256(self) -> str:
        """Hash of everything a result depends on; records carry it, so that a changed case is never mistaken for the old one."""
        content = [self.dataset, self.prompt, self.target, self.rephrased, self.unrelated]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def dataset_sha256(cases: Sequence[Case]) -> str:
    """Hash of a whole dataset, independent of the cases' order."""
    lines = [f"{case.case_id}:{case.sha256}" for case in sorted(cases, key=lambda case: case.case_id)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample_cases(cases: Sequence[Case], count: int | None, seed: int) -> list[Case]:
    """The first ``count`` cases in seeded order (all when None): a larger sample contains every smaller one."""
    return in_seeded_order(cases, "sample", seed, cases[0].dataset)[:count] if cases else []


def in_seeded_order(cases: Sequence[Case], *parts: object) -> list[Case]:
    """The cases in the order of their ids' hashes (:func:`~clme_lib.support.seeds.seeded_order`)."""
    by_id = {case.case_id: case for case in cases}
    return [by_id[case_id] for case_id in seeded_order(by_id, *parts)]


def folds(cases: Sequence[Case], seed: int) -> tuple[list[int], list[int]]:
    """Case ids of the two halves (paper: even split). Trained editors learn from one and edit the other."""
    ids = [case.case_id for case in cases]
    order = seeded_order(ids, "fold", seed, cases[0].dataset if cases else "")
    half = (len(order) + 1) // 2
    return sorted(order[:half]), sorted(order[half:])


def split_cases(cases: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    """The cases of both :func:`folds`, in their order."""
    first = set(folds(cases, seed)[0])
    return [case for case in cases if case.case_id in first], [case for case in cases if case.case_id not in first]
