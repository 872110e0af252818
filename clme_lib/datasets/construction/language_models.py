"""Encoders and masked language models from the Hub: Arctic-embed for CNLE's neighbours, CodeBERT for CSNE's neighbours and names.

Any Hugging Face encoder or folder works. Vectors are pooled as the model's own card says (``1_Pooling/config.json``), else by the mean.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ...support.errors import StudyError, first_line
from ...support.journal import write_text
from ...support.reading import read_json
from ..renaming import rename
from .rephrasing import FIELDS, renamed
from .stages import Step

_MOST_TOKENS = 512
_ROWS = 64
_FEWEST_LETTERS = 2


class TextEncoder:
    """Unit vectors of texts by a Hugging Face encoder; a :data:`~clme_lib.datasets.neighbours.Embedder`."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        self.tokenizer, self.model = _load(name, "AutoModel", self.device, "pad_token")
        if "attention_mask" not in inspect.signature(self.model.forward).parameters:
            raise StudyError(
                f"{name!r} is a {type(self.model).__name__}, which takes no attention_mask, so a text's vector would depend on the texts "
                "in its batch; choose another encoder"
            )
        self.pooling = card_pooling(name)
        self.settings = {"encoder": name, "pooling": self.pooling}  # for the stage's manifest

    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, d) unit vectors, with gradients if these are enabled."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=_most_tokens(self.tokenizer, self.model),
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled.float(), dim=-1)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        matrix = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for first in tqdm(range(0, len(order), _ROWS), desc=f"encode by {self.name}", unit="batch"):
            part = order[first : first + _ROWS]
            matrix[part] = self.vectors([texts[n] for n in part]).cpu().numpy()
        return matrix


def card_pooling(name: str) -> Literal["cls", "mean"]:
    """How the model's card pools: its ``1_Pooling/config.json``, or the mean where it has none."""
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "1_Pooling/config.json")
    except OSError:  # no such file, or no network, which loading the model would have reported
        return "mean"
    card = read_json(str(file))
    if not isinstance(card, dict):
        raise StudyError(f"{file}: expected an object that says how to pool; remove the file to use the mean")
    return "cls" if card.get("pooling_mode_cls_token") else "mean"


def fine_tune(
    encoder: TextEncoder,
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Fine-tune an encoder on code search (each description against its function, with the rest of the batch as negatives); returns the losses.

    The paper's neighbours of CSNE come from a CodeBERT fine-tuned on this task. The encoder is saved to ``folder`` as safetensors, with its pooling.
    """
    if len(pairs) < 2:
        raise StudyError("fine-tuning needs at least two pairs of description and function")
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=lr)
    encoder.model.train()
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(pairs), generator=draw).tolist()
        starts = range(0, len(order) - 1, batch)
        for first in tqdm(starts, desc=f"code search, epoch {epoch + 1}", unit="batch"):
            part = [pairs[n] for n in order[first : first + batch]]
            docs, codes = (encoder.vectors([pair[side] for pair in part]) for side in (0, 1))
            loss = torch.nn.functional.cross_entropy(
                20 * docs @ codes.T, torch.arange(len(part), device=encoder.device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    encoder.model.eval()
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    card = {"pooling_mode_cls_token": encoder.pooling == "cls"}
    write_text(folder / "1_Pooling" / "config.json", json.dumps(card) + "\n")
    return losses


class MaskedNames:
    """New names from a masked language model's predictions in context (in the spirit of ALERT; the paper: CodeBERT).

    All occurrences of a name are masked, one token each; tokens are ranked by their log-probability summed over the occurrences. The new name is
    the first that is an identifier, is not used in the function and is not a keyword.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.tokenizer, self.model = _load(name, "AutoModelForMaskedLM", self.device, "mask_token")
        # gives each function its ``rephrased`` code
        self.step = Step(
            {"names": name},
            lambda rows: (renamed(row, partial(self._predicted, row["code"])) for row in rows),
            fields=FIELDS,
        )

    @torch.no_grad()
    def _predicted(self, code: str, name: str, taken: set[str]) -> str | None:
        masked = rename(code, {name: self.tokenizer.mask_token})
        most = _most_tokens(self.tokenizer, self.model)
        batch = self.tokenizer(masked, truncation=True, max_length=most, return_tensors="pt").to(self.device)
        masks = (batch["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        if not len(masks):  # beyond the model's maximum length
            return None
        scores = self.model(**batch).logits[0, masks].float().log_softmax(-1).sum(0)
        fewest = min(len(name), _FEWEST_LETTERS)
        for token in scores.topk(min(200, len(scores))).indices.tolist():
            word = self.tokenizer.decode([token]).strip()
            is_name = word.isidentifier() and word.isascii() and not word.startswith("_")
            if is_name and word not in taken and len(word) >= fewest:
                return word
        return None


def _load(name: str, kind: str, device: torch.device, token: str) -> tuple[Any, Any]:
    """Tokenizer (which must have the special ``token``) and model."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = getattr(transformers, kind).from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the libraries' errors have no common type
        raise StudyError(
            f"{name!r} could not be loaded as an encoder: {first_line(error)}. Weights must be safetensors, from the Hub or a folder"
        ) from error
    if getattr(tokenizer, token) is None:
        raise StudyError(f"{name!r}: its tokenizer has no {token.replace('_', ' ')}: choose another encoder")
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise StudyError(
            f"{name!r}: its tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}: use a tokenizer and a model that belong together"
        )
    # transformers draws missing weights at random; a pooler's output is not used here
    if missing := sorted(key for key in loaded["missing_keys"] if "pooler" not in key):
        raise StudyError(
            f"{name!r}: its weights lack {missing[0]} ({len(missing)} tensors missing): not a complete {type(model).__name__}; fetch it again"
        )
    return tokenizer, model.eval().to(device)


def _most_tokens(tokenizer: Any, model: Any) -> int:
    return min(_MOST_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", _MOST_TOKENS))
