"""Where a run comes from: versions, commit, hardware, and hashes of model, data and hyperparameters."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from ..editors.base import Editor
from ..subjects.subject import Subject

_LIBRARY = Path(__file__).parents[1]
_PACKAGES = [
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "scikit-learn",
    "sacrebleu",
    "rouge-score",
    "nltk",
]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def hardware(subject: Subject) -> dict[str, str | int]:
    """The hardware that the run uses."""
    device = subject.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count() or 0}


def model(subject: Subject) -> dict:
    """The model and its environment: hardware, dtype and the fingerprint of the weights."""
    return {"hardware": hardware(subject), "dtype": subject.dtype_name, "model": subject.fingerprint}


def commit() -> str:
    """The repository's commit, with ``+changes`` if the working tree differs, or ``unknown`` outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", "clme_lib", ":/clme_lib") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def library_sha256() -> str:
    """Hash of the library's files, which identifies the code even without a repository."""
    digest = hashlib.sha256()
    for file in sorted(_LIBRARY.rglob("*")):
        if file.suffix in (".py", ".yaml", ".json", ".jsonl"):
            digest.update(file.relative_to(_LIBRARY).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def code_sha256(editor: type[Editor]) -> str | None:
    """Hash of the package, or of the single file, that defines an editor; None for the library's own editors (whose code
    :func:`library_sha256` identifies) and for those defined in a notebook."""
    top = editor.__module__.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if top == _LIBRARY.name or top == "__main__" or file is None:
        return None
    source = Path(file)
    files = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
    digest = hashlib.sha256()
    for part in files:
        digest.update(part.relative_to(source.parent).as_posix().encode() + b"\0" + part.read_bytes())
    return digest.hexdigest()


def hyperparameters(editor: Editor) -> dict:
    """An editor's values and their hash, and the hash of its code if another package defines it."""
    values = editor.hparams.model_dump()
    described = {"values": values, "sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}
    code = code_sha256(type(editor))
    return described if code is None else {**described, "code": code}


def now() -> str:
    """Current UTC time, ISO 8601, to the millisecond (it distinguishes the starts of a run)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_LIBRARY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
