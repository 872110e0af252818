"""The partial forward pass: start at the edited layer, from cached constants (design idea 2).

While an edit at block ``l`` is optimised, three things never change: everything below the output of ``W_l``;
the residual stream that output is added to; and, attention being causal, the keys and values of blocks above ``l``
at columns before the first touched one. :class:`PartialForward` computes them in one ordinary forward pass and
then runs only blocks ``l+1 .. L-1`` on the touched columns. Logits are computed on label columns only.

Layout of a batch. Rows are aligned at their *start column* (the first touched one): what comes before is padded
on the left, what follows on the right::

    row 0   . . p p p | s t t .          prefix (P columns)  |  tail (S columns), tail column 0 = start
    row 1   p p p p p | s t t t

Gradients flow through the tail only. All quantities equal the plain forward pass up to float rounding; the tests hold
them to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .errors import StudyError
from .prompts import Tokenized
from .subjects import Subject


class _PrefixCache:
    """Keys and values of the prefix, one pair a block. ``update`` joins without storing, so every step starts afresh."""

    def __init__(self) -> None:
        self.prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__):
        before_keys, before_values = self.prefix[layer]
        return torch.cat([before_keys, keys], dim=2), torch.cat([before_values, values], dim=2)


class PartialForward:
    """Cached constants of one batch and the forward pass above the edited layer.

    Args:
        subject: the unedited model.
        sequences: tokenised prompt and target of each row (B rows).
        layer: the edited block l.
        from_lookup: True when only columns from the lookup token on are touched (GRACE and the ROME family);
            False when every column is (an update of ``W_l`` itself).

    Attributes:
        keys: (B, S, d_f) inputs of ``W_l`` at the tail columns.
        outputs: (B, S, d) unedited outputs of ``W_l`` at the tail columns.
        labels: (N,) label ids of all rows, row after row.
        label_rows, label_columns: (N,) the row and tail column that predict each label.
        label_counts: (B,) labels a row.
    """

    def __init__(self, subject: Subject, sequences: Sequence[Tokenized], layer: int, *, from_lookup: bool) -> None:
        self.subject = subject
        self.layer = layer
        starts = [s.lookup if from_lookup else 0 for s in sequences]
        prefix = max(starts)
        tails = [len(s.inputs) - start for s, start in zip(sequences, starts)]
        width = prefix + max(tails)
        device = subject.device
        # pads repeat EOS like everywhere else; the mask, not the id, says what is padding
        ids = torch.full((len(sequences), width), subject.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, (sequence, start) in enumerate(zip(sequences, starts)):
            first = prefix - start
            ids[row, first : first + len(sequence.inputs)] = torch.tensor(sequence.inputs)
            mask[row, first : first + len(sequence.inputs)] = True
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0).to(device)
        ids, mask = ids.to(device), mask.to(device)

        rows = [row for row, s in enumerate(sequences) for _ in s.target_ids]
        columns = [s.lookup - start + t for s, start in zip(sequences, starts) for t in range(len(s.target_ids))]
        self.labels = torch.tensor([token for s in sequences for token in s.target_ids], device=device)
        self.label_rows = torch.tensor(rows, device=device)
        self.label_columns = torch.tensor(columns, device=device)
        self.label_counts = torch.tensor([len(s.target_ids) for s in sequences], device=device)

        self._prefill(ids, mask, positions, prefix)
        tail_positions = positions[:, prefix:]
        self._positions = tail_positions
        self._rotary = subject.decoder.rotary_emb(self.outputs, position_ids=tail_positions)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()[prefix:]
        # a padded tail column attends to itself alone, so that no softmax is empty
        own = torch.eye(width, dtype=torch.bool, device=device)[prefix:]
        self._mask = ((causal & mask[:, None, :]) | own)[:, None]

    @torch.no_grad()
    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, prefix: int) -> None:
        """One ordinary forward pass; keep the constants of layer l and the K/V of the blocks above."""
        block = self.subject.blocks[self.layer]
        kept: dict[str, torch.Tensor] = {}

        def keep_residual(_module, args):
            kept["residual"] = args[0][:, prefix:]

        def keep_mlp(_module, args, output):
            kept["keys"], kept["outputs"] = args[0][:, prefix:], output[:, prefix:]

        hooks = [
            block.post_attention_layernorm.register_forward_pre_hook(keep_residual),
            block.mlp.down_proj.register_forward_hook(keep_mlp),
        ]
        try:
            done = self.subject.decoder(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=prefix > 0
            )
        finally:
            for hook in hooks:
                hook.remove()
        self.keys, self.outputs, self._residual = kept["keys"], kept["outputs"], kept["residual"]
        self._cache = None
        if prefix:
            self._cache = _PrefixCache()
            for layer in range(self.layer + 1, len(self.subject.blocks)):
                cached = done.past_key_values.layers[layer]
                self._cache.prefix[layer] = (cached.keys[:, :, :prefix], cached.values[:, :, :prefix])

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the target's tokens, one a row (B,), with ``outputs`` in place of ``W_l``'s.

        Args:
            outputs: (B, S, d) what ``W_l`` gives at the tail columns under the edit.
        """
        logits = self.label_logits(outputs)
        per_label = F.cross_entropy(logits, self.labels, reduction="none")
        summed = torch.zeros(len(self.label_counts), device=logits.device, dtype=per_label.dtype)
        return summed.index_add(0, self.label_rows, per_label) / self.label_counts

    def label_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Float32 logits (N, vocabulary) at the label columns, with ``outputs`` in place of ``W_l``'s."""
        if outputs.shape != self.outputs.shape:
            raise StudyError(f"outputs have shape {tuple(outputs.shape)}, expected {tuple(self.outputs.shape)}")
        hidden = self._residual + outputs.to(self._residual.dtype)
        for block in self.subject.blocks[self.layer + 1 :]:
            hidden = block(
                hidden,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                position_embeddings=self._rotary,
            )
            if isinstance(hidden, tuple):  # older transformers return a tuple
                hidden = hidden[0]
        return self.subject.logits(hidden[self.label_rows, self.label_columns])
