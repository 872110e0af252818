"""What edits made one after another do to each other (not in the paper): how large their sum grows, how much of an edit arrives at the
other edits' prompts, what later edits add there, and how far a codebook's radii shrink.

With ``D_i`` the i-th update of a layer's weight and ``k_j`` the unedited model's input of that weight at prompt j's lookup token,
``D_i k_j`` is what edit i adds at prompt j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..datasets.base import dataset_title
from ..datasets.cases import Case
from ..datasets.paper import CNLE
from ..datasets.registry import selection_cases
from ..editors.base import Editor
from ..editors.registry import load_editor
from ..edits.base import Edit
from ..subjects.subject import Subject
from ..support.journal import journal_beside
from ..support.seeds import seed_of
from .protocols import milestones
from .tables import editor_name, in_order, table, write_csv

EDITORS = ("ft-l", "rome", "emmet", "memit", "memit-accumulated", "alphaedit", "grace-tuned", "locft-bf", "ultraedit")
# measured for each number of edits; NaN where it does not apply
MEASURED = {
    "norm": "Norm",
    "reach": "Arrives at others",
    "later": "Later edits add",
    "radius": "Radius",
    "key": "Key",
}


@table
def interference_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What edits do to each other, from the file that ``clme measure interference`` writes; ratios, and the square of a key's norm."""
    for editor in in_order(measured["editor"].unique()):
        for (dataset, edits), rows in measured[measured["editor"] == editor].groupby(["dataset", "edits"], sort=False):
            (row,) = rows.to_dict("records")
            shown = {title: "–" if pd.isna(row[name]) else f"{row[name]:.3g}" for name, title in MEASURED.items()}
            yield {"Data": dataset_title(str(dataset)), "Editor": editor_name(editor), "Edits": str(edits), **shown}


def measure_interference(
    subject: Subject,
    file: Path,
    editors: Sequence[str] = EDITORS,
    cases: int | None = None,
    datasets: Sequence[str] = (CNLE.name,),
) -> pd.DataFrame:
    """Edit selection cases one after another; written as CSV, a row for each editor and number of edits (``MEASURED``). A trained editor
    learns from the other cases.

    Args:
        file: the table to write; finished editors are kept beside it, so that an interrupted command resumes.
        cases: use this many of each dataset's selection cases, from the first (None: all 30).
    """
    rows = []
    with journal_beside(file, lambda row: (row["identity"],)) as done:
        for dataset in datasets:
            chosen, others = selection_cases(dataset, cases)
            for name in editors:
                editor = load_editor(name, subject)
                hashes = [case.sha256 for case in chosen]
                row = {"identity": seed_of(subject.fingerprint, subject.dtype_name, name, editor.hparams, *hashes)}
                if row not in done:
                    if editor.needs_training:
                        editor.fit(others, edited=chosen)
                    edits = _one_after_another(editor, chosen, f"{dataset} {name}")
                    done.append({**row, "measured": list(_measured(editor, chosen, edits))})
                rows += [{"editor": name, "dataset": dataset, **measured} for measured in done[row]["measured"]]
        return write_csv(pd.DataFrame(rows, columns=["editor", "dataset", "edits", *MEASURED]), file, digits=6)


def _one_after_another(editor: Editor, cases: Sequence[Case], what: str) -> list[Edit]:
    edits: list[Edit] = []
    for case in tqdm(cases, desc=what, unit="edit"):
        held = editor.of(editor.subject.edited(Edit.compose(edits))) if edits else editor
        edits += held.edit([case])
    return edits


@torch.no_grad()
def _measured(editor: Editor, cases: Sequence[Case], edits: Sequence[Edit]) -> Iterator[dict[str, float | None]]:
    """For each number of edits, what they do; ``reach``, ``later`` and ``key`` are medians over layers and edits (pairs of them)."""
    counts = milestones(len(edits))
    squares = dict.fromkeys(counts, 0.0)
    whole = 0.0
    written = []  # of each layer (N, N): at [i, j] the norm of what edit i adds at prompt j
    later = {count: list[torch.Tensor]() for count in counts}
    lengths = []  # of each layer (N,): the squares of the keys' norms
    for layer in sorted({layer for edit in edits if edit.deltas() is not None for layer in edit.layers}):
        keys = editor.lookup_keys(cases, layer)
        lengths.append(keys.square().sum(dim=-1))
        weight = editor.subject.down_proj(layer).weight
        whole += float(weight.double().square().sum())
        total = torch.zeros_like(weight, dtype=torch.float64)
        added = torch.zeros(len(edits), len(cases), weight.shape[0], device=keys.device)
        for n, edit in enumerate(edits):
            delta = (edit.deltas() or {}).get(layer)
            if delta is not None:
                total += delta.to(total)
                added[n] = keys @ delta.to(keys).T
            if n + 1 in squares:
                squares[n + 1] += float(total.square().sum())
        norms = added.norm(dim=-1)
        written.append(norms)
        for count in counts:
            # at prompt i: the sum over the edits after i, against what edit i added
            after = added[:count].flip(0).cumsum(0).flip(0)[1:]
            of_later = torch.stack([after[n, n] for n in range(count - 1)]) if count > 1 else added[0, :0]
            later[count].append(_ratios(of_later.norm(dim=-1), norms.diagonal()[: count - 1]))
    for count in counts:
        apart = ~torch.eye(count, dtype=torch.bool)
        pairs = [(norms[:count, :count], norms.diagonal()[:count, None].expand(count, count)) for norms in written]
        reach = [_ratios(*(part[apart.to(part.device)] for part in pair)) for pair in pairs]
        books = Edit.compose(edits[:count]).lookups or ()
        first = edits[0].lookups or ()
        radii = [float(book.radii.median() / start.radii.median()) for book, start in zip(books, first)]
        yield {
            "edits": count,
            "norm": (squares[count] / whole) ** 0.5 if whole else None,
            "reach": _median(reach),
            "later": _median(later[count]),
            "radius": radii[0] if radii else None,
            "key": _median([of_layer[:count] for of_layer in lengths]),
        }


def _ratios(norms: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """``norms`` relative to what an edit adds ``own``; edits that add nothing there are left out."""
    return norms[own > 0] / own[own > 0]


def _median(values: Sequence[torch.Tensor]) -> float | None:
    joined = torch.cat([of_layer.flatten() for of_layer in values]) if values else torch.empty(0)
    return float(joined.median()) if joined.numel() else None
