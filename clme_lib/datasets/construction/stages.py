"""Stages of a construction: JSON Lines artefacts that say what they were made from, and go on where they were stopped.

Stage ``neighbours`` of a folder is ``05-neighbours.jsonl``, its rows, and ``05-neighbours.json``::

    {"stage": ..., "settings": {...}, "inputs": {stage: sha256 of its rows}, "counts": {...}, "finished": true}

A finished stage is read, an unfinished one completed: rows are appended as they are made and known by their ``id``. A stage
whose settings or inputs have changed since it was made is refused rather than mixed or silently made anew.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...support.cache import file_sha256
from ...support.errors import StudyError
from ...support.journal import Journal, read_rows, write_text

StageRow = dict[str, Any]
_MOST_AT_ONCE = 256  # rows in one append, which is a disk write


@dataclass(frozen=True)
class Step:
    """How the rows of a stage are made.

    Attributes:
        settings: whatever decides the result besides the rows it is made from, as JSON values.
        make: from rows to one row each of the same ``id``, in any order.
        one_by_one: whether a row's result depends on no other row; a stage that was stopped then makes only the missing ones.
    """

    settings: dict[str, Any]
    make: Callable[[Sequence[StageRow]], Iterable[StageRow]]
    one_by_one: bool = True


class Stages:
    """The stages of one construction, in order, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, str] = {}  # SHA-256 of each stage's rows

    def run(self, name: str, step: Step, todo: Sequence[StageRow]) -> list[StageRow]:
        """The rows of stage ``name``: read, or made from those of the stage before (the first stage is given none).

        Raises:
            StudyError: the stage in the folder was made with other settings or from other rows.
        """
        file = self.folder / f"{len(self._made) + 1:02d}-{name}.jsonl"
        identity = {"stage": name, "settings": step.settings, "inputs": dict(self._made)}
        before = _manifest_of(file)
        for part, now in identity.items() if before else ():
            if before.get(part) != now:
                raise StudyError(
                    f"{file}: made with other {part} ({_difference(before.get(part), now)}); remove the file and "
                    "those after it to make them anew, or choose another folder"
                )
        if not before or not before["finished"]:
            if not before and file.exists():
                raise StudyError(f"{file}: has no {file.stem}.json beside it that says how it was made; move it away")
            _write_manifest(file, {**identity, "finished": False})
            _complete(file, name, step, todo)
        rows = read_rows(file)
        self._made[name] = file_sha256(file)
        counts = {"rows": len(rows), **Counter(f"dropped: {row['dropped']}" for row in rows if row.get("dropped"))}
        _write_manifest(file, {**identity, "counts": counts, "sha256": self._made[name], "finished": True})
        return rows


def _complete(file: Path, name: str, step: Step, todo: Sequence[StageRow]) -> None:
    """Append the rows that are missing, as they come: a kill loses what was made in the last second."""
    journal = Journal(file, lambda row: row["id"])
    left = [row for row in todo if row not in journal]
    made: list[StageRow] = []
    kept_at = time.monotonic()
    try:
        with tqdm(total=len(todo) or None, initial=len(todo) - len(left), desc=name, unit="row") as bar:
            for row in step.make(left if step.one_by_one else todo) if left or not todo else ():
                if row in journal:
                    continue
                made.append(row)
                bar.update()
                if len(made) == _MOST_AT_ONCE or time.monotonic() - kept_at > 1:
                    journal.append(*made)
                    made, kept_at = [], time.monotonic()
    finally:
        journal.append(*made)  # the file exists even if the stage has no rows


def _write_manifest(file: Path, content: dict) -> None:
    write_text(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")


def _manifest_of(file: Path) -> dict:
    """What a stage's rows were made from; nothing when there is no such stage yet."""
    manifest = file.with_suffix(".json")
    try:
        return json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    except ValueError as error:
        raise StudyError(f"{manifest}: not JSON ({error}); remove it and {file.name}") from error


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r}, now {now!r}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def stage_row(row_id: Any, dropped: str | None = None, **fields: Any) -> StageRow:
    """A row with its fields, or with the reason why it is left out from here on."""
    return {"id": row_id, "dropped": dropped} if dropped else {"id": row_id, **fields}


def kept(rows: Iterable[StageRow]) -> list[StageRow]:
    """Rows that no stage has dropped."""
    return [row for row in rows if not row.get("dropped")]
