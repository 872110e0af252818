"""CNLE and CSNE: load cases from an embedded set, the published files, or a path."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path

from ..support.errors import StudyError
from .cases import DATASETS, Case


def load_cases(dataset: str, source: str = "embedded") -> list[Case]:
    """All cases of a data set.

    Args:
        dataset: ``cnle`` (natural language -> Python) or ``csne`` (Python -> natural language).
        source: ``embedded`` (hand-written CNLE; CSNE mined from installed packages, cached), ``published`` (the
            authors' files, downloaded from Zenodo once), or the path of a JSON file in their layout.

    Raises:
        StudyError: unknown data set or source, failed download, malformed file.
    """
    if dataset not in DATASETS:
        raise StudyError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
    return list(_load(dataset, source))


@lru_cache(maxsize=8)
def _load(dataset: str, source: str) -> tuple[Case, ...]:
    from . import embedded_cnle, embedded_csne, published

    if source == "embedded":
        return tuple(embedded_cnle.load() if dataset == "cnle" else embedded_csne.load())
    if source == "published":
        return tuple(published.read(published.fetch(dataset), dataset))  # type: ignore[arg-type]
    if Path(source).is_file():
        return tuple(published.read(source, dataset))  # type: ignore[arg-type]
    raise StudyError(f"source {source!r} is neither 'embedded', 'published', nor the path of a JSON file")


@lru_cache(maxsize=1)
def _selection() -> dict[str, frozenset[int]]:
    file = resources.files("clme_lib") / "datasets" / "embedded" / "selection.json"
    return {name: frozenset(ids) for name, ids in json.loads(file.read_text(encoding="utf-8")).items()}


def selection_ids(dataset: str) -> frozenset[int]:
    """The 30 embedded cases a data set gives to hyper-parameter selection; they never enter a published table."""
    return _selection()[dataset]


def selection_cases(dataset: str, count: int | None = None) -> tuple[list[Case], list[Case]]:
    """(the first ``count`` selection cases of a data set (None: all 30), all its cases that are not for selection).

    Raises:
        StudyError: there are not so many.
    """
    everything, chosen = load_cases(dataset), selection_ids(dataset)
    there = [case for case in everything if case.case_id in chosen]
    if count is not None and not 1 <= count <= len(there):
        raise StudyError(f"cases={count}: {dataset} has {len(there)} selection cases; choose from 1 to {len(there)}")
    return there[:count], [case for case in everything if case.case_id not in chosen]
