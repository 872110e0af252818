"""Safetensors files that say what they are: a JSON header beside the tensors, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .cache import cache_dir, name_for
from .errors import StudyError


@dataclass(frozen=True)
class Artifact:
    """A file of tensors that is refused when it is not of what it should be."""

    file: Path
    # all that decides the content, as JSON values; the file's header begins with it
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def cached(cls, folder: str, prefix: str, identity: dict[str, Any]) -> Artifact:
        """One in a folder of the user's cache, named by a readable prefix and the hash of its identity."""
        return cls(cache_dir() / folder / f"{name_for(prefix, identity)}.safetensors", identity)

    def exists(self) -> bool:
        return self.file.is_file()

    def write(self, tensors: Mapping[str, torch.Tensor], **more: Any) -> None:
        """Write it, with ``more`` in its header beside the identity; a killed process leaves the old file or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.file.parent, prefix=".unfinished-") as scratch:
            unfinished = Path(scratch) / "part"
            on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(on_cpu, unfinished, metadata={"clme": json.dumps({**self.identity, **more})})
            os.replace(unfinished, self.file)

    def read(self, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Header ({} if the file has none of ours) and, unless only that is needed, tensors; StudyError if it is of something else."""
        with self._opened() as content:
            header = json.loads((content.metadata() or {}).get("clme", "{}"))
            tensors = {name: content.get_tensor(name) for name in (content.keys() if with_tensors else ())}
        for name, value in json.loads(json.dumps(self.identity)).items():
            if header.get(name) != value:
                raise StudyError(
                    f"{self.file}: its {name} is {header.get(name)!r}, needed is {value!r}; remove the file to make it anew"
                )
        return header, tensors

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of one tensor, without reading the others or checking the identity."""
        with self._opened() as content:
            whole = content.get_slice(name)
            return torch.cat([whole[row : row + 1] for row in rows])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.file, framework="pt") as content:
                yield content
        except Exception as error:  # the format's errors have no common type
            reason = f"cannot be read as a safetensors file: {error}; remove it to make it anew"
            raise StudyError(f"{self.file}: {reason}") from error
