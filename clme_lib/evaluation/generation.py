"""Batched generation from many differently edited models (paper section III-D; protocol of the released program).

Decoded text is the generated tokens only, special tokens and a final EOS kept. A row ends at the subject's EOS, so that of a target
that contains its string (code about tokenizers may) no more than the part up to it is ever written; it is compared as any other,
and ``clme data check`` names such targets. The result is that of ``model.generate`` row by
row (a test holds it to that), whatever batch a row is in. It is faster because every (prompt, edit) is read once however many
texts continue it, in batches of like length, and decoding writes keys and values into buffers made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..edits.base import Edit
from ..edits.prompts import Reading
from ..forward.blockwise import passes
from ..forward.prompt_keys import stored_queries
from ..forward.tokens import encode
from ..subjects.subject import Subject
from ..support.errors import CaseError

SPECIFICITY_TOKENS = 16
FLUENCY_TOKENS = 64
FLUENCY_TOP_K = 5
# Prompts processed together: few enough to stay in a CPU's caches, many enough to keep a GPU busy.
_ROWS = {"cpu": 64, "cuda": 512}
# Checking which rows are done synchronises with the GPU, so it only happens once in this many steps.
CHECK_DONE_EVERY = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: str
    budget: int  # maximum number of new tokens
    edit: int = -1  # index of the edit that acts on this row; -1: the unedited model
    noise: torch.Tensor | None = None  # (budget, k) Gumbel noise for top-k sampling; None: greedy


@dataclass(frozen=True)
class Generated:
    """A generated text and its tokens, and for codebook edits the prompt pass's distance to the nearest key and whether it fired."""

    text: str
    ids: Sequence[int] = ()
    distance: float | None = None
    fired: bool | None = None


def gumbel(texts: int, draw: torch.Generator) -> torch.Tensor:
    """(texts, 64, 5) Gumbel noise: adding it to the top-5 logits and taking the maximum samples from their softmax."""
    uniform = torch.rand(texts, FLUENCY_TOKENS, FLUENCY_TOP_K, generator=draw, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=1e-300)))


@torch.no_grad()
def generate(
    subject: Subject, requests: Sequence[Request], edits: Sequence[Edit] = (), max_rows: int | None = None
) -> list[Generated]:
    """Generate every request; ``Request.edit`` is an index into ``edits``.

    Memory grows with ``max_rows``, the number of prompts processed together (default: 64 on CPU, 512 on CUDA); results do not change.
    """
    requests, edits, readings = as_read(subject, requests, edits)
    sources: dict[tuple[str, int], list[int]] = {}
    for n, request in enumerate(requests):
        sources.setdefault((request.prompt, request.edit), []).append(n)
    encoded = {key: encode(subject.tokenizer, key[0]) for key in sources}
    if any(not ids for ids in encoded.values()):
        raise CaseError("cannot generate from an empty prompt")
    for request in requests:
        if (needed := len(encoded[request.prompt, request.edit]) + request.budget) > subject.positions:
            raise CaseError(
                f"prompt {request.prompt[-60:]!r} needs {needed:,} tokens with what is to be written; {subject.name} reads "
                f"{subject.positions:,}"
            )
    order = sorted(sources, key=lambda key: (len(encoded[key]), sources[key][0]))
    results: dict[int, Generated] = {}
    max_rows = max_rows or _ROWS[subject.device.type]
    for first in range(0, len(order), max_rows):
        keys = order[first : first + max_rows]
        read = _prefill(subject, [(encoded[key], key[1]) for key in keys], edits)
        prompts = [prompt for prompt, key in zip(read, keys) for _ in sources[key]]
        chosen = [n for key in keys for n in sources[key]]
        results.update(zip(chosen, _decode(subject, prompts, [requests[n] for n in chosen], edits)))
    for n, reading in readings.items():
        if reading.fired is not None:
            results[n] = replace(results[n], distance=reading.distance, fired=reading.fired)
    return [results[n] for n in range(len(requests))]


