"""Subjects that were trained further, as low-rank adapters in peft's format (LoRA: W + (alpha / r) B A), and merging them.

Each is a folder beside this module, named like its subject: ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads
and writes them, and ``provenance.json``, which says how it was made and what the merged weights' SHA-256 is.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from ..support.cache import file_sha256
from ..support.errors import StudyError
from ..support.reading import read_json
from ..support.schema import Schema, parse

FOLDER = Path(str(resources.files("clme_lib"))) / "subjects" / "adapters"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "provenance.json"
_MODEL = "model.safetensors"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class _Config(Schema):
    """The parts of peft's configuration that decide the merged weights."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)


class Provenance(Schema):
    """How an adapter was made."""

    merged_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the merged model's file of weights
    texts_sha256: str
    texts: int  # learnt from
    tokens: int
    steps: int
    seconds: float
    threads: int
    settings: dict[str, float | int]
    held_out: list[str]  # distributions
    held_out_texts: dict[str, int]  # by their kind
    # mean loss in nats per token on the held-out texts, by their kind, of the model as it was and of the merged model
    losses_before: dict[str, float]
    losses_after: dict[str, float]
    packages: dict[str, str]


def sha256(name: str) -> str:
    """Hash of an adapter's tensors file."""
    return file_sha256(FOLDER / name / WEIGHTS)


def provenance(name: str) -> Provenance:
    """How an adapter was made; StudyError if the file is malformed."""
    file = FOLDER / name / PROVENANCE
    return parse(Provenance, read_json(file), str(file))


def merge(base: Path, name: str, folder: Path) -> None:
    """Write the model in the folder ``base`` with an adapter's updates in its weights to the new ``folder``.

    Raises:
        StudyError: the adapter does not fit the model, or the merged weights are not those that its provenance names.
    """
    write_merged(base, FOLDER / name, folder)
    if (digest := file_sha256(folder / _MODEL)) != (expected := provenance(name).merged_sha256):
        raise StudyError(
            f"{FOLDER / name}: merging it gives weights with SHA-256 {digest}, but its {PROVENANCE} says {expected}: the adapter or its "
            "base model was changed; reinstall clme-lib, or train the adapter again with `clme adapt`"
        )


def write_merged(base: Path, adapter: Path, folder: Path) -> str:
    """Merge like :func:`merge`, without checking the result; returns the SHA-256 of the merged weights.

    Half-precision factors below 1 in size have products that are multiples of 2^-48, so sums of a few dozen of them are exact in
    float64 in any order, and every machine writes the same bytes.
    """
    from safetensors.torch import load_file, save_file

    config = parse(_Config, read_json(adapter / CONFIG), str(adapter / CONFIG))
    weights, factors = load_file(base / _MODEL), load_file(adapter / WEIGHTS)
    for down in (key for key in factors if key.endswith(_DOWN)):
        matrix = f"{down.removeprefix(_PREFIX).removesuffix(_DOWN)}.weight"
        up = down.removesuffix(_DOWN) + _UP
        if matrix not in weights or up not in factors:
            raise StudyError(f"{adapter / WEIGHTS}: {down} has no matching {up}, or {base} has no {matrix}")
        update = factors[up].double() @ factors[down].double()
        weights[matrix] = (weights[matrix].double() + config.lora_alpha / config.r * update).float()
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(_MODEL, "manifest.json"))
    save_file(weights, folder / _MODEL, metadata={"format": "pt"})
    return file_sha256(folder / _MODEL)
