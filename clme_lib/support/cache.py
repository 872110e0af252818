"""The study's cache folder, names of files in it, and files known by their hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import StudyError


def cache_dir() -> Path:
    """The study's cache: ``$CLME_CACHE``, else ``$XDG_CACHE_HOME/clme``, else ``~/.cache/clme``."""
    if configured := os.environ.get("CLME_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "clme"


def file_name(text: str) -> str:
    """``text`` with a dash for every character that is unusual in a file's name."""
    return "".join(character if character.isalnum() or character in ".-_" else "-" for character in text)


def name_for(prefix: str, identity: Mapping[str, Any]) -> str:
    """A file's name: what a person recognises, and a hash of all that decides its content (JSON values)."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{file_name(prefix)}-{digest[:16]}"


def check_sha256(file: Path, expected: str) -> None:
    """Raise StudyError unless ``file`` has the expected SHA-256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise StudyError(
            f"{file.name} has SHA-256 {digest}, expected {expected}: not the published file; try again later"
        )