def as_read(
    subject: Subject, requests: Sequence[Request], edits: Sequence[Edit]
) -> tuple[list[Request], list[Edit], dict[int, Reading]]:
    """Requests for the prompts that the model actually reads, the remaining parts of the edits, and what was put before each prompt.

    Edits that change prompts (edits/prompts.py) are then done; a request whose edit has no other part gets no edit.
    """
    own = subject.edit.to_prompts if subject.edit else []
    parts: dict[int, list[Any]] = {-1: own}
    for index in {request.edit for request in requests} - {-1}:
        changing = [*own, *edits[index].to_prompts]
        parts[index] = list(Edit.compose(changing).parts) if changing else []
    asking = [(n, part) for n, request in enumerate(requests) for part in parts[request.edit]]
    queries: dict[tuple[int, int | None], torch.Tensor] = {}
    for layer in {part.asked_at for _, part in asking}:
        rows = [n for n, part in asking if part.asked_at == layer]
        prompts = [requests[n].prompt for n in rows]
        keys = torch.empty(len(rows), 0) if layer is None else stored_queries(subject, prompts, layer, "mean")
        queries.update({(n, layer): key[None] for n, key in zip(rows, keys)})
    changed = list(requests)
    readings: dict[int, Reading] = {}
    for n, part in asking:
        (reading,) = part.readings(queries[n, part.asked_at])
        earlier = readings.get(n, Reading(""))
        readings[n] = replace(reading if reading.fired is not None else earlier, before=earlier.before + reading.before)
    remaining = [edit.to_outputs for edit in edits]
    for n, reading in readings.items():
        request = requests[n]
        edit = request.edit if request.edit >= 0 and remaining[request.edit].layers else -1
        changed[n] = replace(request, prompt=reading.before + request.prompt, edit=edit)
    return changed, remaining, readings


def first_tokens(subject: Subject, written: Generated, count: int, with_end: bool = True) -> Generated:
    """What ``written`` would be with a budget of ``count`` tokens; without its end of text unless ``with_end``."""
    ids = list(written.ids[:count])
    if not with_end and ids and ids[-1] == subject.tokenizer.eos_token_id:
        ids.pop()
    return replace(written, text=_text(subject, ids), ids=ids)


@dataclass
class _Prompt:
    """A prompt that has been read: its keys and values in a pass's cache, and the logits of the next token."""

    length: int
    cache: Any  # a transformers Cache
    row: int
    logits: torch.Tensor
    distance: float | None
    fired: bool | None


def _prefill(subject: Subject, prompts: Sequence[tuple[list[int], int]], edits: Sequence[Edit]) -> list[_Prompt]:
    """Read prompts (sorted by length) in left-padded passes of like length."""
    read = []
    for group in passes(subject, [ids for ids, _ in prompts]):
        batch = [prompts[n] for n in group]
        padded = subject.tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt").to(subject.device)
        positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with subject.applying(edits, rows=[edit for _, edit in batch]) as state:
            done = subject.decoder(**padded, position_ids=positions, use_cache=True)
        logits = subject.model.lm_head(done.last_hidden_state[:, -1]).float()
        lookups: dict[int, tuple[float, bool]] = {}
        for lookup in state.lookups:
            lookups.update(zip(lookup.rows, zip(lookup.distances.tolist(), lookup.fired.tolist())))
        for row, (ids, _) in enumerate(batch):
            read.append(_Prompt(len(ids), done.past_key_values, row, logits[row], *lookups.get(row, (None, None))))
    return read


