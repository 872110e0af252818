"""A-GRACE's measures as a function of the radius around an edit's key.

What a prompt's continuation becomes *if* the codebook fires does not depend on the encoder, so the texts of a few edits
with an infinite radius, and the distances under each encoder, give every radius at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...datasets.cases import Case
from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import selection_cases
from ...editors.a_grace import EncodedGRACE
from ...editors.contrastive_encoder import make_pairs
from ...editors.registry import load_editor
from ...evaluation.evaluate import evaluate
from ...evaluation.unedited import answers_for
from ...subjects.subject import Subject
from ..paper import A_GRACE, UNEDITED
from ..tables import write_csv

MARGINS = (1.0, 1.5, 2.0, 3.0, 4.0)
RADII = 61  # how many the sweep takes, from nothing to the largest distance
_EVERYTHING = 1e9


def sweep_radius(subject: Subject, file: Path, cases: int = 30, margins: Sequence[float] = MARGINS) -> pd.DataFrame:
    """Exact match of all measures as a function of the radius, on the selection cases; written as CSV.

    One row for each data set, editor, margin and radius: ``effectiveness``, ``generalization``, ``specificity`` (all five
    neighbours unchanged) and ``specificity_rate``, in [0, 1]. Encoders are trained on all cases that are not selection
    cases. GRACE and A-GRACE without contrastive learning have no margin.

    Args:
        cases: of each data set's selection cases, the first so many.
    """
    rows = []
    for dataset in PAPER_DATASET_NAMES:
        chosen, others = selection_cases(dataset, cases)
        everything = load_editor("a-grace-wo-cl", subject, radius=_EVERYTHING).edit(chosen, progress=True)
        if_fired = evaluate(subject, chosen, everything)
        otherwise = evaluate(subject, chosen, load_editor(UNEDITED, subject).edit(chosen))
        answers = [answers_for(subject, case.unrelated) for case in chosen]
        same = [np.array(list(map(eq, *texts))) for texts in zip(if_fired["generated_specificity"], answers)]
        general = if_fired["generalization_em"].to_numpy(), otherwise["generalization_em"].to_numpy()
        layer = everything[0].layers[0]
        asked: list[tuple[str, float | None, torch.Tensor]] = [
            ("grace", None, make_pairs(subject, chosen, layer, "last").distances(None)),
            ("a-grace-wo-cl", None, make_pairs(subject, chosen, layer, "mean").distances(None)),
        ]
        for name in (A_GRACE, "a-grace-wo-mean"):
            for margin in margins:
                fitted = fitted_editor(subject, name, others, chosen, margin={dataset: margin})
                pairs = make_pairs(subject, chosen, fitted.hparams.layer, fitted.query)
                asked.append((name, margin, pairs.distances(fitted.trained.encoder)))
        for name, its_margin, of_pairs in asked:
            # of each case the rephrased prompt's, then the neighbours'
            distances = [part.cpu().numpy() for part in of_pairs.split([1 + len(case.unrelated) for case in chosen])]
            # the paper's radius is always among them
            for radius in sorted({1.0, *np.linspace(0, float(of_pairs.max()), RADII).tolist()}):
                fired = [of_case <= radius for of_case in distances]
                kept = [~hits[1:] | unchanged for hits, unchanged in zip(fired, same)]
                rows.append(
                    {
                        "dataset": dataset,
                        "editor": name,
                        "margin": its_margin,
                        "radius": radius,
                        "cases": len(chosen),
                        "effectiveness": if_fired["effectiveness_em"].mean(),
                        "generalization": float(np.where([hits[0] for hits in fired], *general).mean()),
                        "specificity": float(np.mean([neighbours.all() for neighbours in kept])),
                        "specificity_rate": float(np.mean([neighbours.mean() for neighbours in kept])),
                    }
                )
    return write_csv(pd.DataFrame(rows), file)


def fitted_editor(
    subject: Subject, name: str, learnt: Sequence[Case], edited: Sequence[Case], **options: Any
) -> EncodedGRACE:
    """A-GRACE or its ablation with an encoder, trained on ``learnt``; ``options`` are those of ``load_editor``."""
    editor = load_editor(name, subject, **options)
    assert isinstance(editor, EncodedGRACE)
    editor.fit(learnt, edited=edited)
    return editor
