"""Embedded CSNE: functions and the first sentence of their docstring, mined from the packages the study installs.

Nothing mined is committed. The set is built once on the user's machine from pinned, pure-Python sources (no standard
library and no torch: their text depends on the build), so every supported Python gives the same set; its
SHA-256 is committed in ``embedded/csne.json`` and checked. Rules follow CodeSearchNet's construction: docstring and comments cut
out of the code, first sentence as the description, at most 256 tokens, near-duplicates removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from .base import EMBEDDED, DataSet
from .cases import Case
from .mining import build, installed_versions

COMMITTED = EMBEDDED / "csne.json"


def load(dataset: DataSet) -> list[Case]:
    """The embedded CSNE cases; see :func:`load_content`."""
    content = load_content()
    codes = [row["code"] for row in content["pool"]]
    return [
        Case.of(
            dataset, row["case_id"], row["code"], row["doc"], [row["variant"]], [codes[n] for n in row["neighbours"]]
        )
        for row in content["targets"]
    ]


def is_mined() -> bool:
    """Whether the set is in the cache, so that loading it mines nothing."""
    return cached().is_file()


def cached() -> Path:
    """Where the committed set is kept once it has been mined."""
    return cache_dir() / "datasets" / f"csne-{_committed()['sha256'][:16]}.json"


def load_content() -> dict:
    """Targets and pool as plain data (see :func:`build`): mined on first use (under a minute), then read from the cache.

    Raises:
        StudyError: a package is missing or differs from its pin, so the set would not be the committed one.
    """
    committed, file, installed = _committed(), cached(), installed_versions()
    with contextlib.suppress(OSError, ValueError):  # absent, damaged or edited: mined anew below
        content = json.loads(file.read_text(encoding="utf-8"))
        if content_sha256(content) == committed["sha256"]:
            return content
    different = [
        f"{name} {installed.get(name, 'not installed')} (pinned: {version})"
        for name, version in sorted(committed["packages"].items())
        if installed.get(name) != version
    ]
    if different:
        raise StudyError(
            f"embedded CSNE is mined from pinned packages, and these differ: {', '.join(different)}. "
            "Install with `pip install -c constraints.txt -e .`, or use source='published' or a file."
        )
    content = build()
    if (digest := content_sha256(content)) != committed["sha256"]:
        raise StudyError(
            f"the mined CSNE set has SHA-256 {digest}, committed is {committed['sha256']}: "
            "an installed package was modified; reinstall with `pip install --force-reinstall -c constraints.txt -e .`"
        )
    write_text(file, json.dumps(content))
    return content


def content_sha256(content: dict) -> str:
    """Hash of the set, independent of JSON's layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def commit_hash() -> str:
    """Mine anew and record the set's hash and the packages it came from in ``embedded/csne.json`` (after a pin changed)."""
    digest = content_sha256(build())
    write_text(COMMITTED, json.dumps({"sha256": digest, "packages": installed_versions()}, indent=1) + "\n")
    return digest


def _committed() -> dict:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(commit_hash())
