"""The study's cache folder, names of files in it, and files known by their hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The study's cache: ``$CLME_CACHE``, else ``$XDG_CACHE_HOME/clme``, else ``~/.cache/clme``."""
    if configured := os.environ.get("CLME_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clme"


def file_name(text: str) -> str:
    """``text`` with a dash for every character that is unusual in file names."""
    return "".join(character if character.isalnum() or character in ".-_" else "-" for character in text)


def name_for(prefix: str, identity: Mapping[str, Any]) -> str:
    """A file's name: a readable prefix, and a hash of everything that decides its content (JSON values)."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    # A subject's name may be a path that is too long for a file's name.
    return f"{file_name(prefix)[-100:]}-{digest[:16]}"


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