def _decode(
    subject: Subject, prompts: Sequence[_Prompt], requests: Sequence[Request], edits: Sequence[Edit]
) -> list[Generated]:
    """Continue prompts token by token, all rows together, each to its own budget or EOS.

    Finished rows leave the batch once they are a quarter of it (budgets differ a lot); until then they repeat EOS, which is removed.
    """
    device, eos = subject.device, subject.tokenizer.eos_token_id
    lengths = torch.tensor([prompt.length for prompt in prompts], device=device)
    width = max(prompt.length for prompt in prompts)
    steps = max(request.budget for request in requests)
    mask = (torch.arange(width + steps, device=device) >= width - lengths[:, None]).long()
    cache = _joined_cache(prompts, width, steps)
    budgets = torch.tensor([request.budget for request in requests], device=device)
    sampled = torch.tensor([request.noise is not None for request in requests], device=device)
    silent = torch.zeros(FLUENCY_TOKENS, FLUENCY_TOP_K, dtype=torch.float64)
    noise = torch.stack([silent if request.noise is None else request.noise for request in requests]).to(device)
    logits = torch.stack([prompt.logits for prompt in prompts])
    new = torch.full((len(prompts), steps), eos, dtype=torch.long, device=device)
    rows = torch.arange(len(prompts), device=device)  # the request of each row that is still in the batch
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with subject.applying(edits, rows=[request.edit for request in requests]) as state:
        for step in range(steps):
            token = logits.argmax(dim=-1)
            if step < FLUENCY_TOKENS:
                token = torch.where(sampled[rows], _sample(logits, noise[rows, step]), token)
            new[rows, step] = torch.where(done, eos, token)
            done = done | (token == eos) | (budgets[rows] <= step + 1)
            if step + 1 == steps:
                break
            checks = (step + 1) % CHECK_DONE_EVERY[device.type] == 0
            keep = (~done).nonzero()[:, 0] if checks else rows
            if not len(keep):
                break
            if len(keep) <= 0.75 * len(rows):
                rows, done, mask = rows[keep], done[keep], mask[keep]
                for layer in cache.layers:
                    layer.batch_select_indices(keep)
                state.rows = [requests[n].edit for n in rows.tolist()]
            hidden = subject.decoder(
                input_ids=new[rows, step][:, None],
                attention_mask=mask[:, : width + step + 1],  # the columns written so far
                position_ids=(lengths[rows] + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = subject.model.lm_head(hidden[:, -1]).float()
    texts = []
    for ids, request, prompt in zip(new.tolist(), requests, prompts):
        ids = ids[: request.budget]
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        texts.append(Generated(_text(subject, ids), ids, prompt.distance, prompt.fired))
    return texts


def _text(subject: Subject, ids: Sequence[int]) -> str:
    text: Any = subject.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _sample(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """One of the top-k tokens per row: the maximum of logits plus Gumbel noise follows their softmax."""
    top = logits.double().topk(noise.shape[-1], dim=-1)
    return top.indices.gather(-1, (top.values + noise).argmax(dim=-1, keepdim=True))[:, 0]


class _BufferLayer(DynamicLayer):
    """Keys and values of one block in a buffer with room for all remaining steps."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()
        self._buffers = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(filled)

    def _show(self, filled: int) -> None:
        self._filled = filled
        self.keys, self.values = (buffer[:, :, :filled] for buffer in self._buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        end = self._filled + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, self._filled : end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        keys, values = self._buffers
        self._buffers = (keys[indices], values[indices])
        self._show(self._filled)


def _joined_cache(prompts: Sequence[_Prompt], width: int, steps: int) -> Any:
    """The rows' caches aligned at the prompts' end, with ``steps`` free columns after it."""
    layers: list[Any] = []
    for block, sample in enumerate(prompts[0].cache.layers):
        shape = (len(prompts), sample.keys.shape[1], width + steps, sample.keys.shape[3])
        keys, values = sample.keys.new_zeros(shape), sample.keys.new_zeros(shape)
        for row, prompt in enumerate(prompts):
            read, columns = prompt.cache.layers[block], slice(width - prompt.length, width)
            keys[row, :, columns] = read.keys[prompt.row, :, -prompt.length :]
            values[row, :, columns] = read.values[prompt.row, :, -prompt.length :]
        layers.append(_BufferLayer(keys, values, filled=width))
    return Cache(layers=layers)
