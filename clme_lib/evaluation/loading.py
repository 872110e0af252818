"""Loading a subject, and checking that the study's passes compute the same as its model's own forward pass.

The names of a model's modules do not tell how it computes: a multiplier on the residual stream, a norm after the attention, or a
sliding window does not change them. So a few short prompts go through the model as transformers runs it and through the
study's own passes, and a subject for which the two differ by more than rounding is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import transformers

from .. import __version__
from ..datasets.cases import Case
from ..forward.blockwise import BlockPass, Blockwise
from ..forward.partial import PartialForward
from ..forward.recording import recorded
from ..forward.tokens import TokenRow, encode
from ..subjects.files import read_subject
from ..subjects.subject import Subject
from ..support.cache import cache_dir, name_for
from ..support.errors import StudyError
from ..support.journal import write_text
from .generation import FLUENCY_TOKENS, SPECIFICITY_TOKENS, Request, generate

_PROMPTS = (
    "Code:",
    "Intent: sort `a`\nCode:",
)
_WRITTEN = 2  # tokens: each costs a pass through the model
# Tolerances for rounding: relative to the length of a vector, and in nats for a loss.
_TOLERANCES = {"float32": (1e-3, 1e-2), "float16": (2e-2, 0.1), "bfloat16": (1e-1, 0.5)}


def load_subject(name: str, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a model; a model that the study's passes would not reproduce is refused.

    Args:
        name: a registered name (:func:`list_subjects`; ``smollm2-135m`` needs no account), any hub id such as ``owner/model``, a
            folder with safetensors weights, or a YAML that names one of these as its ``id`` and has hyperparameters for it.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (float32 on every device), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        StudyError: unknown name, failed download, files that are damaged or do not fit together, an architecture that computes
        differently from what the editors assume, no such device or dtype, or too little memory.
    """
    subject = read_subject(name, device, dtype)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "clme": __version__}
    identity = {**subject.identity, **versions, "device": subject.device.type}
    compared = cache_dir() / "compared" / f"{name_for(subject.name, identity)}.txt"
    if not compared.is_file():
        check_behaviour(subject)
        with contextlib.suppress(OSError, StudyError):  # It is compared again next time.
            write_text(compared, "")
    return subject


def check_behaviour(subject: Subject) -> None:
    """Compare the study's passes with the model's own.

    Raises:
        StudyError: they differ by more than rounding, or the study's passes cannot run on this model; the message says where.
    """
    kind = f"subject {subject.name!r} is a {type(subject.model).__name__} that"
    remedy = (
        "The editors know blocks that compute like those of Llama, Qwen2 and StableLM; choose such a model, without multipliers, norms "
        "after attention or MLP, attention of several kinds, or experts"
    )
    prompts = [
        text for text in _PROMPTS if len(encode(subject.tokenizer, text)) + SPECIFICITY_TOKENS <= subject.positions
    ]
    if not prompts:
        raise StudyError(
            f"subject {subject.name!r} reads {subject.positions} tokens (max_position_embeddings or sliding_window in its config.json), too few for any case; choose another subject"
        )
    try:
        differences = _differences(subject, prompts)
    except (StudyError, MemoryError):
        raise
    except Exception as error:  # a model with unknown arguments may raise anything
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise StudyError(f"{kind} the study's passes cannot run ({type(error).__name__}: {error}). {remedy}") from error
    relative, nats = _TOLERANCES[subject.dtype_name]
    for what, (difference, is_relative) in differences.items():
        if not difference <= (relative if is_relative else nats):  # also if it is NaN
            size = f"{100 * difference:.3g}%" if is_relative else f"{difference:.2g} nats"
            raise StudyError(f"{kind} the study's passes do not reproduce: {what} differ by {size}. {remedy}")


