"""Append-only JSON Lines files that survive being killed.

Rows are appended in one write and synced, by one process at a time. A process killed in the middle can leave at most one torn
last line; reading ignores it, and the next append cuts it off first. Nothing that was complete is ever rewritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import interrupts
from .errors import StudyError
from .locks import wait_for_lock
from .reading import parse_json


class Journal:
    """The rows of a file by the value of ``key``, so that interrupted work can be resumed.

    ``rows`` are in the order in which keys first appeared; a later row replaces an earlier one with the same key.
    """

    def __init__(self, path: Path, key: Callable[[dict], Hashable]) -> None:
        self.path, self._key, self._read_size = path, key, 0
        self.rows: dict[Hashable, dict[str, Any]] = {}
        self.refresh()

    def __contains__(self, row: dict) -> bool:
        return self._key(row) in self.rows

    def __getitem__(self, row: dict) -> dict[str, Any]:
        return self.rows[self._key(row)]

    def refresh(self) -> None:
        """Read the file again if another process has appended to it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._read_size:
            self.rows = {self._key(row): row for row in read_rows(self.path)}
            self._read_size = size

    def append(self, *rows: dict) -> None:
        """Add rows, to the file too; see :func:`append_rows`. Rows that another process appended meanwhile stay unread."""
        append_rows(self.path, rows)
        self.rows.update((self._key(row), row) for row in rows)
        self._read_size = self.path.stat().st_size


@contextmanager
def journal_beside(file: Path, key: Callable[[dict], Hashable]) -> Iterator[Journal]:
    """A journal of what is finished of a file that is still to be written; removed when the block ends without an error."""
    unfinished = file.with_name(f"{file.name}.part")
    yield Journal(unfinished, key)
    unfinished.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict]:
    """All complete rows; an absent file has none. StudyError if a line other than a torn last one is not a JSON object."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # What follows the last newline is torn or empty.
        row = parse_json(line, where := f"{path}, line {number}")
        if not isinstance(row, dict):
            raise StudyError(f"{where}: expected an object, not {line[:40]!r}; move the file away and start again")
        rows.append(row)
    return rows


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Append rows durably; StudyError if they cannot be written (earlier rows stay readable)."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            wait_for_lock(file)
            _cut_torn_line(file)
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StudyError(f"{path}: could not append {len(text)} characters: {error}. Is the disk full?") from error
    interrupts.check()


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all, as UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: a process killed in the middle leaves the old file, or none. StudyError if writing fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StudyError(
            f"{path}: could not be written: {error}. Is the disk full, or the folder read-only?"
        ) from error


def _cut_torn_line(file) -> None:
    if end := file.seek(0, os.SEEK_END):
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
