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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...support.cache import file_sha256
from ...support.errors import StudyError
from ...support.journal import Journal, read_rows, write_text

StageRow = dict[str, Any]
Make = Callable[[Sequence[StageRow]], Iterable[StageRow]]


@dataclass(frozen=True)
class Step:
    """How rows are made from others, and whatever decides the result besides those, as JSON values for the stage's manifest."""

    settings: dict[str, Any]
    make: Make


class Stages:
    """The stages of one construction, in order, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, str] = {}

    def file(self, name: str) -> Path:
        """The rows of a stage that has been asked for."""
        return self.folder / f"{list(self._made).index(name) + 1:02d}-{name}.jsonl"

    def run(
        self,
        name: str,
        settings: dict[str, Any],
        todo: Sequence[StageRow],
        make: Make,
        batch: int | None = None,
    ) -> list[StageRow]:
        """The rows of stage ``name``: read, or made from the rows of the stage before.

        Args:
            settings: whatever decides the result besides the input, as JSON values.
            todo: rows with an ``id``; a stage reads the previous one's, the first one may be given none.
            make: from some of ``todo`` to their rows, one each with the same ``id``, in any order. Rows are kept as they come: a
                kill loses what was made in the last second.
            batch: how many of ``todo`` are handed to ``make`` at once (None: all).

        Raises:
            StudyError: the stage in the folder was made with other settings or from other rows.
        """
        earlier = dict(self._made)
        self._made[name] = ""
        file = self.file(name)
        identity = {"stage": name, "settings": settings, "inputs": earlier}
        before = self._manifest_of(file)
        if before is not None and {key: before.get(key) for key in identity} != identity:
            different = next(key for key in ("stage", "settings", "inputs") if before.get(key) != identity[key])
            raise StudyError(
                f"{file}: made with other {different} ({_difference(before.get(different), identity[different])}); remove the file and "
                "those after it to make them anew, or choose another folder"
            )
        if before is None or not before["finished"]:
            if before is None and file.exists():
                raise StudyError(f"{file}: has no {file.stem}.json beside it that says how it was made; move it away")
            self._write_manifest(file, {**identity, "finished": False})
            self._complete(name, file, todo, make, batch)
        rows = read_rows(file)
        self._made[name] = file_sha256(file)
        counts = {"rows": len(rows), **Counter(f"dropped: {row['dropped']}" for row in rows if row.get("dropped"))}
        self._write_manifest(file, {**identity, "counts": counts, "sha256": self._made[name], "finished": True})
        return rows

    def _complete(self, name: str, file: Path, todo: Sequence[StageRow], make: Make, batch: int | None) -> None:
        journal = Journal(file, lambda row: row["id"])
        journal.append()  # the file exists even if the stage has no rows
        left = [row for row in todo if row not in journal]
        with tqdm(total=len(todo) or None, initial=len(todo) - len(left), desc=name, unit="row") as bar:
            for part in _parts(left, batch) if todo else [[]]:
                for rows in _together(row for row in make(part) if row not in journal):
                    journal.append(*rows)
                    bar.update(len(rows))

    @staticmethod
    def _write_manifest(file: Path, content: dict) -> None:
        write_text(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")

    @staticmethod
    def _manifest_of(file: Path) -> dict | None:
        try:
            return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StudyError(f"{file.with_suffix('.json')}: not JSON ({error}); remove it and {file.name}") from error


def stage_row(row_id: Any, dropped: str | None = None, **fields: Any) -> StageRow:
    """A row with its fields, or with the reason why it is left out from here on."""
    return {"id": row_id, "dropped": dropped} if dropped else {"id": row_id, **fields}


def kept(rows: Iterable[StageRow]) -> list[StageRow]:
    """Rows that no stage has dropped."""
    return [row for row in rows if not row.get("dropped")]


def _parts(rows: Sequence[StageRow], size: int | None) -> Iterator[Sequence[StageRow]]:
    step = size or max(1, len(rows))
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def _together(rows: Iterable[StageRow], most: int = 256) -> Iterator[list[StageRow]]:
    """Rows as they come when they are slow to make, many at once when they are not: an append is a disk write."""
    waiting: list[StageRow] = []
    last = time.monotonic()
    try:
        for row in rows:
            waiting.append(row)
            if len(waiting) == most or time.monotonic() - last > 1:
                yield waiting
                waiting, last = [], time.monotonic()
    except BaseException:
        if waiting:
            yield waiting
        raise
    if waiting:
        yield waiting


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r}, now {now!r}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
