"""Loading the cases of a dataset that is given by its name, object or file.

A dataset can be one JSON file that states its name and template; no code is needed:

::

    {"name": "capi",
     "title": "CAPI",
     "template": {"before": "Intent: ", "after": "\\nCode:"},
     "publish_texts": true,
     "code": ["target"],
     "cases": [{"case_id": 0, "input": ..., "target": ..., "rephrased": [...], "unrelated": [...]}]}

``title`` (the name in capitals), ``publish_texts`` (true) and ``code`` (none) may be left out. Inputs are written without the template. A case
may have a ``check``, code that tests whether a generated snippet is right: ``{"setup": ..., "test": ...}``, see
:class:`~clme_lib.support.sandbox.Check`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from ..support.errors import StudyError
from ..support.reading import read_json
from ..support.sandbox import Check
from ..support.schema import Schema, parse
from .base import Dataset, get_dataset, list_datasets, register_dataset
from .cases import MOST_CASE_ID, Case, checked_text
from .source_code import parsed


def find_dataset(given: str | Dataset) -> Dataset:
    """The dataset of a registered name, or of a JSON file that describes one, which is then registered.

    Raises:
        StudyError: no such name or file, a malformed file, or a name that another dataset has.
    """
    if isinstance(given, Dataset):
        return register_dataset(given)
    if describes_itself(given):
        return _from_file(given)
    if given.endswith(".json"):
        raise StudyError(
            f"{given}: not a JSON file that describes a dataset; a file in the published layout is a source: "
            f"source={given} with dataset={' or '.join(list_datasets()[:2])}"
        )
    return get_dataset(given)


def load_cases(dataset: str | Dataset, source: str = "embedded") -> list[Case]:
    """All cases of a dataset.

    Args:
        dataset: ``cnle`` (natural language -> Python), ``csne`` (Python -> natural language), another registered name, a dataset
            itself, or the path of a JSON file that describes one.
        source: of the paper's two: ``embedded`` (hand-written CNLE; CSNE mined from installed packages, cached), ``published`` (the
            authors' files, downloaded from Zenodo once), or the path of a JSON file in their layout.

    Raises:
        StudyError: unknown dataset or source, failed download, malformed file.
    """
    if isinstance(dataset, str) and describes_itself(source) and _from_file(source).name == dataset:
        return list(_load(dataset, source))
    return list(_load(find_dataset(dataset).name, source))


@lru_cache(maxsize=8)
def _from_file(path: str) -> Dataset:
    dataset = read_dataset(path)
    try:
        return register_dataset(dataset)
    except StudyError as error:
        raise StudyError(f"{path}: name: {error}") from error


@lru_cache(maxsize=8)
def _load(name: str, source: str) -> tuple[Case, ...]:
    return tuple(get_dataset(name).load(source))


def selection_ids(dataset: str) -> frozenset[int]:
    """Ids of the embedded cases for choosing hyperparameters (30 per dataset of the paper); no published table contains them."""
    return get_dataset(dataset).selection


def selection_cases(dataset: str, count: int | None = None) -> tuple[list[Case], list[Case]]:
    """(The first ``count`` selection cases of a dataset (None: all), all cases that are not selection cases).

    Raises:
        StudyError: there are fewer.
    """
    cases, chosen = load_cases(dataset), selection_ids(dataset)
    selection = [case for case in cases if case.case_id in chosen]
    if count is not None and not 1 <= count <= len(selection):
        raise StudyError(
            f"cases={count}: {dataset} has {len(selection)} selection cases; choose from 1 to {len(selection)}"
        )
    return selection[:count], [case for case in cases if case.case_id not in chosen]


class _Template(Schema):
    before: str = ""
    after: str

    @field_validator("after")
    @classmethod
    def _ends_in_a_colon(cls, after: str) -> str:
        if not after.endswith(":"):
            raise ValueError("a prompt must end in a colon, where editors read their key")
        return after


_Text = Annotated[str, AfterValidator(checked_text)]


def _python(code: str) -> str:
    if parsed(code) is None:
        raise ValueError("is not Python")
    return code


class _CheckRow(Schema):
    setup: Annotated[str, AfterValidator(_python)] = ""
    test: Annotated[_Text, AfterValidator(_python)]


class _CaseRow(Schema):
    case_id: int = Field(strict=True, ge=0, le=MOST_CASE_ID)
    input: _Text
    target: _Text
    rephrased: tuple[_Text, ...] = ()
    unrelated: tuple[_Text, ...] = ()
    check: _CheckRow | None = None


class _File(Schema):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: _Text | None = None
    template: _Template
    publish_texts: bool = Field(True, strict=True)
    code: tuple[Literal["input", "target"], ...] = ()
    cases: tuple[_CaseRow, ...] = Field(min_length=1)


def describes_itself(path: str | Path) -> bool:
    """Whether a path is a JSON file in this layout rather than the list of records that the paper's authors publish."""
    if Path(path).suffix != ".json" or not os.path.isfile(path):  # unlike Path's, False for a name that is too long
        return False
    try:
        with open(path, "rb") as stream:
            return stream.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error


def read_dataset(path: str | Path) -> Dataset:
    """The dataset of a file.

    Raises:
        StudyError: the file cannot be read, or a field is missing or of the wrong type; the message names it.
    """
    file = parse(_File, read_json(path), str(path))
    ids = [row.case_id for row in file.cases]
    if len(set(ids)) < len(ids):
        raise StudyError(f"{path}: cases: case_id {max(ids, key=ids.count)} occurs twice; number the cases")
    dataset = Dataset(
        file.name,
        file.title or file.name.upper(),
        file.template.before,
        file.template.after,
        load=lambda _source: cases,
        code=frozenset(file.code),
        publish_texts=file.publish_texts,
        file=str(path),
    )
    cases = [
        replace(
            Case.of(dataset, row.case_id, row.input, row.target, row.rephrased, row.unrelated),
            check=Check(row.check.setup, row.check.test) if row.check else None,
        )
        for row in file.cases
    ]
    return dataset
