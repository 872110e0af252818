"""How much text MEMIT's statistics need: the measurement and its table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import selection_cases
from ...editors.locate_then_edit.second_moments import LEAST_PER_DIMENSION, TOKENS_PER_DIMENSION
from ...editors.memit import MEMIT
from ...editors.registry import load_editor
from ...forward.blockwise import Blockwise
from ...forward.tokens import encode
from ...subjects.subject import Subject
from ..tables import percent, table, write_csv

COLUMNS = ["tokens", "layer", "cases", "cosine", "share", "share_of_four", "difference"]  # all are numbers


@table
def statistics_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """MEMIT's writes by amount of text, from the file that ``clme measure statistics`` writes (:func:`compare_statistics`)."""
    for row in measured.itertuples():
        yield {
            "Tokens": f"{row.tokens:,}",
            "Layer": str(row.layer),
            "n": str(row.cases),
            "Cosine": f"{row.cosine:.3f}",
            "Share": percent(row.share),
            "of four times as many": percent(row.share_of_four),
            "Difference": f"{percent(row.difference)}%",
        }


@torch.no_grad()
def compare_statistics(subject: Subject, file: Path, cases: int = 30) -> pd.DataFrame:
    """Compare what MEMIT would write with statistics of a number of tokens and of four times as many; written as CSV.

    Each layer has a row for ten tokens per dimension of the key, and a row for forty (the default). Columns: ``tokens``; ``cosine``
    (smallest over the cases) of the two write directions ``a``; ``share`` and ``share_of_four``, the share of the residual that a write
    puts at its own key, ``k^T a`` (means); ``difference``, their largest relative difference. ``cases``: selection cases per dataset.
    """
    chosen = [case for dataset in PAPER_DATASET_NAMES for case in selection_cases(dataset, cases)[0]]
    walk = Blockwise(subject, [encode(subject.tokenizer, case.prompt) for case in chosen])
    hidden, keys = walk.embedded, []
    for layer in range(len(subject.blocks)):
        here = walk.block(layer, hidden)
        hidden = here.hidden
        keys.append(here.keys[:, -1].float())
    rows = []
    for each in (LEAST_PER_DIMENSION, TOKENS_PER_DIMENSION):
        few, many = (load_editor("memit", subject, corpus_tokens=times * each * subject.inner_size) for times in (1, 4))
        assert isinstance(few, MEMIT) and isinstance(many, MEMIT)
        for layer, moment in few.moments.items():
            directions, shares = zip(*(_direction(editor, layer, keys[layer]) for editor in (few, many)))
            rows.append(
                {
                    "tokens": moment.header["tokens"],
                    "layer": layer,
                    "cases": len(chosen),
                    "cosine": torch.nn.functional.cosine_similarity(*directions).min().item(),
                    "share": shares[0].mean().item(),
                    "share_of_four": shares[1].mean().item(),
                    "difference": (shares[0] / shares[1] - 1).abs().max().item(),
                }
            )
    return write_csv(pd.DataFrame(rows), file)


def _direction(editor: MEMIT, layer: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each key's write direction (B, d_f), and the share of a residual that it writes at the key itself (B,)."""
    direction = editor.directions(layer, keys)
    return direction, (direction * keys).sum(dim=-1)
