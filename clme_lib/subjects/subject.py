"""A subject: a loaded model, its tokenizer and its settings, and how it is edited."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import GenerationConfig

from ..edits.applying import applying, attach
from ..edits.base import Edit, PassState
from ..support.errors import StudyError
from .products import is_faster_with_onednn, use_onednn
from .settings import SubjectSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..edits.codebooks import Codebook


# In a fingerprint, this is followed by a description of how the loaded model was edited.
_EDITED = "+edit-sha256:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_cached(model_id: str, revision: str = "main") -> bool:
    """Whether the model's configuration is in the Hugging Face cache; does not use the network."""
    try:
        return isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str)
    except ValueError:  # it cannot be an id
        return False


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model and what belongs to it."""

    name: str  # registry name, Hugging Face id or folder it was loaded by
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: SubjectSettings
    # what the weights are (a file hash or a hub commit) and what edited them; part of every cache key and record
    fingerprint: str
    edit: Edit | None = None  # the edit that edited() applied to the loaded model; None for the loaded model itself
    loaded: Subject | None = None  # the subject of the loaded model, if this one was made by edited()

    @property
    def original(self) -> Subject:
        """The subject without any edit. Whatever editors gather or learn before they edit comes from it, however many edits there are."""
        return self.loaded or self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def identity(self) -> dict[str, str]:
        """How a file that was made with this subject identifies it."""
        return {"subject": self.name, "fingerprint": self.fingerprint, "dtype": self.dtype_name}

    @property
    def positions(self) -> int:
        """Maximum number of tokens of prompt and text together: the model's positions, or its sliding window if that is shorter."""
        limits = (getattr(self.model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
        return min(filter(None, limits))

    @property
    def decoder(self) -> Any:  # architectures share no typed base
        """The stack of blocks without the head."""
        return self.model.model

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return self.model.config.hidden_size

    @property
    def inner_size(self) -> int:
        """d_f, the input width of ``down_proj``."""
        return self.down_proj(0).in_features

    def down_proj(self, layer: int) -> torch.nn.Linear:
        """The matrix every editor works on: W_l of shape (d, d_f), zero-based layer."""
        if not 0 <= layer < len(self.blocks):
            raise StudyError(f"layer {layer} is out of range: {self.name} has blocks 0 to {len(self.blocks) - 1}")
        return self.blocks[layer].mlp.down_proj

    def applying(
        self, edits: Sequence[Edit], rows: Sequence[int] | None = None
    ) -> contextlib.AbstractContextManager[PassState]:
        """Run the model *as edited* inside a ``with`` block; see :func:`clme_lib.edits.applying.applying`."""
        return applying(self.decoder, self.down_proj, edits, rows)

    def edited(self, edit: Edit) -> Subject:
        """The subject that results from applying ``edit`` to this one, which does not change; StudyError if the edit does not fit.

        Its model is a copy of the modules that shares all tensors and carries the edit's hooks permanently; hooks that are registered
        later, to apply further edits or to record, come after the edit's. In 16-bit precision this keeps what merging into the
        weights would round away. Editing twice is editing once with the composed edit.
        """
        whole = edit if self.edit is None else Edit.compose([self.edit, edit])
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        for module in model.modules():
            # Hooks of edits that are currently applied to the original, and of its earlier edit, must not be copied.
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        fingerprint = f"{self.fingerprint.partition(_EDITED)[0]}{_EDITED}{whole.sha256}"
        edited = replace(self, model=model, fingerprint=fingerprint, edit=whole, loaded=self.original)
        state, _ = attach(edited.decoder, edited.down_proj, [whole])
        state.lookups = collections.deque(maxlen=0)  # Nobody reads them, so none are kept.
        return edited

    @property
    def codebooks(self) -> list[Codebook]:
        """The codebooks of the edits that were made of the loaded model."""
        return [book for part in (self.edit.parts if self.edit else ()) for book in part.lookups or ()]


def prepare(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SubjectSettings, fingerprint: str
) -> Subject:
    """Put model and tokenizer into the study's fixed state: frozen weights, greedy decoding, left padding with EOS."""
    model.eval().requires_grad_(False)
    if is_faster_with_onednn():
        use_onednn(model)
    if settings.subject.eos_token:
        tokenizer.eos_token = settings.subject.eos_token
    if tokenizer.eos_token_id is None:
        raise StudyError(
            f"the tokenizer of {name!r} has no EOS token, which the study needs for padding: set eos_token in tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    # A checkpoint's own generation config may sample, penalise repetition or cap lengths; the protocol does none of it.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    return Subject(name, model, tokenizer, settings, fingerprint)


def torch_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names; StudyError for another name, or CUDA where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise StudyError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError(f"device={name!r} was requested, but torch {torch.__version__} sees no CUDA device")
    return torch.device(name)


def torch_dtype(name: str) -> torch.dtype:
    """The type of weights that ``auto`` (float32), ``float32``, ``bfloat16`` or ``float16`` names; StudyError for another name."""
    if name != "auto" and name not in _DTYPES:
        raise StudyError(f"dtype={name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES["float32" if name == "auto" else name]
