"""Edits on disk: one safetensors file whose header says what they are and for which subject."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..support.artifact import Artifact
from ..support.errors import StudyError
from . import codebooks, prompts, weights  # noqa: F401  # registers the kinds of edits
from .applying import check_fits
from .base import Edit

if TYPE_CHECKING:
    from ..subjects.subject import Subject

FORMAT, FORMAT_VERSION = "clme-edits", 2


def save_edits(path: str | os.PathLike, edits: Sequence[Edit], subject: Subject, about: dict | None = None) -> None:
    """Write edits to one file, with ``about`` as a JSON description. A tensor that several edits share is written once."""
    tensors: dict[str, torch.Tensor] = {}
    first: dict[tuple, str] = {}
    entries = []
    for n, edit in enumerate(edits):
        names = {}
        for name, tensor in edit.tensors().items():
            where = (tensor.data_ptr(), tensor.shape, tensor.stride())
            names[name] = first.setdefault(where, f"{n}.{name}") if tensor.numel() else f"{n}.{name}"
            tensors.setdefault(names[name], tensor)
        entries.append({**edit.describe(), "tensors": names})
    header = {"format": FORMAT, "version": FORMAT_VERSION, "subject": subject.name, "fingerprint": subject.fingerprint}
    Artifact(Path(path), header).write(tensors, edits=entries, about=about or {})


def read_about(path: str | os.PathLike) -> dict:
    """The JSON description in an edits file; StudyError if it is not an edits file."""
    header, _ = _read(path, with_tensors=False)
    return header.get("about", {})


def read_subject(path: str | os.PathLike) -> str:
    """The name of the subject that the edits in a file were made for; StudyError if it is not an edits file."""
    header, _ = _read(path, with_tensors=False)
    return header["subject"]


def load_edits(path: str | os.PathLike, subject: Subject) -> list[Edit]:
    """Read edits written by :func:`save_edits`; their tensors are on the subject's device.

    Raises:
        StudyError: the file is not an edits file, has another version, or is for another subject.
    """
    header, tensors = _read(path)
    if header["fingerprint"] != subject.fingerprint:
        if header["subject"] == subject.name and header["fingerprint"].startswith(subject.fingerprint):
            raise StudyError(
                f"{path}: the edits were made for {subject.name} with another edit in it, and do not include that: save what both make "
                "together, save_edits(path, [subject.edited(first).edited(second).edit], subject)"
            )
        raise StudyError(
            f"{path}: the edits were made for {header['subject']} ({header['fingerprint'][:40]}), "
            f"not for {subject.name} ({subject.fingerprint[:40]})"
        )
    on_device = {name: tensor.to(subject.device) for name, tensor in tensors.items()}
    edits = []
    for entry in header["edits"]:
        edit = Edit.restored(entry, {name: on_device[stored] for name, stored in entry["tensors"].items()})
        check_fits(edit, subject.down_proj)
        edits.append(edit)
    return edits


def _read(path: str | os.PathLike, with_tensors: bool = True) -> tuple[dict, dict[str, torch.Tensor]]:
    file = Path(path)
    if not file.is_file():
        raise StudyError(
            f"{file}: there is no such file; save_edits writes one, and so does a run of many edits in its folder states/"
        )
    header, tensors = Artifact(file).read(with_tensors=with_tensors)
    if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
        raise StudyError(f"{file}: not a {FORMAT} file of version {FORMAT_VERSION}; write such files with save_edits")
    return header, tensors
