"""Why an update affects the neighbours, and two remedies: lookup-aware statistics, or writing at another token.

All prompts of a dataset end in the same token, at which the editors of the ROME family read their key. Their updates may act on every
prompt for two reasons: the keys of this token resemble each other, which statistics of ordinary text hardly show
(locate_then_edit/second_moments.py); or the prompts differ at other tokens. The same learnt vectors are written under several
statistics; as a control, vectors are also learnt and written at the last token of the prompt's content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import selection_cases
from ...editors.locate_then_edit.learning import RewritingEditor
from ...editors.registry import get_editor, load_editor
from ...evaluation.evaluate import evaluate
from ...evaluation.records import finite
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ...support.journal import journal_beside
from ...support.seeds import seed_of
from ..tables import editor_name, percent, table, write_csv
from .selection import SCORES
from .weight_updates import diagnose

WEIGHTS_AND_RIDGES = ((0.0, 0.0), (0.1, 0.0), (1.0, 0.0), (10.0, 0.0), (1.0, 0.01), (1.0, 0.1))
CONTROL = ((0.0, 0.0), (1.0, 0.0))
# of the table that sweep_lookups writes: numbers, and other columns
COLUMNS = (["weight", "ridge", "cases", *SCORES[:-1], "reach"], ["editor", "lookup"])


@table
def lookup_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Each setting's scores and reach, from the file that ``clme measure lookups`` writes (:func:`sweep_lookups`)."""
    for row in measured.itertuples():
        no_statistics = pd.isna(row.weight)
        yield {
            "Editor": editor_name(row.editor),
            "Written at": {"colon": "the colon", "content": "the content's last token"}[row.lookup],
            "Statistics": "none"
            if no_statistics
            else "of text"
            if not row.weight
            else f"of text + {row.weight:g} × lookup",
            "Ridge": "–" if no_statistics else f"{row.ridge:g}",
            "n": str(row.cases),
            "Eff.": percent(row.effectiveness_em),
            "Gen.": percent(row.generalization_em),
            "Neighbours unchanged": percent(row.specificity_rate),
            "Reach": f"{100 * row.reach:.0f}%",
        }


def sweep_lookups(
    subject: Subject,
    editor: str,
    file: Path,
    cases: int | None = None,
    datasets: Sequence[str] = PAPER_DATASET_NAMES,
) -> pd.DataFrame:
    """Write the same learnt vectors under several statistics, at the colon and at the content's last token; written as CSV, a row per setting.

    The vectors do not depend on the statistics, so they are learnt once for each token.

    Args:
        file: the table to write; finished measurements are kept beside it, so that an interrupted command resumes.
        cases: use this many of each dataset's selection cases, from the first (None: all 30).

    Raises:
        StudyError: the editor does not write at a lookup token.
    """
    if not issubclass(get_editor(editor), RewritingEditor):
        raise StudyError(
            f"{editor!r} does not write at a lookup token; the editors that do: rome, memit, pmet, alphaedit, emmet"
        )
    rows = []
    with journal_beside(file, lambda row: (row["identity"], row["dataset"], str(row["setting"]))) as done:
        for dataset in datasets:
            chosen, others = selection_cases(dataset, cases)
            for lookup, pairs in (("colon", WEIGHTS_AND_RIDGES), ("content", CONTROL)):
                learner = load_editor(editor, subject, lookup=lookup)
                assert isinstance(learner, RewritingEditor)
                digest = "".join(case.sha256 for case in chosen)
                identity = seed_of(subject.fingerprint, subject.dtype_name, editor, learner.hparams, digest)
                settings = [_setting(editor, lookup, weight, ridge) for weight, ridge in pairs]
                # ROME's published program uses no statistics at all
                settings = ([{"lookup": lookup}] if "covariance" in settings[0] else []) + settings
                learnt: tuple[Any, ...] | None = None
                for setting in tqdm(settings, desc=f"{dataset} {editor} {lookup}", unit="setting"):
                    row: dict[str, Any] = {"identity": identity, "dataset": dataset, "setting": setting}
                    if row not in done:
                        if learnt is None:
                            with torch.enable_grad():
                                learnt = learner.learn(chosen)
                        writer = load_editor(editor, subject, **setting)
                        assert isinstance(writer, RewritingEditor)
                        writer.fit(others)
                        edits = writer.write(chosen, *learnt)
                        mean = evaluate(subject, chosen, edits)[SCORES[:-1]].mean()
                        mean["reach"] = diagnose(subject, chosen, edits)["reach"].mean()
                        done.append(
                            {
                                **row,
                                "cases": len(chosen),
                                "scores": {name: finite(value) for name, value in mean.items()},
                            }
                        )
                    kept = done[row]
                    shown = {
                        "editor": editor,
                        "lookup": lookup,
                        "weight": setting.get("lookup_weight"),
                        "ridge": setting.get("statistics_ridge"),
                    }
                    rows.append({**shown, "cases": kept["cases"], **kept["scores"]})
        measured = pd.DataFrame(rows)
        kinds = measured.groupby(["editor", "lookup", "weight", "ridge"], sort=False, dropna=False)
        # all datasets have the same number of cases, so their means weigh equally
        means = kinds["cases"].sum().to_frame().join(kinds[[*SCORES[:-1], "reach"]].mean()).reset_index()
        return write_csv(means, file)


def _setting(editor: str, lookup: str, weight: float, ridge: float) -> dict[str, Any]:
    switched_on = {"covariance": True} if "covariance" in get_editor(editor).Hyperparameters.model_fields else {}
    return {"lookup": lookup, "lookup_weight": weight, "statistics_ridge": ridge, **switched_on}
