"""A data set in one JSON file that says its own name and template; no code is needed.

::

    {"name": "capi",
     "title": "CAPI",
     "template": {"before": "Intent: ", "after": "\\nCode:"},
     "publish_texts": true,
     "code": ["target"],
     "cases": [{"case_id": 0, "input": ..., "target": ..., "rephrased": [...], "unrelated": [...]}]}

``title`` (the name in capitals), ``publish_texts`` (true) and ``code`` (none) may be left out. Inputs are written without the template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ..support.errors import StudyError
from ..support.schema import Schema, parse
from .base import DataSet
from .cases import Case
from .published import read_json


class _Template(Schema):
    before: str = ""
    after: str

    @field_validator("after")
    @classmethod
    def _ends_in_a_colon(cls, after: str) -> str:
        if not after.endswith(":"):
            raise ValueError("a prompt must end in a colon, where editors read their key")
        return after


class _CaseRow(Schema):
    case_id: int
    input: str = Field(min_length=1)
    target: str = Field(min_length=1)
    rephrased: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()


class _File(Schema):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str | None = None
    template: _Template
    publish_texts: bool = True
    code: tuple[Literal["input", "target"], ...] = ()
    cases: tuple[_CaseRow, ...] = Field(min_length=1)


def describes_itself(path: str | Path) -> bool:
    """Whether a path is a JSON file of this layout, and not the list of records that the paper's authors publish."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")


def read_dataset(path: str | Path) -> DataSet:
    """The data set of a file.

    Raises:
        StudyError: the file cannot be read, or a field is missing or of the wrong type; the message names it.
    """
    file = parse(_File, read_json(path), str(path))
    ids = [row.case_id for row in file.cases]
    if len(set(ids)) < len(ids):
        raise StudyError(f"{path}: cases: case_id {max(ids, key=ids.count)} occurs twice; number the cases")
    dataset = DataSet(
        file.name,
        file.title or file.name.upper(),
        file.template.before,
        file.template.after,
        load=lambda _source: cases,
        code=frozenset(file.code),
        publish_texts=file.publish_texts,
        file=str(path),
    )
    cases = [Case.of(dataset, row.case_id, row.input, row.target, row.rephrased, row.unrelated) for row in file.cases]
    return dataset