@torch.no_grad()
def _differences(subject: Subject, prompts: Sequence[str]) -> dict[str, tuple[float, bool]]:
    """The largest differences by what was compared, and whether they are relative (else in nats)."""
    written = generate(subject, [Request(prompt, _WRITTEN) for prompt in prompts])
    tokens = [TokenRow.of(encode(subject.tokenizer, prompt), text.ids) for prompt, text in zip(prompts, written)]
    rows = [row.inputs for row in tokens]
    walk = Blockwise(subject, rows)
    passed: list[BlockPass] = []
    for layer in range(len(subject.blocks)):
        passed.append(walk.block(layer, passed[-1].hidden if passed else walk.embedded))
    differences: dict[str, tuple[float, bool]] = {}

    def note(what: str, difference: float, is_relative: bool) -> None:
        before = differences.get(what, (0.0, is_relative))[0]
        differences[what] = difference if math.isnan(difference) else max(before, difference), is_relative

    def compare(what: str, here: torch.Tensor, there: torch.Tensor) -> None:
        note(what, ((here - there).float().norm() / there.float().norm()).item(), True)

    # Padded on the right, because later tokens do not influence earlier ones.
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True).to(subject.device)
    with contextlib.ExitStack() as hooks:
        points = "residual", "mlp_input", "keys", "outputs", "mlp_output"
        read = [hooks.enter_context(recorded(block, *points)) for block in subject.blocks]
        own = subject.model(padded, output_hidden_states=True, use_cache=False)
    for layer, (block, at) in enumerate(zip(subject.blocks, read)):
        after = at["residual"] + at["outputs"]
        if block is subject.blocks[-1]:  # The last state that transformers returns is normalised.
            after = subject.decoder.norm(after)
        normed = block.post_attention_layernorm(at["residual"])
        for n, ids in enumerate(rows):
            length = len(ids)
            compare("the inputs of the edited matrices", passed[layer].keys[n, -length:], at["keys"][n, :length])
            compare(
                "the residual streams after the blocks", after[n, :length], own.hidden_states[layer + 1][n, :length]
            )
            compare("the inputs of the MLPs", normed[n, :length], at["mlp_input"][n, :length])
            compare("the outputs of the MLPs", at["outputs"][n, :length], at["mlp_output"][n, :length])
    losses = []
    for n, row in enumerate(tokens):
        logits = own.logits[n, row.first_label : len(row.inputs)].float()
        labels = torch.tensor(row.target_ids, device=subject.device)
        losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
        # Every token that the study generates has to be the model's own choice, given the previous ones.
        missed = logits.amax(-1) - logits.gather(-1, labels[:, None])[:, 0]
        note("the tokens of a greedy text", missed.max().item(), False)
    layer = len(subject.blocks) * 3 // 4
    residuals = [read[layer]["residual"][n, : len(ids)] for n, ids in enumerate(rows)]
    for partial in (
        PartialForward(subject, tokens, layer, from_lookup=True),
        PartialForward(subject, tokens, layer, from_lookup=False, residuals=residuals),
    ):
        for loss, plain in zip(partial.losses(partial.outputs).tolist(), losses):
            note("the losses of targets", abs(loss - plain), False)
    return differences


def check_lengths(subject: Subject, cases: Sequence[Case], source: str) -> None:
    """Refuse cases from ``source`` for which the subject has too few positions: for any prompt with the text generated after it.

    Raises:
        StudyError: naming the case, its longest text and the subject's positions.
    """
    texts = {text for case in cases for text in (*_prompts(case), f"{case.prompt} {case.target}")}
    ids = subject.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    lengths = {text: len(row) for text, row in zip(texts, ids)}
    tokens = subject.decoder.embed_tokens.num_embeddings
    strange = {text for text, row in zip(texts, ids) if max(row, default=0) >= tokens}
    for case in cases:
        if unknown := strange.intersection((*_prompts(case), f"{case.prompt} {case.target}")):
            text = min(unknown)[:60]
            raise StudyError(
                f"{source}: case {case.case_id} of {case.dataset}: {text!r}... has a token that {subject.name} does not know"
            )
        budget = lengths[f"{case.prompt} {case.target}"] - lengths[case.prompt]
        needed = {text: lengths[text] + max(budget, FLUENCY_TOKENS) for text in (case.prompt, *case.rephrased)}
        needed |= {text: lengths[text] + SPECIFICITY_TOKENS for text in case.unrelated if text not in needed}
        longest = max(needed, key=needed.__getitem__)
        if needed[longest] > subject.positions:
            raise StudyError(
                f"{source}: case {case.case_id} of {case.dataset}: {longest[:60]!r}... has {lengths[longest]:,} tokens and needs "
                f"{needed[longest]:,} with what is written after it; {subject.name} reads {subject.positions:,} (max_position_embeddings "
                "or sliding_window in its config.json): leave the case out, or choose another subject"
            )


def _prompts(case: Case) -> tuple[str, ...]:
    return case.prompt, *case.rephrased, *case.unrelated
