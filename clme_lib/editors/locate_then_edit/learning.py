"""What ROME, MEMIT and PMET share: learning, at the lookup token, a vector that makes the model write the target.

Each case has six rows: a context, the prompt, and the target but its last token. A vector delta (two for PMET) is added to a
module's output at the lookup token of every row and learnt by Adam, to lower (paper section III-B, after Meng et al. 2022)::

    L = f * mean_rows(mean_tokens(-log p(target token)))
        + kl_factor * KL(p_delta || p_0)                 next-token distributions after the bare prompt
        + weight_decay * sum |delta| / |v_0|^2           v_0: the module's unedited output there, no context

An iteration evaluates L; stops the case when L is below ``loss_floor`` or this was the last of ``steps`` evaluations; else
makes an Adam update and shortens delta to ``clamp * |v_0|``. A case whose loss is no longer finite keeps the last delta
whose loss was. Cases of a batch share nothing: the batch's loss is the sum of theirs, a stopped case's delta is
restored after each update, and its rows leave the batch once a quarter of the cases have stopped. Which have is known to
the device; the host looks now and then, because each look waits.

The released program misplaces rows (it reads columns counted without padding from a batch padded on the left) and
tokenises targets alone, without the space before them. ``padding="released"`` and ``targets="alone"`` do as it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field

from ...datasets.cases import Case
from ...edits.base import EditLog
from ...forward.label_losses import LabelIndices
from ...forward.partial import PartialForward, longest_above
from ...forward.tokens import TokenRow, encode, tokenize
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ...support.schema import Schema
from ..base import Editor
from ..operations import Phase, Sizes
from .contexts import TOKENS, context_templates

# Asking which cases have stopped waits for a GPU; not asking costs steps of the rows of those that have.
CHECK_DONE_EVERY = {"cpu": 1, "cuda": 5}


class RewritingHyperparameters(Schema):
    """``clamp`` bounds delta in units of its module's output norm; ``loss_floor`` is compared with the whole loss."""

    steps: int = Field(default=25, gt=0)
    lr: float = Field(default=0.5, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    clamp: float = Field(default=4.0, gt=0)
    loss_floor: float = Field(default=5e-2, ge=0)
    padding: Literal["aligned", "released"] = "aligned"
    targets: Literal["in-context", "alone"] = "in-context"


Hparams = TypeVar("Hparams", bound=RewritingHyperparameters)


def rewriting_rows(subject: Subject, case: Case, contexts: Sequence[str], padding: str, targets: str) -> list[TokenRow]:
    """One row a context, and the bare prompt's row last unless the first one can stand for it.

    With aligned rows and targets in context, the first row (no context) has the lookup token where the bare prompt has it,
    and what follows cannot be seen from there.
    """
    tokenizer = subject.tokenizer
    if padding == "aligned" and targets == "in-context":
        return [tokenize(tokenizer, context + case.prompt, case.target) for context in contexts]
    rows = []
    for context in contexts:
        tokens = tokenize(tokenizer, context + case.prompt, case.target)
        if targets == "in-context":
            rows.append(tokens)
            continue
        alone = encode(tokenizer, case.target)
        written = str(tokenizer.decode(alone[:-1], clean_up_tokenization_spaces=False))
        inputs = tuple(encode(tokenizer, context + case.prompt + " " + written))
        rows.append(TokenRow(inputs, 0, tokens.lookup, len(inputs) - len(alone), tuple(alone)))
    bare = tuple(encode(tokenizer, case.prompt))
    # its label is never scored: only the distribution there is read
    rows.append(TokenRow(bare, 0, len(bare) - 1, len(bare) - 1, bare[-1:]))
    return list(rows) if padding == "aligned" else misplaced(rows, subject.tokenizer.pad_token_id)


def misplaced(rows: Sequence[TokenRow], pad: int) -> list[TokenRow]:
    """Rows as the released program reads them: too far left by the padding that the longest row costs each."""
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
    """The rows of a batch of cases, ready to be read and optimised.

    Attributes:
        cases: (B,) which cases of the editor's batch these are.
        forward: the partial forward pass over all their rows.
        owner: (R,) the case of each row, as an index into ``cases``.
        scored: (R,) True for rows whose labels enter the loss; scored_rows: their indices.
        bare: (B,) the row from which the next-token distribution of the bare prompt is read; after_bare: the places of
            their first labels among all.
    """

    def __init__(self, forward: PartialForward, cases, owner, scored, bare) -> None:
        self.forward, self.cases, self.owner, self.scored, self.bare = forward, cases, owner, scored, bare
        self.scored_rows = scored.nonzero()[:, 0]
        self.after_bare = LabelIndices.of(forward.label_counts.cumsum(0)[bare] - forward.label_counts[bare])

    @classmethod
    def of(cls, subject: Subject, rows: Sequence[Sequence[TokenRow]], contexts: int, layer: int) -> Rewriting:
        """From each case's :func:`rewriting_rows`."""
        flat = [row for of_case in rows for row in of_case]
        each, device = len(rows[0]), subject.device
        place = torch.arange(len(flat), device=device)
        forward = PartialForward(subject, flat, layer, from_lookup=True)
        bare = torch.arange(len(rows), device=device) * each + (contexts if each > contexts else 0)
        cases = torch.arange(len(rows), device=device)
        return cls(forward, cases, place // each, place % each < contexts, bare)

    def at_lookup(self, tail: torch.Tensor) -> torch.Tensor:
        """(R, x) of a tail tensor (R, S, x): what it has at each row's lookup column."""
        return tail[torch.arange(len(tail), device=tail.device), self.forward.touched]

    def first_rows(self, per_row: torch.Tensor) -> torch.Tensor:
        """(B, x) of a tensor by row: that of each case's row without a context."""
        return per_row.view(len(self.cases), -1, *per_row.shape[1:])[:, 0]

    def context_rows(self, per_row: torch.Tensor) -> torch.Tensor:
        """(B, 6, x) of a tensor by row: those of each case's rows with a target."""
        return per_row[self.scored_rows].view(len(self.cases), -1, *per_row.shape[1:])

    def select(self, cases: torch.Tensor) -> Rewriting:
        """The same for some of the cases (indices into ``self.cases``, ascending)."""
        rows = torch.isin(self.owner, cases).nonzero()[:, 0]
        each = len(self.owner) // len(self.cases)
        place = torch.arange(len(rows), device=rows.device)
        bare = self.bare[cases] % each + torch.arange(len(cases), device=rows.device) * each
        return Rewriting(self.forward.select(rows), self.cases[cases], place // each, self.scored[rows], bare)

    def evaluate(
        self, changed: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """With ``changed`` (R, d) as W_l's output at the lookup columns.

        Args:
            reference: (B, vocabulary) log-distribution to compare with that after the bare prompt; None for itself.

        Returns:
            mean negative log-likelihood of each case's target (B,); whether every target token of all its rows is
            the arg-max (B,); the divergence from the reference (B,); log-distribution after the bare prompt (B, vocabulary).
        """
        forward = self.forward
        states = forward.states(forward.with_touched(changed))
        losses, greedy, moved, after_bare = forward.label_losses(states, self.after_bare, reference)
        per_row = forward.row_means(losses)[self.scored_rows]
        missed = torch.zeros(len(self.cases), dtype=torch.long, device=states.device)
        labels_scored = self.scored[forward.label_rows]
        missed = missed.index_add(0, self.owner[forward.label_rows], ((~greedy) & labels_scored).long())
        return per_row.view(len(self.cases), -1).mean(dim=1), missed == 0, moved, after_bare


# outputs of W_l at the lookup columns (R, d), given the rows and each case's vectors (R, d each, repeated by row)
Place = Callable[[Rewriting, list[torch.Tensor]], torch.Tensor]


class RewritingEditor(Editor[Hparams]):
    """Base of ROME, MEMIT and PMET."""

    compat: ClassVar = {"padding": "released", "targets": "alone"}
    without_early_stop: ClassVar = {"loss_floor": 0.0}
    default_batch = 4

    @cached_property
    def contexts(self) -> tuple[str, ...]:
        """The subject's context templates, the empty one first."""
        return context_templates(self.subject, self.seed)

    def setup(self) -> dict[str, Any]:
        return {"contexts": list(self.contexts)}

    def _cost(self, tokenized):
        return len(tokenized.target_ids)

    @property
    def learning_layer(self) -> int:
        """The layer at whose module outputs delta is learnt: the last one written."""
        hparams: Any = self.hparams
        return max(getattr(hparams, "layers", None) or [hparams.layer])

    def mean_width(self, prompt: int) -> float:
        """Tokens of a row's context and prompt, on average, when the prompt has ``prompt``."""
        return prompt + TOKENS * (len(self.contexts) - 1) / len(self.contexts)

    def operations(self, prompt, target, steps):
        sizes, rows, width = Sizes(self.subject), len(self.contexts), self.mean_width(prompt)
        above = sizes.blocks - 1 - self.learning_layer
        operations, traffic = sizes.step(rows * target, 0, above, rows * target)
        operations += 8 * sizes.hidden * above * rows * target * (width + target)  # attention within a row
        return [sizes.read(width, sizes.blocks, rows), Phase("steps", steps * operations, steps * traffic)]

    def _max_cost_ratio(self):
        return longest_above(self.subject, self.learning_layer)

    def _rewriting(self, cases: Sequence[Case]) -> Rewriting:
        hparams = self.hparams
        rows = [rewriting_rows(self.subject, case, self.contexts, hparams.padding, hparams.targets) for case in cases]
        return Rewriting.of(self.subject, rows, len(self.contexts), self.learning_layer)

    def _learn(
        self, cases: Sequence[Case], rewriting: Rewriting, initial: Sequence[torch.Tensor], place: Place
    ) -> tuple[list[torch.Tensor], list[EditLog]]:
        """Learn delta for each module: ``initial`` has their unedited outputs v_0, (B, d) each.

        Returns:
            the deltas, (B, d) float32 each, and each case's log.

        Raises:
            StudyError: a case's loss is not finite before the first update.
        """
        hparams, count, device = self.hparams, len(cases), self.subject.device
        sizes = [start.float().norm(dim=-1) for start in initial]
        deltas = [torch.zeros_like(start, dtype=torch.float32, requires_grad=True) for start in initial]
        last_finite = [delta.detach().clone() for delta in deltas]
        optimizer = torch.optim.Adam(deltas, lr=hparams.lr)
        factor = torch.ones(count, device=device)
        active = torch.ones(count, dtype=torch.bool, device=device)
        updates = torch.zeros(count, dtype=torch.long, device=device)
        losses = torch.full((hparams.steps, count), math.nan, device=device)
        reference = None
        for iteration in range(hparams.steps):
            remaining = rewriting.cases
            by_row = remaining[rewriting.owner]
            nll, agreed, divergence, after_bare = rewriting.evaluate(
                place(rewriting, [delta[by_row] for delta in deltas]),
                None if reference is None else reference[remaining],
            )
            if reference is None:
                reference = after_bare
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
            updates -= lost.long()
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
            updates += active.long()
            if len(left) <= 0.75 * len(remaining):
                rewriting = rewriting.select(left)
        logs = []
        for case, steps, case_losses in zip(cases, updates.tolist(), losses.T.tolist()):
            counted = tuple(loss for loss in case_losses if not math.isnan(loss))
            if not counted:
                raise StudyError(f"case {case.case_id}: the loss of {self.name} is not finite; use float32")
            logs.append(EditLog(steps, counted))
        return [delta.detach() for delta in deltas], logs

    def _stops(
        self, total: torch.Tensor, agreed: torch.Tensor, kl: torch.Tensor, factor: torch.Tensor, cases: torch.Tensor
    ) -> torch.Tensor:
        """(B,) which of ``cases`` have learnt enough; may change their NLL ``factor`` (of all cases) for the next evaluation."""
        return total < self.hparams.loss_floor
