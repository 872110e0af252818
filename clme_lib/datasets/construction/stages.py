"""Stages of a construction: JSON Lines artefacts that record what they were made from, and can be resumed.

For example, the stage ``neighbours`` has its rows in ``05-neighbours.jsonl`` and its manifest in ``05-neighbours.json``::

    {"stage": ..., "settings": {...}, "inputs": {stage: sha256 of its rows}, "counts": {...}, "finished": true}

A finished stage is read, an unfinished one completed: rows are appended as they are made and identified by their ``id``. A stage
whose settings, inputs or rows have changed since it was made is refused, and neither mixed nor silently remade.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from ...support.cache import file_sha256
from ...support.errors import StudyError
from ...support.journal import Journal, read_rows, write_text
from ...support.reading import read_json
from ...support.schema import Schema, parse

StageRow = dict[str, Any]
_MOST_AT_ONCE = 256  # rows per append, which is one disk write


@dataclass(frozen=True)
class Step:
    """How the rows of a stage are made.

    Attributes:
        settings: everything besides the input rows that decides the result, as JSON values.
        make: maps rows to one row each with the same ``id``, in any order.
        one_by_one: whether a row's result depends on no other row; an interrupted stage then makes only the missing rows.
        fields: names and types of the fields of a row that was not dropped.
    """

    settings: dict[str, Any]
    make: Callable[[Sequence[StageRow]], Iterable[StageRow]]
    one_by_one: bool = True
    fields: Mapping[str, type] = field(default_factory=dict)


class Stages:
    """The stages of one construction, in order, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, str] = {}  # SHA-256 of each stage's rows
        self.counts: dict[str, dict[str, int]] = {}  # by stage, then by what is counted

    def run(self, name: str, step: Step, todo: Sequence[StageRow]) -> list[StageRow]:
        """The rows of stage ``name``: read, or made from the rows of the previous stage (the first stage gets none).

        Raises:
            StudyError: the stage in the folder was made with different settings or from different rows.
        """
        file = self.folder / f"{len(self._made) + 1:02d}-{name}.jsonl"
        identity = {"stage": name, "settings": step.settings, "inputs": dict(self._made)}
        before = manifest_of(file)
        goes_on = step.one_by_one and bool(todo)  # if not, the rows of an unfinished stage are made again
        for part, now in identity.items() if before and (before["finished"] or goes_on) else ():
            if before.get(part) != now:
                raise StudyError(
                    f"{file}: made with different {part} ({_difference(before.get(part), now)}); remove {file.stem}.* and "
                    "the later stages to make them again, or choose another folder"
                )
        if not before or not before["finished"]:
            if not before and file.exists():
                raise StudyError(f"{file}: has no {file.stem}.json next to it that says how it was made; move it away")
            if not goes_on:
                file.unlink(missing_ok=True)
            _write_manifest(file, {**identity, "finished": False})
            try:
                _complete(file, name, step, todo)
            except StudyError:
                if not goes_on:
                    file.unlink(missing_ok=True)
                    file.with_suffix(".json").unlink()
                raise
        rows = read_stage(file)
        self._made[name] = file_sha256(file)
        dropped = Counter(f"dropped: {row['dropped']}" for row in rows if row.get("dropped"))
        self.counts[name] = {"rows": len(rows), **dropped}
        content = {**identity, "counts": self.counts[name], "sha256": self._made[name], "finished": True}
        _write_manifest(file, content)
        return rows

    def account(self) -> str:
        """The number of rows that each stage had and dropped, in one line."""
        return "; ".join(
            f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
            for name, counts in self.counts.items()
        )


def read_stage(file: Path) -> list[StageRow]:
    """The rows of a stage's file.

    Raises:
        StudyError: the stage is finished and its file has changed since.
    """
    manifest = manifest_of(file)
    if manifest.get("finished") and not (file.is_file() and file_sha256(file) == manifest["sha256"]):
        raise StudyError(
            f"{file}: was changed after it was made; restore it, or remove {file.stem}.* and the later stages"
        )
    return read_rows(file)


def _complete(file: Path, name: str, step: Step, todo: Sequence[StageRow]) -> None:
    """Append the missing rows as they are made: a kill loses those of the last second."""
    missing = {row["id"] for row in todo}
    for number, row in enumerate(read_rows(file), 1):
        known = isinstance(row, dict) and isinstance(row.get("id"), int | str) and row["id"] in missing
        if not known or (
            not row.get("dropped") and any(type(row.get(f)) is not kind for f, kind in step.fields.items())
        ):
            raise StudyError(f"{file}, line {number}: not a row of this stage, or a repeated id; remove the line")
        missing.remove(row["id"])
    journal = Journal(file, lambda row: row["id"])
    left = [row for row in todo if row not in journal]
    made: list[StageRow] = []
    kept_at = time.monotonic()
    try:
        with tqdm(total=len(todo) or None, initial=len(todo) - len(left), desc=name, unit="row") as bar:
            for row in step.make(left) if left or not todo else ():
                made.append(row)
                bar.update()
                if len(made) == _MOST_AT_ONCE or time.monotonic() - kept_at > 1:
                    journal.append(*made)
                    made, kept_at = [], time.monotonic()
    finally:
        journal.append(*made)  # the file exists even if the stage has no rows


def _write_manifest(file: Path, content: dict) -> None:
    write_text(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")


class _Manifest(Schema):
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, int] = {}
    sha256: str = ""
    finished: bool = Field(strict=True)


def manifest_of(file: Path) -> dict[str, Any]:
    """What a stage's rows were made from; empty if the stage does not exist yet. StudyError if the manifest cannot be read."""
    manifest = file.with_suffix(".json")
    if not manifest.exists():
        return {}
    try:
        return parse(_Manifest, read_json(manifest), str(manifest)).model_dump()
    except StudyError as error:
        raise StudyError(f"{error}; remove it and {file.name}") from error


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r}, now {now!r}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def stage_row(row_id: Any, dropped: str | None = None, **fields: Any) -> StageRow:
    """A row with its fields, or with the reason why later stages leave it out."""
    return {"id": row_id, "dropped": dropped} if dropped else {"id": row_id, **fields}


def kept(rows: Iterable[StageRow]) -> list[StageRow]:
    """Rows that no stage has dropped."""
    return [row for row in rows if not row.get("dropped")]
