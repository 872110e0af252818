"""One writer at a time, over processes; the lock of a process that died is free."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import StudyError


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder alone inside the block.

    Raises:
        StudyError: another process holds it (the message has its id), or the folder cannot be written to.
    """
    holder = folder / ".writer"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock").acquire(timeout=0):
            holder.write_text(str(os.getpid()), encoding="utf-8")
            yield
    except Timeout:
        with contextlib.suppress(OSError):
            raise StudyError(
                f"{folder}: process {holder.read_text(encoding='utf-8')} is writing there; wait for it, or choose another out="
            ) from None
        raise StudyError(f"{folder}: another process is writing there; wait for it, or choose another out=") from None
