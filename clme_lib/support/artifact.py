"""Safetensors files that describe themselves: tensors and a JSON header, written completely or not at all.

The header has the SHA-256 of itself and of the tensors, which is checked when a process first reads the file; older files
without this hash are read unchecked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .cache import cache_dir, name_for
from .errors import StudyError
from .locks import wait_for_lock
from .reading import parse_json


class Sharing(Protocol):
    """How the caches of several machines share files that are made only once."""

    def made_once(self, file: Path) -> contextlib.AbstractContextManager[None]:
        """Lock the file's name on all machines inside the block; the file is fetched first if another machine has made it."""


_sharing: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def shared_by(sharing: Sharing) -> Iterator[None]:
    """Inside the block, artifacts are made only once over several machines."""
    token = _sharing.set(sharing)
    try:
        yield
    finally:
        _sharing.reset(token)


@dataclass(frozen=True)
class Artifact:
    """A file of tensors, which is refused if its header does not have the expected identity."""

    file: Path
    # everything that decides the content, as JSON values; the file's header begins with it
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def cached(cls, folder: str, prefix: str, identity: dict[str, Any]) -> Artifact:
        """An artifact in a folder of the user's cache, named by a readable prefix and the hash of its identity."""
        return cls(cache_dir() / folder / f"{name_for(prefix, identity)}.safetensors", identity)

    def exists(self) -> bool:
        return self.file.is_file()

    def write(self, tensors: Mapping[str, torch.Tensor], **more: Any) -> None:
        """Write it, with ``more`` in its header after the identity; a killed process leaves the old file or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.file.parent, prefix=".unfinished-") as scratch:
            unfinished = Path(scratch) / "part"
            on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            header = json.loads(json.dumps({**self.identity, **more}, allow_nan=False))
            header["sha256"] = _sha256(header, ((name, on_cpu[name]) for name in sorted(on_cpu)))
            save_file(on_cpu, unfinished, metadata={"clme": json.dumps(header)})
            os.replace(unfinished, self.file)

    def read(self, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Header ({} if the file has none of ours) and, with ``with_tensors``, tensors; StudyError if the identity differs."""
        with self._opened() as content:
            header = _header(content)
            tensors = {name: content.get_tensor(name) for name in (content.keys() if with_tensors else ())}
        for name, value in json.loads(json.dumps(self.identity)).items():
            if header.get(name) != value:
                raise StudyError(
                    f"{self.file}: its {name} is {header.get(name)!r}, expected {value!r}; remove the file to make it again"
                )
        return header, tensors

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of one tensor, without checking the identity."""
        with self._opened() as content:
            whole = content.get_slice(name)
            return torch.cat([whole[row : row + 1] for row in rows])

    @contextmanager
    def made_once(self) -> Iterator[None]:
        """Lock the file inside the block, where the caller makes it if it is not finished; other processes wait.

        The lock is released if its holder dies. On a cluster it covers all nodes, and a file made by another node is fetched.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("a") as lock:
            wait_for_lock(lock)
            sharing = _sharing.get()
            with sharing.made_once(self.file) if sharing else nullcontext():
                yield

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            state = self.file.stat()
            _verify(self.file, state.st_size, state.st_mtime_ns)
            with safe_open(self.file, framework="pt") as content:
                yield content
        except Exception as error:  # the format's errors have no common type
            reason = f"cannot be read as a safetensors file: {error}; remove it, and make it again"
            raise StudyError(f"{self.file}: {reason}") from error


@cache
def _verify(file: Path, _size: int, _modified: int) -> None:
    """Raise ValueError unless the file is as it was written; done once in a process for a file that does not change."""
    with safe_open(file, framework="pt") as content:
        header = _header(content)
        written = header.pop("sha256", None)
        if written and written != _sha256(
            header, ((name, content.get_tensor(name)) for name in sorted(content.keys()))
        ):
            raise ValueError("its content does not have the SHA-256 that its header names")


def _header(content: Any) -> dict[str, Any]:
    header = parse_json((content.metadata() or {}).get("clme", "{}"), "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header


def _sha256(header: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
