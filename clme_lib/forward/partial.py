"""The partial forward pass: start at the edited layer, from cached constants.

While an edit at block ``l`` is optimised, three things never change: everything below the output of ``W_l``;
the residual stream that output is added to; and, attention being causal, the keys and values of blocks above ``l``
at columns before the first touched one. :class:`PartialForward` computes them in one ordinary forward pass and
then runs only blocks ``l+1 .. L-1`` on the touched columns. Logits are computed on label columns only, a few at a time,
together with the loss's gradient (:class:`_LabelLoss`).

Layout of a batch. Rows are aligned at their *start column* (the first touched one): what comes before is padded
on the left, what follows on the right::

    row 0   . . p p p | s t t .          prefix (P columns)  |  tail (S columns), tail column 0 = start
    row 1   p p p p p | s t t t

Gradients flow through the tail only. All quantities equal the plain forward pass up to float rounding; the tests hold
them to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..subjects.subject import Subject
from ..support.batching import of_like_length
from ..support.errors import StudyError
from .label_losses import Places, _LabelLoss
from .prefix_attention import Prefix, _attending_to
from .tokens import Row

# of rows that are read together, the longest over the shortest
_LONGEST_READ = 1.2


def longest_above(subject: Subject, layer: int) -> float:
    """Of rows that are optimised together, the longest over the shortest: padding is a third of the work at most.

    Only the blocks above W_l work on padding; the head, a large part of a small model, works on labels alone.
    """
    above = sum(p.numel() for block in subject.blocks[layer + 1 :] for p in block.parameters())
    return 1 + 0.5 * (1 + subject.model.lm_head.weight.numel() / above) if above else math.inf


class PartialForward:
    """Cached constants of one batch and the forward pass above the edited layer.

    Args:
        subject: the unedited model.
        rows: what each row reads and is asked for (B rows), such as tokenised prompts and targets.
        layer: the edited block l.
        from_lookup: True when only columns from the lookup token on are touched (GRACE and the ROME family);
            False when every column is (an update of ``W_l`` itself).
        residuals: with ``from_lookup=False``, each row's ``residual`` (its length, d) when it is known already: then
            nothing below the edited MLP is computed.

    Attributes:
        keys: (B, S, d_f) inputs of ``W_l`` at the tail columns.
        outputs: (B, S, d) unedited outputs of ``W_l`` at the tail columns.
        residual: (B, S, d) the stream that output is added to.
        attention: (B, S, d) what the block's attention added to it; None when ``residuals`` were given.
        touched: (B,) tail column of the lookup token.
        labels: (N,) label ids of all rows, row after row.
        label_rows, label_columns: (N,) the row and tail column that predict each label.
        label_counts: (B,) labels a row.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[Row],
        layer: int,
        *,
        from_lookup: bool,
        residuals: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.subject = subject
        self.layer = layer
        starts = [min(row.lookup, row.first_label) if from_lookup else 0 for row in rows]
        # nothing after the last label's column matters
        ends = [row.first_label + len(row.target_ids) for row in rows]
        prefix = max(starts)
        width = prefix + max(end - start for start, end in zip(starts, ends))
        device = subject.device
        # pads repeat EOS like everywhere else; the mask, not the id, says what is padding
        ids = torch.full((len(rows), width), subject.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (row, start, end) in enumerate(zip(rows, starts, ends)):
            first = prefix - start
            ids[n, first : first + end] = torch.tensor(row.inputs[:end])
            mask[n, first + row.pads : first + end] = True
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0).to(device)
        ids, mask = ids.to(device), mask.to(device)

        self.touched = torch.tensor([row.lookup - start for row, start in zip(rows, starts)], device=device)
        columns = [row.first_label - start + t for row, start in zip(rows, starts) for t in range(len(row.target_ids))]
        self.labels = torch.tensor([token for row in rows for token in row.target_ids], device=device)
        self.label_rows = torch.tensor([n for n, row in enumerate(rows) for _ in row.target_ids], device=device)
        self.label_columns = torch.tensor(columns, device=device)
        self.label_counts = torch.tensor([len(row.target_ids) for row in rows], device=device)

        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # a padding column attends to itself alone, so that no softmax is empty
        own = torch.eye(width, dtype=torch.bool, device=device)
        attended = ((causal & mask[:, None, :]) | own)[:, None]
        if residuals is None:
            self._prefill(ids, attended, positions, starts, ends)
        else:
            self._start_from(residuals)
        self._mask = attended[:, :, prefix:]
        self._positions = positions[:, prefix:]
        self._rotary = subject.decoder.rotary_emb(self.outputs, position_ids=self._positions)

    @torch.no_grad()
    def _prefill(
        self,
        ids: torch.Tensor,
        attended: torch.Tensor,
        positions: torch.Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Ordinary forward passes; keep the constants of layer l and the K/V of the blocks above.

        Rows of like length go together: they are read through all blocks, so padding costs more here than in a step.
        """
        (count, width), prefix = ids.shape, max(starts)
        above = range(self.layer + 1, len(self.subject.blocks)) if prefix else ()
        tails: dict[str, torch.Tensor] = {}
        cached: Prefix = {}
        for group in of_like_length(ends, _LONGEST_READ):
            first = prefix - max(starts[n] for n in group)
            last = prefix + max(ends[n] - starts[n] for n in group)
            rows, columns = torch.tensor(group, device=ids.device), slice(first, last)
            inputs = ids[rows, columns], attended[rows, :, columns, columns], positions[rows, columns]
            read, cache = self._read(*inputs, use_cache=bool(prefix))
            for name, states in read.items():
                whole = tails.setdefault(name, states.new_zeros(count, width - prefix, states.shape[-1]))
                whole[rows, : last - prefix] = states[:, prefix - first :]
            for n in above:
                pair = cache.layers[n].keys, cache.layers[n].values
                if n not in cached:
                    _, heads, _, size = pair[0].shape
                    cached[n] = tuple(one.new_zeros(count, heads, prefix, size) for one in pair)
                for whole, one in zip(cached[n], pair):
                    whole[rows, :, first:] = one[:, :, : prefix - first]
        self.keys, self.outputs, self.residual = tails["keys"], tails["outputs"], tails["residual"]
        self.attention: torch.Tensor | None = tails["attention"]
        self._before = cached

    def _read(self, ids: torch.Tensor, attended: torch.Tensor, positions: torch.Tensor, use_cache: bool):
        """What layer l reads and writes in one ordinary forward pass, by name, and the pass's K/V."""
        block = self.subject.blocks[self.layer]
        read: dict[str, torch.Tensor] = {}

        def keep_attention(_module, _args, output):
            read["attention"] = output

        def keep_residual(_module, args):
            read["residual"] = args[0]

        def keep_mlp(_module, args, output):
            read["keys"], read["outputs"] = args[0], output

        hooks = [
            block.self_attn.o_proj.register_forward_hook(keep_attention),
            block.post_attention_layernorm.register_forward_pre_hook(keep_residual),
            block.mlp.down_proj.register_forward_hook(keep_mlp),
        ]
        try:
            done = self.subject.decoder(
                input_ids=ids, attention_mask=attended, position_ids=positions, use_cache=use_cache
            )
        finally:
            for hook in hooks:
                hook.remove()
        return read, done.past_key_values

    @torch.no_grad()
    def _start_from(self, residuals: Sequence[torch.Tensor]) -> None:
        block = self.subject.blocks[self.layer]
        self.residual = torch.nn.utils.rnn.pad_sequence(list(residuals), batch_first=True)
        kept = []
        handle = block.mlp.down_proj.register_forward_hook(lambda _module, args, _output: kept.append(args[0]))
        try:
            self.outputs = block.mlp(block.post_attention_layernorm(self.residual))
        finally:
            handle.remove()
        (self.keys,), self.attention, self._before = kept, None, {}

    def select(self, rows: torch.Tensor) -> PartialForward:
        """The same for some of the rows (indices in ascending order): those of cases that are still being optimised."""
        chosen = copy.copy(self)
        for name in ("keys", "outputs", "residual", "attention", "touched", "label_counts", "_positions", "_mask"):
            if getattr(self, name) is not None:
                setattr(chosen, name, getattr(self, name)[rows])
        chosen._rotary = tuple(part[rows] if len(part) > 1 else part for part in self._rotary)
        chosen._before = {n: (keys[rows], values[rows]) for n, (keys, values) in self._before.items()}
        place = torch.full((len(self.touched),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        kept = place[self.label_rows] >= 0
        chosen.labels, chosen.label_columns = self.labels[kept], self.label_columns[kept]
        chosen.label_rows = place[self.label_rows[kept]]
        return chosen

    def with_touched(self, changed: torch.Tensor) -> torch.Tensor:
        """Outputs (B, S, d) of ``W_l`` in which ``changed`` (B, d) stands at the touched columns."""
        rows = torch.arange(len(changed), device=changed.device)
        return self.outputs.index_put((rows, self.touched), changed.to(self.outputs.dtype))

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the target's tokens, one a row (B,), with ``outputs`` in place of ``W_l``'s.

        Args:
            outputs: (B, S, d) what ``W_l`` gives at the tail columns under the edit.
        """
        return self.row_means(self.label_losses(self.states(outputs))[0])

    def states(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the head reads at the label columns, (N, d), with ``outputs`` in place of ``W_l``'s."""
        if outputs.shape != self.outputs.shape:
            raise StudyError(f"outputs have shape {tuple(outputs.shape)}, expected {tuple(self.outputs.shape)}")
        hidden = self.residual + outputs.to(self.residual.dtype)
        for block in self.subject.blocks[self.layer + 1 :]:
            hidden = self.through(block, hidden)
        return self.subject.decoder.norm(hidden[self.label_rows, self.label_columns])

    def through(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """The stream (B, S, d) at the tail columns after a block above the edited layer, from that before it."""
        with _attending_to(self._before, self.subject.model.config):
            after = block(
                hidden,
                attention_mask=self._mask,
                position_ids=self._positions,
                position_embeddings=self._rotary,
            )
        return after[0] if isinstance(after, tuple) else after  # older transformers return a tuple

    def label_losses(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each label (N,), and whether the label is the arg-max (N,), from :meth:`states`."""
        nowhere = Places((), self.labels.new_zeros(0))
        return _LabelLoss.apply(states, self.subject.model.lm_head, self.labels, nowhere, None)[:2]

    def compared_losses(
        self, states: torch.Tensor, compared: Places, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`label_losses`, and how far some next-token distributions have moved.

        Args:
            compared: C labels, before which the distribution is looked at.
            reference: (C, vocabulary) log-probabilities that it is compared with; None for itself.

        Returns:
            losses (N,); arg-max hits (N,); ``KL(p || p_reference)`` in nats (C,); log-probabilities (C, vocabulary), without gradient.
        """
        return _LabelLoss.apply(states, self.subject.model.lm_head, self.labels, compared, reference)

    def row_means(self, per_label: torch.Tensor) -> torch.Tensor:
        """Mean over each row's labels, (B,)."""
        summed = torch.zeros(len(self.label_counts), device=per_label.device, dtype=per_label.dtype)
        return summed.index_add(0, self.label_rows, per_label) / self.label_counts
