"""From a data set's name, object or file to its cases."""

from __future__ import annotations

from functools import lru_cache

from ..support.errors import StudyError
from .base import DataSet, get_dataset, list_datasets, register_dataset
from .cases import Case
from .own_file import describes_itself, read_dataset


def find_dataset(given: str | DataSet) -> DataSet:
    """The data set of a registered name, or of a JSON file that describes itself (:mod:`.own_file`), which is registered by it.

    Raises:
        StudyError: no such name or file, a malformed file, or a name that another data set has.
    """
    if isinstance(given, DataSet):
        return register_dataset(given)
    if describes_itself(given):
        return _from_file(given)
    if given.endswith(".json"):
        raise StudyError(
            f"{given}: no JSON file that describes a data set; a file in the published layout is a source: "
            f"source={given} with dataset={' or '.join(list_datasets()[:2])}"
        )
    return get_dataset(given)


def load_cases(dataset: str | DataSet, source: str = "embedded") -> list[Case]:
    """All cases of a data set.

    Args:
        dataset: ``cnle`` (natural language -> Python), ``csne`` (Python -> natural language), another registered name, a data set
            itself, or the path of a JSON file that describes one.
        source: of the paper's two: ``embedded`` (hand-written CNLE; CSNE mined from installed packages, cached), ``published`` (the
            authors' files, downloaded from Zenodo once), or the path of a JSON file in their layout.

    Raises:
        StudyError: unknown data set or source, failed download, malformed file.
    """
    if isinstance(dataset, str) and describes_itself(source) and _from_file(source).name == dataset:
        return list(_load(dataset, source))
    return list(_load(find_dataset(dataset).name, source))


@lru_cache(maxsize=8)
def _from_file(path: str) -> DataSet:
    return register_dataset(read_dataset(path))


@lru_cache(maxsize=8)
def _load(name: str, source: str) -> tuple[Case, ...]:
    return tuple(get_dataset(name).load(source))


def selection_ids(dataset: str) -> frozenset[int]:
    """The embedded cases (30 of the paper's data sets) that are for choosing hyper-parameters; they never enter a published table."""
    return get_dataset(dataset).selection


def selection_cases(dataset: str, count: int | None = None) -> tuple[list[Case], list[Case]]:
    """(the first ``count`` selection cases of a data set (None: all), all its cases that are not for selection).

    Raises:
        StudyError: there are not so many.
    """
    cases, chosen = load_cases(dataset), selection_ids(dataset)
    selection = [case for case in cases if case.case_id in chosen]
    if count is not None and not 1 <= count <= len(selection):
        raise StudyError(
            f"cases={count}: {dataset} has {len(selection)} selection cases; choose from 1 to {len(selection)}"
        )
    return selection[:count], [case for case in cases if case.case_id not in chosen]
