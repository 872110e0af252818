"""Reading a subject: its files are checked before and after loading, so that no part of the model is missing or made up."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import snapshot_download
from pydantic import ConfigDict, Field, model_validator
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..support.cache import file_sha256
from ..support.errors import StudyError
from ..support.memory import free_memory_bytes, is_out_of_memory
from ..support.reading import read_json
from ..support.schema import Schema, parse
from . import embedded
from .settings import SubjectSettings, list_subjects, load_settings
from .subject import Subject, is_cached, prepare, torch_device, torch_dtype

# files that decide how a model computes and reads text, all directly in its folder
_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_INDEX = "model.safetensors.index.json"
_GIT_LFS = b"version https://git-lfs"
_SAMPLE = "def twoCafés(x):\n    return x * 2  # Twice"
_NAMED = 4  # maximum number of tensors that a message names
_Size = Annotated[int, Field(ge=1, le=10_000_000)] | None
_Factor = Annotated[float, Field(gt=0, le=1e12)] | None


class _Described(Schema):
    """A part of config.json; fields that only transformers reads are not checked here."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Rope(_Described):
    rope_theta: _Factor = None
    factor: _Factor = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None


class _Configuration(_Described):
    """The numbers that, if wrong, describe another model or need more memory than there is."""

    model_type: str
    hidden_size: _Size = None
    intermediate_size: _Size = None
    num_hidden_layers: _Size = None
    num_attention_heads: _Size = None
    num_key_value_heads: _Size = None
    head_dim: _Size = None
    vocab_size: _Size = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    sliding_window: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None  # Some write 0 for none.
    rms_norm_eps: Annotated[float, Field(ge=0, le=0.1)] | None = None
    layer_norm_eps: Annotated[float, Field(ge=0, le=0.1)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rope_theta: _Factor = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> _Configuration:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads and shared and heads % shared:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}")
        if heads and self.hidden_size and not self.head_dim and self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}")
        return self

    def shapes(self) -> dict[str, list[int | None]]:
        """The shapes of some tensors in the layouts that the editors know; None where the configuration does not decide a size."""
        d, heads = self.hidden_size, self.num_attention_heads
        size = self.head_dim or (d // heads if d and heads else None)
        shared = self.num_key_value_heads or heads
        shapes: dict[str, list[int | None]] = {"model.embed_tokens.weight": [self.vocab_size, d]}
        for n in range(self.num_hidden_layers or 0):
            block = f"model.layers.{n}"
            shapes[f"{block}.mlp.down_proj.weight"] = [d, self.intermediate_size]
            shapes[f"{block}.self_attn.q_proj.weight"] = [heads * size if heads and size else None, d]
            shapes[f"{block}.self_attn.k_proj.weight"] = [shared * size if shared and size else None, d]
        return shapes


def read_subject(name: str, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a model from its files; arguments as for :func:`clme_lib.evaluation.loading.load_subject`.

    Raises:
        StudyError: unknown name, failed download, a file that is absent, damaged or does not fit the others, no such device or dtype,
            unsupported architecture, or too little memory.
    """
    target, precision = torch_device(device), torch_dtype(dtype)
    settings = load_settings(name)
    folder, fingerprint = _located(name, settings)
    configuration = _check_files(name, folder)
    with _loading(name, folder, "config.json"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with _loading(name, folder, "token*", "special_tokens_map.json", "vocab*", "merges.txt"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        with _loading(name, folder, "config.json", "generation_config.json", "*.safetensors*"):
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=precision,
                use_safetensors=True,
                attn_implementation="sdpa",
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, loaded = read[0].to(target), read[1]
    except (MemoryError, RuntimeError) as error:
        raise StudyError(
            f"subject {name!r} in {str(precision).removeprefix('torch.')} does not fit into the memory of {target} "
            f"({free_memory_bytes(target) / 2**30:.1f} GiB are free): use a 16-bit dtype, a smaller subject or a larger device"
        ) from error
    _check_weights(folder, model, loaded)
    _require_layout(name, model, configuration)
    with _loading(name, folder, "token*"):
        subject = prepare(name, model, tokenizer, settings, fingerprint)
        _check_tokenizer(folder, subject)
    return subject


def subject_fingerprint(name: str) -> str | None:
    """The ``fingerprint`` of a subject from its files alone; None for a hub's model that is not here yet.

    Raises:
        StudyError: unknown name.
    """
    settings = load_settings(name)
    location = settings.subject.id or name
    of_hub = settings.subject.source != "embedded" and "/" in location and not location.startswith((".", "/"))
    if of_hub and not os.path.isdir(location) and not is_cached(location, settings.subject.revision):
        return None
    return _located(name, settings)[1]


def _located(name: str, settings: SubjectSettings) -> tuple[Path, str]:
    """The folder of a subject's files (downloaded if necessary), and what identifies them."""
    if settings.subject.source == "embedded":
        adapter = settings.subject.adapter
        return embedded.ensure(adapter), embedded.fingerprint(adapter)
    location = settings.subject.id or name
    with contextlib.suppress(OSError, ValueError):  # what the system takes for no path at all
        if Path(location).is_dir():
            own_eos = f"+eos:{settings.subject.eos_token}" if settings.subject.eos_token else ""
            return Path(location), f"folder-sha256:{folder_sha256(Path(location))}{own_eos}"
    if name == location and ("/" not in name or name.startswith((".", "/"))):
        raise StudyError(
            f"unknown subject {name!r}: not a registered name ({', '.join(list_subjects())}), a folder, "
            "or a Hugging Face id of the form owner/model"
        )
    try:
        # no file in a folder of its own, and not the second copy of the weights that some repositories have
        folder = snapshot_download(
            location,
            revision=settings.subject.revision,
            allow_patterns=list(_FILES),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the hub's and the network's errors have no common type
        raise StudyError(
            f"subject {name!r} could not be loaded from {location!r}: {_reason(error)}. Check the name and the network (or log "
            "in for gated models)."
        ) from error
    return Path(folder), f"hub-commit:{Path(folder).name}"


def folder_sha256(folder: Path) -> str:
    """SHA-256 of a model's files: weights, configuration and tokenizer, with their names."""
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()})
    described = [[file.name, _sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise StudyError(f"{file}: cannot be read: {error}") from error


def _check_files(name: str, folder: Path) -> _Configuration:
    """Check what can be seen without loading: valid JSON, valid weights, and sizes that match the weights."""
    for file in sorted(file for pattern in _FILES for file in folder.glob(pattern)):
        with contextlib.suppress(OSError), file.open("rb") as stream:  # Unreadable files are reported below.
            if stream.read(len(_GIT_LFS)) == _GIT_LFS:
                raise StudyError(f"{file}: a Git LFS pointer, not the file itself: run `git lfs pull` in {folder}")
    for part in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", _INDEX):
        if (file := folder / part).is_file() and not isinstance(read_json(file), dict):
            raise StudyError(f"{file}: not a JSON object")
    configuration = parse(_Configuration, read_json(folder / "config.json"), str(folder / "config.json"))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise StudyError(
            f"subject {name!r} could not be loaded: {folder} has no *.safetensors file; weights must be safetensors, because other formats can run code"
        )
    if (index := folder / _INDEX).is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or {str(part) for part in listed.values()} - {file.name for file in weights}:
            raise StudyError(
                f"{index}: its weight_map must name the files of the weights, which are {_names(weights)}; fetch it again"
            )
    shapes: dict[str, list[int]] = {}
    for file in weights:
        try:
            with safe_open(file, framework="pt") as content:
                shapes |= {tensor: content.get_slice(tensor).get_shape() for tensor in content.keys()}  # noqa: SIM118 - it is no mapping
        except Exception as error:  # the format's errors have no common type
            raise StudyError(f"{file}: cannot be read as a safetensors file: {error}; fetch it again") from error
    blocks = {int(match[1]) for tensor in shapes if (match := re.match(r"model\.layers\.(\d+)\.", tensor))}
    if blocks and (asked := configuration.num_hidden_layers) and asked != len(blocks):
        raise StudyError(
            f"{folder / 'config.json'}: num_hidden_layers is {asked}, but the weights ({_names(weights)}) have {len(blocks)} blocks"
        )
    for tensor, expected in configuration.shapes().items():
        actual = shapes.get(tensor, expected)
        if len(actual) != len(expected) or any(e not in (a, None) for e, a in zip(expected, actual)):
            raise StudyError(
                f"{folder / 'config.json'}: asks for {tensor} of shape {expected}, but in the weights ({_names(weights)}) it has {actual}"
            )
    return configuration


def _check_weights(folder: Path, model: Any, loaded: dict[str, Any]) -> None:
    """Refuse weights that transformers filled in, left out or could not fit, and values that are not finite."""
    names = _names(sorted(folder.glob("*.safetensors")))
    kinds = {"missing_keys": "lack", "unexpected_keys": "have, but the model does not know,"}
    problems = {what: sorted(map(str, loaded[kind])) for kind, what in kinds.items()}
    problems["do not fit in"] = [str(error) for error in (*loaded["mismatched_keys"], *loaded["error_msgs"])]
    for what, tensors in problems.items():
        if tensors:
            more = f" and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
            raise StudyError(
                f"{folder}: the weights ({names}) {what} {', '.join(tensors[:_NAMED])}{more}: not a complete model for this "
                "config.json; fetch both again"
            )
    for name, parameter in model.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise StudyError(
                f"{folder}: {name} ({names}) has values that are not finite in {str(parameter.dtype).removeprefix('torch.')}: fetch "
                "the file again, or use float32"
            )


def _require_layout(name: str, model: Any, configuration: _Configuration) -> None:
    modules = dict(model.named_modules())
    blocks = range(configuration.num_hidden_layers or 1)
    needed = {"model.norm", "lm_head", *(f"model.layers.{n}.post_attention_layernorm" for n in blocks)}
    needed |= {f"model.layers.{n}.self_attn.o_proj" for n in blocks}
    matrices = [modules.get(f"model.layers.{n}.mlp.down_proj") for n in blocks]
    if not needed <= set(modules) or not all(isinstance(matrix, torch.nn.Linear) for matrix in matrices):
        raise StudyError(
            f"subject {name!r} is a {type(model).__name__}; the editors need blocks laid out like Llama, Qwen2 or "
            "StableLM (model.layers[i].mlp.down_proj on a sequential residual stream, model.norm, lm_head), each of them"
        )


def _check_tokenizer(folder: Path, subject: Subject) -> None:
    tokenizer, rows = subject.tokenizer, subject.decoder.embed_tokens.num_embeddings
    files = sorted(folder.glob("token*"))
    names, largest = _names(files), max(tokenizer.get_vocab().values())
    if largest >= rows and _is_of_these_files(tokenizer, rows, files):
        raise StudyError(
            f"{folder}: the tokenizer ({names}) has token {largest}, but the model's embeddings (vocab_size in config.json) end at "
            f"{rows - 1}: use this model's tokenizer"
        )
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if "".join(str(tokenizer.decode(ids)).split()) != "".join(_SAMPLE.split()):
        raise StudyError(
            f"{folder}: the tokenizer ({names}) turns {_SAMPLE!r} into {tokenizer.decode(ids)!r}: code needs a tokenizer that keeps all characters"
        )


def _is_of_these_files(tokenizer: Any, rows: int, files: list[Path]) -> bool:
    """Whether a token beyond the embeddings comes from the files; some transformers classes add a token that no text has."""
    beyond = {token: n for token, n in tokenizer.get_vocab().items() if n >= rows}
    written = "".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".json")
    return tokenizer.eos_token in beyond or any(
        n < tokenizer.vocab_size or json.dumps(token) in written for token, n in beyond.items()
    )


@contextlib.contextmanager
def _loading(name: str, folder: Path, *patterns: str) -> Iterator[None]:
    """Turn other libraries' errors into a StudyError that names the files; the caller handles running out of memory."""
    try:
        yield
    except StudyError:
        raise
    except Exception as error:  # they have no common type
        if is_out_of_memory(error):
            raise
        files = _names(sorted({file for pattern in patterns for file in folder.glob(pattern)})) or patterns[0]
        raise StudyError(
            f"subject {name!r} could not be loaded: {folder}: {files}: {_reason(error)}. Is the folder a complete model of a kind "
            "that this version of transformers knows? (Code of a model is never run.)"
        ) from error


def _names(files: list[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names if len(names) <= _NAMED + 2 else [*names[:_NAMED], f"{len(names) - _NAMED} more"])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(". ")
