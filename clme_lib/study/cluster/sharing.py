"""Files that are made once for all machines of a cluster: which worker makes each, and how the others get it.

Learnt networks, encoders and statistics are files in the user's cache (support/artifact.py). If workers share the cache, its own locks
are enough. If each node has its own, the registry knows which worker makes a file, keeps the others waiting, and passes the bytes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ...support.cache import cache_dir
from ...support.journal import write_bytes

_ASK_EVERY = 0.5  # seconds


def cache_id() -> str:
    """An id that is the same for all processes that share a cache."""
    file = cache_dir() / "cluster-id"
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    own.write_text(secrets.token_hex(16))
    with contextlib.suppress(FileExistsError):
        os.link(own, file)  # if several processes try at once, only one link is made
    own.unlink()
    return file.read_text()


class Registry:
    """Knows which worker makes each file of the cache, and keeps the files' contents. On a cluster it is an actor."""

    def __init__(self) -> None:
        self._makers: dict[str, str] = {}
        self._contents: dict[str, bytes] = {}
        self._caches: set[str] = set()

    def acquire(self, name: str, worker: str, cache: str) -> Literal["make", "wait"] | bytes:
        """``make`` if the worker may make the file, ``wait`` if it must ask again later, or the bytes to write; it holds the file unless it waits."""
        self._caches.add(cache)
        if self._makers.setdefault(name, worker) != worker:
            return "wait"
        return self._contents.get(name, "make")

    def is_missing_elsewhere(self, name: str) -> bool:
        """Whether other caches need the file's bytes (:meth:`keep`)."""
        return len(self._caches) > 1 and name not in self._contents

    def keep(self, name: str, content: bytes) -> None:
        """Keep the bytes of a file that a worker made."""
        self._contents[name] = content

    def release(self, name: str, worker: str) -> None:
        """Release a file that a worker holds."""
        if self._makers.get(name) == worker:
            del self._makers[name]

    def join(self, cache: str) -> None:
        """Register the cache of a new worker."""
        self._caches.add(cache)

    def forget(self, worker: str) -> None:
        """Release all files of a worker that died."""
        self._makers = {name: maker for name, maker in self._makers.items() if maker != worker}


class Sharing:
    """A worker's side of the registry.

    Args:
        ask: calls one of the registry's methods by its name.
    """

    def __init__(self, worker: str, ask: Callable[..., Any]) -> None:
        self._worker, self._ask, self.cache = worker, ask, cache_id()
        ask("join", self.cache)

    @contextlib.contextmanager
    def made_once(self, file: Path) -> Iterator[None]:
        name = file.relative_to(cache_dir()).as_posix()
        while (answer := self._ask("acquire", name, self._worker, self.cache)) == "wait":
            time.sleep(_ASK_EVERY)
        if isinstance(answer, bytes):
            write_bytes(file, answer)
        try:
            yield
        except BaseException:
            self._ask("release", name, self._worker)
            raise
        # keep the bytes before the release, so that the next worker gets them
        if not isinstance(answer, bytes) and file.is_file() and self._ask("is_missing_elsewhere", name):
            self._ask("keep", name, file.read_bytes())
        self._ask("release", name, self._worker)
