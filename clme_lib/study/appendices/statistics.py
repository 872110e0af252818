"""How much text MEMIT's statistics need: the measurement and its table."""

from __future__ import annotations

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
from ..tables import Table
from .selection import _percent


def statistics_table(measured: pd.DataFrame) -> Table:
    """MEMIT's writes under more and more statistics.

    Args:
        measured: what ``clme statistics`` writes (:func:`clme_lib.study.appendices.statistics.compare_statistics`).
    """
    rows = [
        {
            "Tokens": f"{one['tokens']:,}",
            "Layer": str(one["layer"]),
            "n": str(one["cases"]),
            "Cosine": f"{one['cosine']:.3f}",
            "Share": _percent(one["share"]),
            "of four times as many": _percent(one["share_of_four"]),
            "Difference": f"{100 * one['difference']:.1f} %",
        }
        for one in measured.to_dict("records")
    ]
    return Table(
        pd.DataFrame(rows),
        "The same keys under statistics of so many tokens, and of four times as many.",
        "tab-statistics",
    )


@torch.no_grad()
def compare_statistics(subject: Subject, file: Path, cases: int) -> pd.DataFrame:
    """What MEMIT would write with so many tokens' statistics, and with four times as many; written as CSV.

    One row a layer for ten tokens per dimension of the key, and one for forty (the default). Columns: ``tokens``; ``cosine`` (smallest over the cases) between the two write directions ``a``; ``share`` and ``share_of_four`` (mean) of
    the residual that a write puts at its own key, ``k^T a``; ``difference`` (largest) between the two, relative.

    Args:
        cases: of each data set's selection cases, the first so many.
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
            (one, share), (other, share_of_four) = (_direction(editor, layer, keys[layer]) for editor in (few, many))
            rows.append(
                {
                    "tokens": moment.header["tokens"],
                    "layer": layer,
                    "cases": len(chosen),
                    "cosine": torch.nn.functional.cosine_similarity(one, other).min().item(),
                    "share": share.mean().item(),
                    "share_of_four": share_of_four.mean().item(),
                    "difference": (share / share_of_four - 1).abs().max().item(),
                }
            )
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    return table


def _direction(editor: MEMIT, layer: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each key's write direction (B, d_f), and how much of a residual it writes at the key itself (B,)."""
    direction = editor.direction(layer, keys)
    return direction, (direction * keys).sum(dim=-1)
