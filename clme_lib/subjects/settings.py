"""Hyperparameters: one YAML per subject, read with a typed schema.

The paper's values are the defaults of the editors' classes; a YAML has what differs from them. A subject without a YAML (any
hub id or folder) gets the paper's; a layer that the smaller model does not have moves to its last block (:func:`transfer_layers`).
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..support.reading import read_yaml
from ..support.schema import Schema, parse

Preset = Literal["clean", "compat"]
_FOLDER = resources.files("clme_lib") / "editors" / "hyperparameters"


class Shape(Schema):
    """A model's architecture and sizes, by the names of its transformers configuration."""

    architecture: Literal["llama", "qwen2", "stablelm"]
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)


class SubjectSource(Schema):
    """Where a subject's weights come from, and its shape for measurements that need no trained weights."""

    source: Literal["embedded", "hub"]
    adapter: str | None = None  # of an embedded subject that was trained further
    id: str | None = None
    revision: str = "main"
    blocks: int | None = Field(default=None, gt=0)
    shape: Shape | None = None
    eos_token: str | None = None  # for checkpoints whose EOS token differs between versions of transformers


class SubjectSettings(Schema):
    """The content of one subject's YAML: its source, and by editor the hyperparameters that are not the paper's (checked when
    the editor is loaded)."""

    subject: SubjectSource
    editors: dict[str, dict[str, Any]] = {}


@cache
def list_subjects() -> list[str]:
    """Names of the registered subjects: of the YAML files in ``clme_lib/editors/hyperparameters``."""
    return sorted(Path(entry.name).stem for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def load_settings(name: str) -> SubjectSettings:
    """Settings of a registered subject, or of a YAML given by its path; any other subject has the paper's hyperparameters.

    StudyError names the file and the field of a YAML that cannot be read or is malformed.
    """
    if not name.endswith(".yaml") and name not in list_subjects():
        return SubjectSettings(subject=SubjectSource(source="hub", id=name))
    file = Path(name if name.endswith(".yaml") else str(_FOLDER / f"{name}.yaml"))
    return parse(SubjectSettings, read_yaml(file), str(file))


def transfer_layers(hparams: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The paper's values for a model with ``blocks`` blocks.

    A layer keeps its index; a layer that the model does not have becomes the last block, and a window of layers is
    shifted as a whole so that it ends there. ValueError if the window is longer than the model.
    """
    moved = dict(hparams)
    if "layer" in moved:
        moved["layer"] = min(moved["layer"], blocks - 1)
    if "layers" in moved:
        shift = min(0, blocks - 1 - max(moved["layers"]))
        if min(moved["layers"]) + shift < 0:
            raise ValueError(f"its layers, {list(moved['layers'])}, outnumber the model's {blocks} blocks: set layers=")
        moved["layers"] = [layer + shift for layer in moved["layers"]]
    return moved
