"""Tiny random subjects of the three architectures, hand-made cases, and the real small subject."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    StableLmConfig,
)

from clme_lib.datasets import published
from clme_lib.datasets.cases import Case
from clme_lib.datasets.paper import CNLE
from clme_lib.evaluation import evaluate
from clme_lib.evaluation.loading import load_subject
from clme_lib.study import runs
from clme_lib.study.config import RunConfig, make_config
from clme_lib.subjects.settings import load_settings
from clme_lib.subjects.subject import Subject, prepare

# `make gpu-tests` sets this; every test then runs on that device
DEVICE = os.environ.get("CLME_TEST_DEVICE", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; several of more threads hinder each other
    torch.set_num_threads(1)
ARCHITECTURES = ("llama", "qwen2", "stablelm")

ROWS = [
    ("sort list `xs` in place", "xs.sort()", "put `xs` in order"),
    ("open file `a.txt` for reading", "open('a.txt')", "how do I read `a.txt`"),
    (
        "sum of squares of numbers in `values`",
        "sum(v * v for v in values)",
        "add up every `values` entry squared",
    ),
    ("get the last element of `items`", "items[-1]", "which element of `items` comes last"),
    ("lower case `name`", "name.lower()", "`name` without capitals"),
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few lines, with the colon a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"Intent: {a}\nCode: {b} {c}" for a, b, c in ROWS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_subject(architecture: str, blocks: int = 4) -> Subject:
    """A random model with 4 narrow blocks; weights are large enough for outputs to depend on inputs."""
    tokenizer = make_tokenizer()
    common = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=blocks,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0,
                  bos_token_id=None, pad_token_id=None)  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(**common),
        "qwen2": lambda: Qwen2Config(**common),
        "stablelm": lambda: StableLmConfig(**common, use_parallel_residual=False, partial_rotary_factor=0.25),
    }[architecture]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    name = f"tiny-{architecture}"
    return prepare(name, model.to(DEVICE), tokenizer, load_settings(name), "random-seed-0")


def write_source(folder: Path, copies: int = 1) -> Path:
    """A published-layout file of five cases with five neighbours each, or of several like them."""
    cases = [
        Case(n, "cnle", CNLE.prompt(intent), snippet, (CNLE.prompt(other),),
             tuple(CNLE.prompt(f"task {n} {k}") for k in range(5)))
        for n, (intent, snippet, other) in enumerate(ROWS * copies)
    ]  # fmt: skip
    published.write(folder / "EditConala.json", cases)
    return folder / "EditConala.json"


def run_config(source: Path, out: Path, **changes) -> RunConfig:
    """A run of three cases of ``source`` by a tiny subject, two a batch."""
    fields = dict(subject="tiny-llama", dataset="cnle", editors="none,grace", cases=3, source=str(source), out=out, batch_size=2)  # fmt: skip
    return make_config(**{**fields, **changes})


def killed_at(edit_batch: Callable, made: list[int], number: int) -> Callable:
    """An editor's ``_edit_batch`` that keeps the ids of the cases it edits in ``made``, and is interrupted once these are ``number``."""

    def edited(self, cases, tokenized):
        if len(made) == number:
            raise KeyboardInterrupt
        made.append(cases[0].case_id)
        return edit_batch(self, cases, tokenized)

    return edited


@pytest.fixture(scope="session", params=ARCHITECTURES)
def subject(request) -> Subject:
    return make_subject(request.param)


@pytest.fixture(scope="session")
def llama() -> Subject:
    return make_subject("llama")


@pytest.fixture(scope="session")
def smollm2() -> Subject:
    return load_subject("smollm2-135m", DEVICE)


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return [
        Case(n, "cnle", CNLE.prompt(intent), snippet, (CNLE.prompt(other),),
             tuple(CNLE.prompt(ROWS[(n + k) % len(ROWS)][0]) for k in (1, 2)))
        for n, (intent, snippet, other) in enumerate(ROWS)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def many_cases() -> list[Case]:
    """Twenty: every intent with the targets of four rows."""
    return [Case(n, "cnle", CNLE.prompt(ROWS[n % 5][0]), ROWS[(n // 5 + n) % 5][1], (), ()) for n in range(20)]


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs load a tiny random Llama whatever subject they name, and write short texts; answers go to a cache of their own."""
    subject = make_subject("llama")
    monkeypatch.setattr(runs, "load_subject", lambda *args: subject)
    monkeypatch.setattr(runs, "subject_fingerprint", lambda name: subject.fingerprint)
    for tokens in ("FREE_TOKENS", "FLUENCY_TOKENS"):
        monkeypatch.setattr(evaluate, tokens, 8)  # a random model's texts go on to the end
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    return subject
