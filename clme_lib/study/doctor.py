"""The checks behind ``clme doctor``: what is installed, whether it fits together, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..datasets import embedded_csne
from ..datasets.paper import CSNE, PAPER_DATASETS
from ..datasets.registry import load_cases
from ..subjects import embedded
from ..subjects.settings import list_subjects, load_settings
from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.memory import free_memory_bytes

_PYTHONS = ((3, 11), (3, 13))
_NEEDED_GIB = 2  # to edit the embedded subject
_BROWSERS = ("chromium", "google-chrome", "chrome")


class Check(NamedTuple):
    """What was checked, whether it passed, and what was seen or what to do."""

    what: str
    passed: bool
    says: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'WRONG'} {self.what}: {self.says}"


def diagnose() -> Iterator[Check]:
    """Every check in turn; the slowest (reading the whole embedded model) takes seconds. Nothing is downloaded."""
    yield _python()
    yield from _torch()
    yield _cache()
    yield from _embedded_subjects()
    yield from _datasets()
    yield _packages()
    yield _browser()


def _python() -> Check:
    low, high = _PYTHONS
    supported = low <= sys.version_info[:2] <= high
    wish = (
        ""
        if supported
        else f"; the study needs {low[0]}.{low[1]} to {high[0]}.{high[1]}: set PYTHON= and run `make setup`"
    )
    return Check("Python", supported, platform.python_version() + wish)


def _torch() -> Iterator[Check]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield Check("torch", True, f"{torch.__version__} on {name}")
    free = free_memory_bytes(device) / 2**30
    short = "" if free >= _NEEDED_GIB else f"; the embedded subject needs about {_NEEDED_GIB} GiB: close other programs"
    yield Check("memory", free >= _NEEDED_GIB, f"{free:.1f} GiB free{short}")


def _cache() -> Check:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("cache", False, f"{folder} cannot be written to ({error}): set CLME_CACHE to another folder")
    return Check("cache", True, f"{folder}, {size / 1e9:.2f} GB, {free / 1e9:.0f} GB free")


def _embedded_subjects() -> Iterator[Check]:
    for name in list_subjects():
        if (source := load_settings(name).subject).source != "embedded":
            continue
        made = "fetched" if source.adapter is None else "merged"
        if not embedded.location(source.adapter).is_dir():
            yield Check(name, True, f"not there yet: will be {made} on first use, or by `clme prepare` now")
            continue
        try:
            embedded.verify(source.adapter, whole=True)
        except (OSError, StudyError) as error:
            yield Check(name, False, str(error))
        else:
            yield Check(name, True, f"{embedded.location(source.adapter)}, all files unchanged")


def _datasets() -> Iterator[Check]:
    for dataset in PAPER_DATASETS:
        if dataset is CSNE and not embedded_csne.is_mined():
            yield Check(dataset.title, True, "not mined yet: will be mined on first use, or by `clme prepare` now")
            continue
        try:
            yield Check(dataset.title, True, f"{len(load_cases(dataset))} embedded cases, as committed")
        except (OSError, StudyError) as error:
            yield Check(dataset.title, False, str(error))


def _packages() -> Check:
    what = "packages"
    constraints = Path(__file__).parents[2] / "constraints.txt"
    if not constraints.is_file():
        return Check(what, True, "no constraints.txt next to the library: versions are not compared")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", constraints.read_text(encoding="utf-8"), re.M))
    different = []
    for name, pinned in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # belongs to an extra that is not installed, or to another system
        if installed.partition("+")[0] != pinned.partition("+")[0]:
            different.append(f"{name} {installed} (pinned: {pinned})")
    remedy = "; install with `pip install -c constraints.txt -e .`" if different else "as constraints.txt pins them"
    return Check(what, not different, ", ".join(different) + remedy)


def _browser() -> Check:
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None and os.environ.get("CI"):
        return Check("browser", False, "none; install chromium, which the browser tests need")
    return Check("browser", True, browser or "none; only the browser tests need one (chromium)")
