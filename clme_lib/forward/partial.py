"""The partial forward pass: start at the edited layer, from cached constants.

While an edit at block ``l`` is optimised, three things never change: everything below the output of ``W_l``;
the residual stream to which this output is added; and, because attention is causal, the keys and values of blocks above ``l``
at columns before the first touched column. :class:`PartialForward` computes them in one ordinary forward pass and
then runs only blocks ``l+1 .. L-1`` on the touched columns. Logits are computed at label columns only, a few at a time.
The tests check that the result equals the plain forward pass's up to float rounding.

Rows are aligned at their *start column* (the first touched column): the columns before it are padded on the left, the rest on
the right. Gradients flow through the tail only::

    row 0   . . p p p | s t t .          prefix (P columns)  |  tail (S columns), tail column 0 = start
    row 1   p p p p p | s t t t
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..edits.base import announced
from ..subjects.subject import Subject
from ..support.batching import of_like_length
from ..support.errors import StudyError
from .label_losses import LabelIndices, label_losses
from .padded import Padded
from .prefix_attention import Prefix, _attending_to
from .recording import recorded
from .tokens import TokenRow

# Rows that are read together differ in length by at most this factor.
_MAX_READ_RATIO = 1.2


def longest_above(subject: Subject, layer: int) -> float:
    """Largest ratio of lengths of rows that are optimised together at which padding is at most a third of the work.

    Only the blocks above W_l process padding; the head, a large part of a small model, processes labels alone.
    """
    above = sum(p.numel() for block in subject.blocks[layer + 1 :] for p in block.parameters())
    return 1 + 0.5 * (1 + subject.model.lm_head.weight.numel() / above) if above else math.inf


class PartialForward:
    """Cached constants of one batch of B rows and the forward pass above the edited layer.

    Args:
        from_lookup: True if only columns from the lookup token on are touched (GRACE and the ROME family);
            False if every column is touched (an update of ``W_l`` itself).
        residuals: with ``from_lookup=False``, each row's ``residual`` (its length, d) if it is already known; then
            nothing below the edited MLP is computed.

    Attributes:
        keys, outputs: (B, S, d_f) inputs and (B, S, d) outputs of ``W_l`` at the tail columns.
        residual: (B, S, d) the stream to which the outputs are added.
        attention: (B, S, d) what the block's attention added to this stream; None if ``residuals`` were given.
        touched: (B,) tail column of the lookup token; label_counts: (B,) labels per row.
        labels: (N,) label ids of all rows, row after row.
        label_rows, label_columns: (N,) the row and tail column that predict each label.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[TokenRow],
        layer: int,
        *,
        from_lookup: bool,
        residuals: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.subject, self.layer = subject, layer
        # A codebook above whose query is the mean over a prompt must see the whole prompt.
        whole = not from_lookup or any(book.layer > layer and book.asked_with == "mean" for book in subject.codebooks)
        starts = [0 if whole else min(row.lookup, row.first_label) for row in rows]
        # Tokens after the last label's column are never used.
        ends = [row.first_label + len(row.target_ids) for row in rows]
        prefix = max(starts)
        width = prefix + max(end - start for start, end in zip(starts, ends))
        # A row's own padding is replaced by the batch's.
        inputs = [row.inputs[row.pads : end] for row, end in zip(rows, ends)]
        firsts = [prefix - start + row.pads for row, start in zip(rows, starts)]
        lookups = [prefix - start + row.lookup for row, start in zip(rows, starts)]
        padded = Padded.of(subject, inputs, firsts, width, lookups)
        self._tail = padded.part(columns=slice(prefix, None))
        self.touched = self._tail.layout.prompt_end
        labels = [
            (token, n, row.first_label - starts[n] + place)
            for n, row in enumerate(rows)
            for place, token in enumerate(row.target_ids)
        ]
        self.labels, self.label_rows, self.label_columns = torch.tensor(labels, device=subject.device).T.contiguous()
        self.label_counts = torch.tensor([len(row.target_ids) for row in rows], device=subject.device)
        self.attention: torch.Tensor | None = None
        self._before: Prefix = {}
        if residuals is None:
            self._prefill(padded, starts, ends)
            return
        with torch.no_grad(), recorded(subject.blocks[layer], "keys") as read:
            self.residual = torch.nn.utils.rnn.pad_sequence(list(residuals), batch_first=True)
            self.outputs = self.mlp(self.residual)
        self.keys = read["keys"]

    @torch.no_grad()
    def _prefill(self, padded: Padded, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Run ordinary forward passes; keep the constants of layer l, and the keys and values of the blocks above.

        Rows of similar length are read together: they pass through all blocks, so padding costs more here than in a step.
        """
        (count, width), prefix = padded.ids.shape, max(starts)
        above = range(self.layer + 1, len(self.subject.blocks)) if prefix else ()
        tails: dict[str, torch.Tensor] = {}
        for group in of_like_length(ends, ratio=_MAX_READ_RATIO):
            first = prefix - max(starts[n] for n in group)
            last = prefix + max(ends[n] - starts[n] for n in group)
            rows, columns = torch.tensor(group, device=padded.ids.device), slice(first, last)
            part, block = padded.part(rows, columns, columns), self.subject.blocks[self.layer]
            with announced(part.layout), recorded(block, "attention", "residual", "keys", "outputs") as read:
                cache = self.subject.decoder(
                    input_ids=part.ids,
                    attention_mask=part.attended,
                    position_ids=part.positions,
                    use_cache=bool(prefix),
                ).past_key_values
            for name, states in read.items():
                whole = tails.setdefault(name, states.new_zeros(count, width - prefix, states.shape[-1]))
                whole[rows, : last - prefix] = states[:, prefix - first :]
            for n in above:
                pair = cache.layers[n].keys, cache.layers[n].values
                if n not in self._before:
                    _, heads, _, size = pair[0].shape
                    self._before[n] = tuple(states.new_zeros(count, heads, prefix, size) for states in pair)
                for whole, states in zip(self._before[n], pair):
                    whole[rows, :, first:] = states[:, :, : prefix - first]
        self.keys, self.outputs, self.residual = tails["keys"], tails["outputs"], tails["residual"]
        self.attention = tails["attention"]

    def mlp(self, stream: torch.Tensor) -> torch.Tensor:
        """The output of layer l's MLP, (B, S, d) or (B, d), for a stream at the tail columns or at one column per row."""
        block = self.subject.blocks[self.layer]
        with announced(self._tail.layout):
            return block.mlp(block.post_attention_layernorm(stream))

    def select(self, rows: torch.Tensor) -> PartialForward:
        """The partial forward pass of some of the rows (indices in ascending order), e.g. of cases still being optimised."""
        chosen = copy.copy(self)
        for name in ("keys", "outputs", "residual", "attention", "touched", "label_counts"):
            if getattr(self, name) is not None:
                setattr(chosen, name, getattr(self, name)[rows])
        chosen._tail = self._tail.part(rows)
        chosen._before = {n: (keys[rows], values[rows]) for n, (keys, values) in self._before.items()}
        new_index = torch.full((len(self.touched),), -1, device=rows.device)
        new_index[rows] = torch.arange(len(rows), device=rows.device)
        kept = new_index[self.label_rows] >= 0
        chosen.labels, chosen.label_columns = self.labels[kept], self.label_columns[kept]
        chosen.label_rows = new_index[self.label_rows[kept]]
        return chosen

    def with_touched(self, changed: torch.Tensor) -> torch.Tensor:
        """Outputs (B, S, d) of ``W_l``, replaced by ``changed`` (B, d) at each row's lookup token."""
        rows = torch.arange(len(changed), device=changed.device)
        return self.outputs.index_put((rows, self.touched), changed.to(self.outputs.dtype))

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        """Each row's mean cross-entropy over its target's tokens (B,), with ``outputs`` (B, S, d) in place of ``W_l``'s."""
        return self.row_means(self.label_losses(self.states(outputs))[0])

    def states(self, outputs: torch.Tensor) -> torch.Tensor:
        """The head's inputs at the label columns, (N, d), with ``outputs`` (B, S, d) in place of ``W_l``'s; StudyError for another shape."""
        if outputs.shape != self.outputs.shape:
            raise StudyError(f"outputs have shape {tuple(outputs.shape)}, expected {tuple(self.outputs.shape)}")
        hidden = self.residual + outputs.to(self.residual.dtype)
        for block in self.subject.blocks[self.layer + 1 :]:
            hidden = self.through(block, hidden)
        return self.subject.decoder.norm(hidden[self.label_rows, self.label_columns])

    def through(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """The stream (B, S, d) at the tail columns after a block above the edited layer, given the stream before the block."""
        with _attending_to(self._before, self.subject.model.config):
            return self._tail.through(block, hidden)

    def label_losses(
        self, states: torch.Tensor, compared: LabelIndices | None = None, reference: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each label's loss, from :meth:`states`, and the divergence of the distributions that predict the ``compared`` labels (C)
        from the log-probabilities ``reference`` (C, vocabulary), or from themselves.

        Returns:
            cross-entropies (N,); whether each label is the arg-max (N,); ``KL(p || p_reference)`` in nats (C,); log-probabilities
            (C, vocabulary), without gradient.
        """
        compared = compared or LabelIndices((), self.labels[:0])
        return label_losses(states, self.subject.model.lm_head, self.labels, compared, reference)

    def row_means(self, per_label: torch.Tensor) -> torch.Tensor:
        """Mean over each row's labels, (B,)."""
        summed = torch.zeros(len(self.label_counts), device=per_label.device, dtype=per_label.dtype)
        return summed.index_add(0, self.label_rows, per_label) / self.label_counts
