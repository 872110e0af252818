"""The study's cache folder, and files known by their hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import StudyError


def cache_dir() -> Path:
    """The study's cache: ``$CLME_CACHE``, else ``$XDG_CACHE_HOME/clme``, else ``~/.cache/clme``."""
    if configured := os.environ.get("CLME_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "clme"


def check_sha256(file: Path, expected: str) -> None:
    """Raise StudyError unless ``file`` has the expected SHA-256."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise StudyError(
            f"{file.name} has SHA-256 {found}, expected {expected}: not the published file; try again later"
        )
