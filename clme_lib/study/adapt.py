"""Training the embedded subject further on code (``clme adapt``): a low-rank adapter by peft, merged on first use.

The adapter is what :mod:`clme_lib.subjects.adapters` reads. Training resumes where it was killed; batches and their order are fixed by
the seed, so that nothing but their number of finished steps, the weights and the optimizer's state has to be kept.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ..datasets.code_text import HELD_OUT, Text, texts_sha256
from ..datasets.embedded_csne import installed_versions
from ..forward.tokens import encode
from ..subjects import adapters
from ..subjects.subject import Subject
from ..support.artifact import Artifact
from ..support.batching import of_like_length
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.reading import read_json
from ..support.schema import Schema
from ..support.seeds import DEFAULT_SEED, seed_of, seeded_order

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # as peft names what an adapter is for
_CHECKPOINT = "unfinished.safetensors"
_STEPS_APART = 20  # checkpoints; about a minute on two cores


class AdapterHyperparameters(Schema):
    """How an adapter is trained: AdamW, linear warm-up, cosine decay to zero."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, gt=0)
    lr: float = Field(default=5e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    batch_tokens: int = Field(default=1_024, ge=1)  # padding included
    seed: int = DEFAULT_SEED


def adapt(
    subject: Subject,
    base: Path,
    training: Sequence[Text],
    held_out: Sequence[Text],
    out: Path,
    hparams: AdapterHyperparameters | None = None,
) -> adapters.Provenance:
    """Train an adapter for ``subject``, whose files are in the folder ``base``, and write it to ``out``.

    The subject's model is changed and of no use afterwards. A training that was interrupted goes on with its last finished checkpoint.

    Raises:
        StudyError: what is in ``out`` is of another training, or a text is longer than a batch.
    """
    hparams = hparams or AdapterHyperparameters()
    before = losses_by_kind(subject, held_out)
    identity = {
        **subject.identity,
        "hparams": hparams.model_dump(),
        "texts": texts_sha256([*training]),
    }
    checkpoint = Artifact(out / _CHECKPOINT, identity)
    rows = [_row(subject, text) for text in training]
    groups = of_like_length([len(ids) for ids, _ in rows], tokens=hparams.batch_tokens)
    groups = [groups[n] for n in seeded_order(range(len(groups)), "adapt", hparams.seed)]
    model, config = _with_adapter(subject, hparams)
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=hparams.lr, weight_decay=0.0)
    finished, seconds = _resume(checkpoint, parameters, optimizer) if checkpoint.exists() else (0, 0.0)
    started = time.monotonic() - seconds
    with tqdm(total=len(groups), initial=finished, desc="adapting", unit="batch") as bar:
        for step in range(finished, len(groups)):
            for group in optimizer.param_groups:
                group["lr"] = hparams.lr * _schedule(step, len(groups), hparams.warmup)
            with torch.enable_grad():
                losses = _token_losses(model, [rows[n] for n in groups[step]], subject)
                loss = torch.cat(losses).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
            if (step + 1) % _STEPS_APART == 0:
                _keep(checkpoint, parameters, optimizer, step + 1, time.monotonic() - started)
    _write(model, config, out)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        merged = Path(scratch) / "merged"
        digest = adapters.write_merged(base, out, merged)
        after = losses_by_kind(_reloaded(subject, merged), held_out)
    provenance = adapters.Provenance(
        merged_sha256=digest,
        texts_sha256=str(identity["texts"]),
        texts=len(training),
        tokens=sum(len(ids) for ids, _ in rows),
        steps=len(groups),
        seconds=round(time.monotonic() - started),
        threads=torch.get_num_threads(),
        settings=hparams.model_dump(),
        held_out=list(HELD_OUT),
        held_out_texts=dict(Counter(text.kind for text in held_out)),
        losses_before=before,
        losses_after=after,
        packages=installed_versions(),
    )
    write_text(out / adapters.PROVENANCE, provenance.model_dump_json(indent=1) + "\n")
    checkpoint.file.unlink(missing_ok=True)
    return provenance


@torch.no_grad()
def losses_by_kind(subject: Subject, texts: Sequence[Text]) -> dict[str, float]:
    """Mean loss in nats per token of the targets and the end of text after them, by the kind of text."""
    losses: dict[str, list[torch.Tensor]] = {}
    rows = [_row(subject, text) for text in texts]
    for group in of_like_length([len(ids) for ids, _ in rows], tokens=2_048):
        for n, loss in zip(group, _token_losses(subject.model, [rows[n] for n in group], subject)):
            losses.setdefault(texts[n].kind, []).append(loss[max(rows[n][1] - 1, 0) :])
    return {kind: torch.cat(parts).mean().item() for kind, parts in sorted(losses.items())}


def _row(subject: Subject, text: Text) -> tuple[list[int], int]:
    """Token ids with an end of text, and how many of the first are the prompt's."""
    prompt = encode(subject.tokenizer, text.prompt)
    ids = encode(subject.tokenizer, f"{text.prompt} {text.target}" if text.prompt else text.target)
    return [*ids, subject.tokenizer.eos_token_id], len(prompt)


def _token_losses(model: Any, rows: Sequence[tuple[list[int], int]], subject: Subject) -> list[torch.Tensor]:
    """Loss of every token but the first of each row, in nats."""
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=subject.tokenizer.eos_token_id
    ).to(subject.device)
    # Padding on the right is never attended to by what stands before it.
    logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
    return [row[: len(ids) - 1] for row, (ids, _) in zip(losses.view(len(rows), -1), rows)]


def _with_adapter(subject: Subject, hparams: AdapterHyperparameters) -> tuple[Any, Any]:
    """The model with untrained factors at all its matrices, and peft's configuration of them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=hparams.rank,
        lora_alpha=hparams.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    with torch.random.fork_rng():  # peft draws from the global generator
        torch.manual_seed(seed_of("adapter", hparams.seed) % 2**63)
        model = get_peft_model(subject.model, config)
    return model, config


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a share of its highest."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _keep(checkpoint: Artifact, parameters: dict[str, Any], optimizer: Any, steps: int, seconds: float) -> None:
    tensors = {f"weight {name}": weight for name, weight in parameters.items()}
    for name, weight in parameters.items():
        tensors |= {f"{kind} {name}": optimizer.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq")}
    checkpoint.write(tensors, steps=steps, seconds=seconds)


def _resume(checkpoint: Artifact, parameters: dict[str, Any], optimizer: Any) -> tuple[int, float]:
    """Load weights and the optimizer's state; returns the number of finished steps and the seconds they took."""
    header, tensors = checkpoint.read()
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(tensors[f"weight {name}"])
            state = {kind: tensors[f"{kind} {name}"].to(weight.device) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(header["steps"])), **state}
    return header["steps"], header["seconds"]


def _write(model: Any, config: Any, out: Path) -> None:
    """The adapter as peft writes it, in half precision, with the model's name in place of a path on this machine."""
    from peft import get_peft_model_state_dict

    tensors = {name: tensor.half().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise StudyError("training diverged: some of the adapter's weights are not finite; lower the learning rate")
    out.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path, config.inference_mode = BASE, True
    config.save_pretrained(out)
    described = read_json(file := out / adapters.CONFIG)
    described["target_modules"].sort()  # peft holds them as a set
    write_text(file, json.dumps(described, indent=1) + "\n")
    save_file(tensors, out / adapters.WEIGHTS, metadata={"format": "pt"})


def _reloaded(subject: Subject, folder: Path) -> Subject:
    """The subject with the merged weights of a folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=subject.dtype)
    return replace(subject, model=model.to(subject.device).eval().requires_grad_(False))
