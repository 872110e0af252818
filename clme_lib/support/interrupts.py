"""Ctrl-C is never lost, even if a library swallows the KeyboardInterrupt that it raises."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_asked = False


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside the block Ctrl-C raises KeyboardInterrupt at once, and again at the next :func:`check` if that was swallowed."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        _asked = False
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the work continued nevertheless."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
