"""What is made once over all machines of a cluster: who makes it, and how the others come by it.

Learnt networks, encoders and statistics are files of the user's cache (support/artifact.py). Where workers share the cache, its own locks
are enough. Where each node has its own, the registry knows who makes a file, keeps others waiting, and hands the bytes on.
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
    """The same for all processes that share a cache."""
    file = cache_dir() / "cluster-id"
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    own.write_text(secrets.token_hex(16))
    with contextlib.suppress(FileExistsError):
        os.link(own, file)  # of several at once, one
    own.unlink()
    return file.read_text()


class Registry:
    """Which file of the cache is made by whom, and what was in it. On a cluster an actor of its own."""

    def __init__(self) -> None:
        self._makers: dict[str, str] = {}
        self._contents: dict[str, bytes] = {}
        self._caches: set[str] = set()

    def acquire(self, name: str, worker: str, cache: str) -> Literal["make", "wait"] | bytes:
        """May a worker make the file? Else what it is to do: wait and ask again, or write these bytes first (it holds the file then, too)."""
        self._caches.add(cache)
        if self._makers.setdefault(name, worker) != worker:
            return "wait"
        return self._contents.get(name, "make")

    def is_missing_elsewhere(self, name: str) -> bool:
        """Whether others need the bytes (:meth:`keep`): their caches are not the maker's."""
        return len(self._caches) > 1 and name not in self._contents

    def keep(self, name: str, content: bytes) -> None:
        """What a worker made."""
        self._contents[name] = content

    def release(self, name: str, worker: str) -> None:
        """The worker does not hold the file any more."""
        if self._makers.get(name) == worker:
            del self._makers[name]

    def join(self, cache: str) -> None:
        """A worker has come that uses this cache."""
        self._caches.add(cache)

    def forget(self, worker: str) -> None:
        """A worker died; what it held is free."""
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
        # The bytes come first: whoever asks after the release has them.
        if not isinstance(answer, bytes) and file.is_file() and self._ask("is_missing_elsewhere", name):
            self._ask("keep", name, file.read_bytes())
        self._ask("release", name, self._worker)
