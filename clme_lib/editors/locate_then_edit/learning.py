"""What ROME, MEMIT and PMET share: learning, at the lookup token, a vector that makes the model write the target.

Each case has six rows: a context, the prompt, and the target but its last token. A vector delta (two for PMET) is added to a
module's output at the lookup token of every row and learnt by Adam, to lower (paper section III-B, after Meng et al. 2022)::

    L = f * mean_rows(mean_tokens(-log p(target token)))
        + kl_factor * KL(p_delta || p_0)                 next-token distributions after the bare prompt
        + weight_decay * sum |delta| / |v_0|^2           v_0: the module's unedited output there, no context

An iteration evaluates L; stops the case when L is below ``loss_floor`` or this was the last of ``steps`` evaluations; else
makes an Adam update and shortens delta to ``clamp * |v_0|``. A case whose loss is no longer finite keeps the last delta
whose loss was. Cases of a batch share nothing: the batch's loss is the sum of theirs, a stopped case's delta is
restored after each update, and its rows leave the batch once a quarter of the cases have stopped. The device knows which
cases have stopped; the host checks only occasionally, because each check waits for the device.

The released program misplaces rows (it counts columns without padding but reads them from a left-padded batch) and
tokenises targets without the space before them. ``padding="released"`` and ``targets="alone"`` reproduce this.

``lookup="content"`` (not in the paper) reads keys and learns delta at the last token inside the template, before the prompt's last
line break, instead of at the colon that all prompts end in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field

from ...datasets.cases import Case, in_seeded_order
from ...edits.base import EditLog
from ...forward.label_losses import LabelIndices
from ...forward.partial import PartialForward
from ...forward.prompt_keys import stored_queries
from ...forward.tokens import TokenRow, encode, end_ids, tokenize
from ...subjects.subject import Subject
from ...support.errors import CaseError, StudyError
from ..base import Editor, TargetHyperparameters
from ..operations import Phase, Sizes
from .contexts import TOKENS, context_templates
from .second_moments import SecondMoment, StatisticsHyperparameters, second_moments

# Checking which cases have stopped waits for a GPU; not checking costs steps on rows of stopped cases.
CHECK_DONE_EVERY = {"cpu": 1, "cuda": 5}


class RewritingHyperparameters(StatisticsHyperparameters, TargetHyperparameters):
    """``clamp`` bounds delta in units of its module's output norm; ``loss_floor`` is compared with the whole loss."""

    steps: int = Field(default=25, gt=0)
    lr: float = Field(default=0.5, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    clamp: float = Field(default=4.0, gt=0)
    loss_floor: float = Field(default=5e-2, ge=0)
    padding: Literal["aligned", "released"] = "aligned"
    targets: Literal["in-context", "alone"] = "in-context"
    lookup: Literal["colon", "content"] = "colon"


Hparams = TypeVar("Hparams", bound=RewritingHyperparameters)


def up_to_lookup(text: str, lookup: str) -> str:
    """A prompt up to the token at which the editors read their key: to its end, or to the end of its content.

    Raises:
        CaseError: ``lookup`` is ``content``, and the prompt has no line break before its last line.
    """
    if lookup == "colon":
        return text
    content, line_break, _ = text.rpartition("\n")
    if not line_break or not content.strip():
        raise CaseError(
            f"lookup: content ends at a line break, and the prompt {text[-60:]!r} has none after its content; use colon"
        )
    return content


def _at_content(subject: Subject, row: TokenRow, text: str) -> TokenRow:
    before = encode(subject.tokenizer, up_to_lookup(text, "content"))
    if list(row.inputs[: len(before)]) != before:
        raise CaseError(
            f"lookup: the tokenizer merges the end of the content of {text[-60:]!r} with what follows; use colon"
        )
    return replace(row, lookup=len(before) - 1)


def rewriting_rows(
    subject: Subject,
    case: Case,
    contexts: Sequence[str],
    padding: str,
    targets: str,
    end: bool = False,
    lookup: str = "colon",
) -> list[TokenRow]:
    """One row per context, and the bare prompt's row last unless the first row can replace it.

    With aligned rows and targets in context, the first row (no context) has the lookup token at the same position as the bare prompt,
    and later tokens cannot influence it.
    """
    tokenizer = subject.tokenizer
    rows = [tokenize(tokenizer, context + case.prompt, case.target, end) for context in contexts]
    if lookup == "content":
        rows = [_at_content(subject, row, context + case.prompt) for row, context in zip(rows, contexts)]
    if padding == "aligned" and targets == "in-context":
        return rows
    if targets == "alone":
        alone = [*encode(tokenizer, case.target), *end_ids(tokenizer, end)]
        written = str(tokenizer.decode(alone[:-1], clean_up_tokenization_spaces=False))
        for n, context in enumerate(contexts):
            inputs = tuple(encode(tokenizer, f"{context}{case.prompt} {written}"))
            rows[n] = TokenRow(inputs, 0, rows[n].lookup, len(inputs) - len(alone), tuple(alone))
    bare = tuple(encode(tokenizer, case.prompt))
    # its label is never scored; only the distribution at that position is read
    rows.append(
        TokenRow(bare, 0, len(encode(tokenizer, up_to_lookup(case.prompt, lookup))) - 1, len(bare) - 1, bare[-1:])
    )
    return rows if padding == "aligned" else misplaced(rows, tokenizer.pad_token_id)


def misplaced(rows: Sequence[TokenRow], pad: int) -> list[TokenRow]:
    """Rows as the released program reads them: too far left by the padding that the longest row causes."""
    longest = max(len(row.inputs) for row in rows)
    moved: list[TokenRow] = []
    for row in rows:
        shift = longest - len(row.inputs)
        first = min(row.lookup, row.first_label) - shift
        pads = max(0, -first)  # a column may even fall on the padding itself
        inputs = (pad,) * pads + row.inputs
        moved.append(TokenRow(inputs, pads, row.lookup - shift + pads, row.first_label - shift + pads, row.target_ids))
    return moved


class Rewriting:
    """The rows of ``cases`` (B,) of the editor's batch, equally many per case, in one partial pass.

    The labels of the first ``contexts`` rows of a case enter its loss. The distribution after the bare prompt is read from the row
    that follows them, or from the first row if :func:`rewriting_rows` lets that one replace it.
    """

    def __init__(self, forward: PartialForward, cases: torch.Tensor, contexts: int) -> None:
        self.forward, self.cases, self.contexts = forward, cases, contexts
        self.each = len(forward.touched) // len(cases)
        firsts = torch.arange(len(cases), device=cases.device) * self.each
        bare = firsts + (contexts if self.each > contexts else 0)
        self._after_bare = LabelIndices.of(forward.label_counts.cumsum(0)[bare] - forward.label_counts[bare])

    def at_lookup(self, tail: torch.Tensor) -> torch.Tensor:
        """(R, x) of a tail tensor (R, S, x): its values at each row's lookup column."""
        return tail[torch.arange(len(tail), device=tail.device), self.forward.touched]

    def by_case(self, per_row: torch.Tensor) -> torch.Tensor:
        """(B, 6, ...) of a tensor by row: the values of each case's rows with a target, the row without a context first."""
        return per_row.view(len(self.cases), self.each, *per_row.shape[1:])[:, : self.contexts]

    def select(self, cases: torch.Tensor) -> Rewriting:
        """The same rows for only some of the cases (indices into ``self.cases``, ascending)."""
        rows = cases[:, None] * self.each + torch.arange(self.each, device=cases.device)
        return Rewriting(self.forward.select(rows.flatten()), self.cases[cases], self.contexts)

    def evaluate(
        self, changed: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """With ``changed`` (R, d) as W_l's output at the lookup columns, and a ``reference`` (B, vocabulary) for the log-distribution
        after the bare prompt (None: itself), of each case (B,): mean negative log-likelihood of the target; whether every target
        token of all rows is the arg-max; the divergence from the reference; and the log-distribution (B, vocabulary)."""
        forward = self.forward
        states = forward.states(forward.with_touched(changed))
        losses, greedy, moved, after_bare = forward.label_losses(states, self._after_bare, reference)
        missed = torch.zeros_like(forward.label_counts).index_add(0, forward.label_rows, (~greedy).long())
        likelihood = self.by_case(forward.row_means(losses)).mean(dim=1)
        return likelihood, self.by_case(missed).sum(dim=1) == 0, moved, after_bare


class RewritingEditor(Editor[Hparams]):
    """Shared base of ROME, MEMIT and PMET."""

    from_lookup = True
    compat: ClassVar = {"padding": "released", "targets": "alone"}
    without_early_stop: ClassVar = {"loss_floor": 0.0}
    default_batch = 4
    #: from cases and the results of :meth:`learn` for them to their edits
    write: Callable[..., list[Any]]
    cache_folder: ClassVar[str | None] = "statistics"
    #: prompts of cases that are not edited, each up to its lookup token
    lookup_prompts: Sequence[str] = ()

    @classmethod
    def trains(cls, hparams):
        return hparams.lookup_weight > 0

    def _edit_batch(self, cases, tokenized):
        return self.write(cases, *self.learn(cases))

    def fit(self, cases, edited=()):
        """With ``lookup_weight``: store prompts from which the lookup token's second moment is gathered."""
        if not self.needs_training:
            return
        if not cases:
            raise StudyError(
                f"{self.name} gathers lookup tokens' keys from cases that are not edited, and needs at least one such case"
            )
        asked = in_seeded_order(cases, "lookup", self.seed, cases[0].dataset)[: self.hparams.lookup_records]
        prompts = [text for case in asked for text in (case.prompt, *case.rephrased)]
        self.lookup_prompts = [up_to_lookup(prompt, self.hparams.lookup) for prompt in dict.fromkeys(prompts)]
        for gathered in ("moments", "projections"):  # those of the previous dataset
            vars(self).pop(gathered, None)

    @cached_property
    def contexts(self) -> tuple[str, ...]:
        """The original subject's context templates, the empty one first."""
        return context_templates(self.subject.original, self.seed)

    @cached_property
    def moments(self) -> dict[int, SecondMoment]:
        """The second moment of each edited layer's keys, in the original subject, adjusted as the hyperparameters say."""
        subject, hparams = self.subject.original, self.hparams
        moments = second_moments(subject, self.layers, hparams)
        if not hparams.lookup_weight and not hparams.statistics_ridge:
            return moments
        if self.needs_training and not self.lookup_prompts:
            raise StudyError(
                f"{self.name} with lookup_weight has no prompts: call fit(cases) with cases that will not be edited"
            )
        adjusted = {}
        for layer, moment in moments.items():
            keys = stored_queries(subject, self.lookup_prompts, layer, "last") if self.needs_training else None
            adjusted[layer] = moment.adjusted(keys, hparams.lookup_weight, hparams.statistics_ridge)
        return adjusted

    def setup(self) -> dict[str, Any]:
        for moment in self.moments.values():
            _ = moment.factor  # made here, outside any case's clock
        statistics = {layer: moment.describe() for layer, moment in self.moments.items()}
        return {"contexts": list(self.contexts), **({"statistics": statistics} if statistics else {})}

    def mean_width(self, prompt: int) -> float:
        """Average number of tokens of a row's context and prompt, for a prompt of ``prompt`` tokens."""
        return prompt + TOKENS * (len(self.contexts) - 1) / len(self.contexts)

    def _tokenize(self, case):
        row = super()._tokenize(case)
        return row if self.hparams.lookup == "colon" else _at_content(self.subject, row, case.prompt)

    def lookup_prompt(self, case):
        if self.hparams.padding == "released":
            raise StudyError(
                f"{self.name}: with padding: released the token at which an edit is written is not the prompt's; use aligned"
            )
        return up_to_lookup(case.prompt, self.hparams.lookup)

    def _lookup_tokens(self, case: Case, context: str) -> list[int]:
        """Token ids of a context and a prompt, up to the lookup token."""
        return encode(self.subject.tokenizer, up_to_lookup(context + case.prompt, self.hparams.lookup))

    def operations(self, prompt, target, steps):
        sizes, rows, width = Sizes(self.subject), len(self.contexts), self.mean_width(prompt)
        above = sizes.blocks - 1 - self.layers[-1]
        operations, traffic = sizes.step(rows * target, 0, above, rows * target)
        operations += 8 * sizes.hidden * above * rows * target * (width + target)  # attention within a row
        return [sizes.read(width, sizes.blocks, rows), Phase("steps", steps * operations, steps * traffic)]

    def _outputs(self, forward: PartialForward) -> list[torch.Tensor]:
        """The outputs (R, S, d) for each of which a delta is learnt, without the deltas; the last one's delta is written."""
        return [forward.outputs]

    def _place(self, rewriting: Rewriting, deltas: list[torch.Tensor]) -> torch.Tensor:
        """(R, d) the output of ``W_l`` at the lookup columns under the deltas (R, d each)."""
        return rewriting.at_lookup(rewriting.forward.outputs) + deltas[0]

    def _stops(
        self, total: torch.Tensor, agreed: torch.Tensor, kl: torch.Tensor, factor: torch.Tensor, cases: torch.Tensor
    ) -> torch.Tensor:
        """(B,) which of ``cases`` can stop; may change the NLL ``factor`` (of all cases) for the next evaluation."""
        return total < self.hparams.loss_floor

    def learn(self, cases: Sequence[Case]) -> tuple[Any, ...]:
        """Learn delta at the last edited layer: the :class:`Rewriting` it was learnt on, ``v_0 + delta`` (B, d) in float32, and each
        case's log; needs gradients. CaseError if a loss is not finite before the first update."""
        hparams, count, device = self.hparams, len(cases), self.subject.device
        read_as = hparams.padding, hparams.targets, hparams.end_of_target, hparams.lookup
        rows = [row for case in cases for row in rewriting_rows(self.subject, case, self.contexts, *read_as)]
        forward = PartialForward(self.subject, rows, self.layers[-1], from_lookup=True)
        whole = rewriting = Rewriting(forward, torch.arange(count, device=device), len(self.contexts))
        initial = [whole.by_case(whole.at_lookup(output))[:, 0].float() for output in self._outputs(forward)]
        sizes = [start.norm(dim=-1) for start in initial]
        deltas = [torch.zeros_like(start, requires_grad=True) for start in initial]
        last_finite = [delta.detach().clone() for delta in deltas]
        optimizer = torch.optim.Adam(deltas, lr=hparams.lr)
        factor = torch.ones(count, device=device)
        active = torch.ones(count, dtype=torch.bool, device=device)
        losses = torch.full((hparams.steps, count), math.nan, device=device)
        reference = None
        for iteration in range(hparams.steps):
            remaining = rewriting.cases
            by_row = remaining.repeat_interleave(rewriting.each)
            changed = self._place(rewriting, [delta[by_row] for delta in deltas])
            compared_with = None if reference is None else reference[remaining]
            nll, agreed, divergence, after_bare = rewriting.evaluate(changed, compared_with)
            reference = after_bare if reference is None else reference
            kl = hparams.kl_factor * divergence
            decay = sum(delta[remaining].norm(dim=-1) / size[remaining] ** 2 for delta, size in zip(deltas, sizes))
            loss = factor[remaining] * nll + kl + hparams.weight_decay * decay
            total = loss.detach()
            counts = active[remaining] & total.isfinite()
            losses[iteration, remaining] = torch.where(counts, total, math.nan)
            lost = torch.zeros_like(active).index_copy(0, remaining, active[remaining] & ~counts)
            with torch.no_grad():
                for delta, kept in zip(deltas, last_finite):
                    delta.copy_(torch.where(lost[:, None], kept, delta))
            active[remaining] = counts & ~self._stops(total, agreed, kl.detach(), factor, remaining)
            check_done = (iteration + 1) % CHECK_DONE_EVERY[device.type] == 0
            left = active[remaining].nonzero()[:, 0] if check_done else remaining
            if not len(left) or iteration == hparams.steps - 1:
                break
            optimizer.zero_grad(set_to_none=True)
            torch.where(active[remaining], loss, 0.0).sum().backward()
            last_finite = [delta.detach().clone() for delta in deltas]
            optimizer.step()
            with torch.no_grad():
                for delta, kept, size in zip(deltas, last_finite, sizes):
                    norm, bound = delta.norm(dim=-1), hparams.clamp * size
                    delta.mul_(torch.where(norm > bound, bound / norm, torch.ones_like(norm))[:, None])
                    delta.copy_(torch.where(active[:, None], delta, kept))
            if len(left) <= 0.75 * len(remaining):
                rewriting = rewriting.select(left)
        logs = []
        for case, case_losses in zip(cases, losses.T.tolist()):
            counted = tuple(loss for loss in case_losses if not math.isnan(loss))
            if not counted:
                raise CaseError(f"case {case.case_id}: the loss of {self.name} is not finite; use float32")
            logs.append(EditLog(len(counted) - 1, counted))  # no update followed the last loss, or it was not kept
        return whole, initial[-1] + deltas[-1].detach(), logs
