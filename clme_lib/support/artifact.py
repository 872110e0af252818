"""Safetensors files that say what they are: a JSON header beside the tensors, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import StudyError


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], header: dict) -> None:
    """Write ``tensors`` and ``header``; a killed process leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as scratch:
        unfinished = Path(scratch) / "part"
        kept = {name: one.detach().contiguous().cpu() for name, one in tensors.items()}
        save_file(kept, unfinished, metadata={"clme": json.dumps(header)})
        os.replace(unfinished, file)


def read_header(file: Path | str) -> dict:
    """The header alone ({} if the file has none of ours).

    Raises:
        StudyError: not a readable safetensors file.
    """
    return _read(file, with_tensors=False)[0]


def read_tensors(file: Path | str, *names: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors (all of them, or the named ones).

    Raises:
        StudyError: not a readable safetensors file, or it lacks a named tensor.
    """
    return _read(file, *names, with_tensors=True)


def read_rows(file: Path | str, name: str, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of one tensor, without reading the others.

    Raises:
        StudyError: not a readable safetensors file, or it lacks the tensor.
    """
    with _opened(file) as content:
        whole = content.get_slice(name)
        return torch.cat([whole[row : row + 1] for row in rows])


def _read(file: Path | str, *names: str, with_tensors: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    with _opened(file) as content:
        header = json.loads((content.metadata() or {}).get("clme", "{}"))
        wanted = (names or tuple(content.keys())) if with_tensors else ()
        return header, {name: content.get_tensor(name) for name in wanted}


@contextlib.contextmanager
def _opened(file: Path | str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except Exception as error:  # the format's errors have no common type
        raise StudyError(f"{file}: cannot be read as a safetensors file: {error}; remove it to make it anew") from error
