"""Batched generation from many differently edited models (paper section III-D; protocol of the released program).

Decoded text is the generated tokens only, special tokens kept. A row that emits EOS ends there, with the EOS in its
text; what a row generates never depends on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .edits import Edit
from .errors import StudyError
from .prompts import encode
from .subjects import Subject

SPECIFICITY_TOKENS = 16
FLUENCY_TOKENS = 64
FLUENCY_TOP_K = 5
DEFAULT_ROWS = 64


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Attributes:
        prompt: what the model reads.
        budget: most new tokens.
        edit: index of the edit that acts on this row, -1 for the unedited model.
        noise: (budget, k) Gumbel noise for top-k sampling; None decodes greedily.
    """

    prompt: str
    budget: int
    edit: int = -1
    noise: torch.Tensor | None = None


@dataclass(frozen=True)
class Generated:
    """A generated text, and for codebook edits the prompt pass's distance to the nearest key and whether it fired."""

    text: str
    distance: float | None = field(default=None)
    fired: bool | None = field(default=None)


def gumbel(texts: int, draw: torch.Generator) -> torch.Tensor:
    """(texts, 64, 5) Gumbel noise: adding it to the top-5 logits and taking the maximum samples from their softmax."""
    uniform = torch.rand(texts, FLUENCY_TOKENS, FLUENCY_TOP_K, generator=draw, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=1e-300)))


@torch.no_grad()
def generate(
    subject: Subject, requests: Sequence[Request], edits: Sequence[Edit] = (), max_rows: int = DEFAULT_ROWS
) -> list[Generated]:
    """Generate every request, in left-padded batches of similar prompt length.

    Args:
        edits: what ``Request.edit`` indexes.
        max_rows: rows a batch; memory grows with it, results do not change.
    """
    lengths = [len(encode(subject.tokenizer, request.prompt)) for request in requests]
    # sampled and greedy rows need different treatment of the logits, hence different batches
    order = sorted(range(len(requests)), key=lambda n: (requests[n].noise is not None, lengths[n], n))
    results: dict[int, Generated] = {}
    for greedy in (True, False):
        same = [n for n in order if (requests[n].noise is None) is greedy]
        for first in range(0, len(same), max_rows):
            batch = same[first : first + max_rows]
            results.update(zip(batch, _batch(subject, [requests[n] for n in batch], edits)))
    return [results[n] for n in range(len(requests))]


def _batch(subject: Subject, requests: Sequence[Request], edits: Sequence[Edit]) -> list[Generated]:
    tokenizer = subject.tokenizer
    if any(not request.prompt for request in requests):
        raise StudyError("cannot generate from an empty prompt")
    encoded = tokenizer(
        [request.prompt for request in requests], add_special_tokens=False, padding=True, return_tensors="pt"
    ).to(subject.device)
    width = encoded["input_ids"].shape[1]
    budgets = torch.tensor([request.budget for request in requests])
    processors = LogitsProcessorList()
    if requests[0].noise is not None:
        processors.append(_TopKGumbel(torch.stack([r.noise for r in requests if r.noise is not None]), width))
    with subject.applying(edits, rows=[request.edit for request in requests]) as applied:
        output = subject.model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=int(budgets.max()),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_OwnBudget(budgets.to(subject.device), width)]),
        )
    new = output[:, width:].tolist()
    distances, fired = _prompt_lookups(applied, [request.edit for request in requests])
    eos = tokenizer.eos_token_id
    texts = []
    for ids, request in zip(new, requests):
        ids = ids[: request.budget]
        texts.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    decoded = [
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in texts
    ]
    return [Generated(*row) for row in zip(decoded, distances, fired)]


def _prompt_lookups(applied, rows: list[int]) -> tuple[list, list]:
    distances: list[float | None] = [None] * len(rows)
    fired: list[bool | None] = [None] * len(rows)
    with_codebook = [n for n, row in enumerate(rows) if row >= 0 and applied.edits[row].kind == "codebook"]
    prompt_pass = next((lookup for lookup in applied.lookups if lookup.phase == "prefill"), None)
    if prompt_pass:
        for n, distance, hit in zip(with_codebook, prompt_pass.distances.tolist(), prompt_pass.fired.tolist()):
            distances[n], fired[n] = distance, hit
    return distances, fired


class _OwnBudget(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    def __init__(self, budgets: torch.Tensor, width: int) -> None:
        self._budgets, self._width = budgets, width

    def __call__(self, input_ids, scores, **kwargs):
        return self._budgets <= input_ids.shape[1] - self._width


class _TopKGumbel(LogitsProcessor):
    """Replaces each row's distribution by a point on one of its top-k tokens, chosen with noise drawn beforehand."""

    def __init__(self, noise: torch.Tensor, width: int) -> None:
        self._noise, self._width = noise, width

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self._width
        top = scores.double().topk(self._noise.shape[-1], dim=-1)
        noisy = top.values + self._noise[:, step].to(scores.device)
        winner = top.indices.gather(-1, noisy.argmax(dim=-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, winner, 0.0)
