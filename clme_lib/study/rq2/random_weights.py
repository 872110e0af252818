"""Subjects with random weights: the exact architecture of one of the paper's subjects, with seeded random weights.

Time and memory of an edit depend on sizes, not on the weights' values. Where the trained weights are not available, the
same arithmetic runs on random ones. The tokenizer is a byte-level BPE trained on the embedded cases, with at most the
subject's own vocabulary size, so token counts are close to the real ones; they are reported with the measurements.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import load_cases
from ...subjects.settings import Shape, list_subjects, load_settings
from ...subjects.subject import Subject, prepare, torch_device, torch_dtype
from ...support.errors import StudyError
from ...support.memory import free_memory_bytes
from ...support.seeds import DEFAULT_SEED

_EOS = "<|endoftext|>"
_ROOM = 1.15  # free memory over weights: activations and one edit's tensors must fit as well


def random_subject(name: str, device: str = "auto", dtype: str = "auto", seed: int = DEFAULT_SEED) -> Subject:
    """A subject with the architecture and sizes of a registered one, and random weights.

    Args:
        name: a registered subject whose YAML has a ``shape``.
        device, dtype: as in :func:`clme_lib.evaluation.loading.load_subject`.

    Raises:
        StudyError: the subject has no shape, or the device does not have enough free memory for it.
    """
    settings = load_settings(name)
    shape = settings.subject.shape
    if name not in list_subjects() or shape is None:
        shaped = [registered for registered in list_subjects() if load_settings(registered).subject.shape]
        raise StudyError(f"{name!r} has no shape to fill with random weights; use one of {', '.join(shaped)}")
    place, precision = torch_device(device), torch_dtype(dtype)
    needed = _ROOM * parameters(shape) * precision.itemsize
    if needed > (free := free_memory_bytes(place)):
        raise StudyError(
            f"{name} in {str(precision).removeprefix('torch.')} needs about {needed / 2**30:.1f} GiB, but {place} has "
            f"{free / 2**30:.1f} GiB free: use a 16-bit dtype, a smaller subject or a larger device"
        )
    config = AutoConfig.for_model(
        shape.architecture, **shape.model_dump(exclude={"architecture"}), tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation="sdpa")
    return prepare(name, model, trained_tokenizer(shape.vocab_size), settings, f"random-weights:{seed}")


def parameters(shape: Shape) -> int:
    """How many weights a model of this shape has, norms and biases left out (they are under a thousandth)."""
    attention = 2 * shape.hidden_size**2 * (1 + shape.num_key_value_heads / shape.num_attention_heads)
    block = attention + 3 * shape.hidden_size * shape.intermediate_size
    return int(shape.num_hidden_layers * block + 2 * shape.vocab_size * shape.hidden_size)


def trained_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` tokens, trained on the embedded cases' prompts and targets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_EOS], initial_alphabet=alphabet, show_progress=False
    )
    cases = [case for dataset in PAPER_DATASET_NAMES for case in load_cases(dataset)]
    texts = (text for case in cases for text in (f"{case.prompt} {case.target}", *case.unrelated))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS)
