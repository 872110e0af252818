"""One writer at a time, across processes. A lock belongs to its open file, so a process that dies releases it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a system without them: two processes must not write the same file there
    fcntl = None  # type: ignore[assignment]

from .errors import StudyError


def wait_for_lock(file: IO) -> None:
    """Lock an open file until it is closed; waits while another process holds the lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock a folder inside the block; the folder is made if it does not exist.

    Raises:
        StudyError: another process holds the lock (the message has its id), or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written to: {error}; choose another folder") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StudyError(
                f"{folder}: process {file.read().strip()} is writing to this folder; wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
