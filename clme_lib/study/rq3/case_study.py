"""One case's prompts in the plane: the first two principal components of their queries, as they are and encoded."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ...datasets.cases import Case, folds, sample_cases
from ...forward.prompt_keys import stored_queries
from ...subjects.subject import Subject
from ..paper import A_GRACE
from .radius import fitted_editor

KINDS = ("edit", "rephrased", "neighbour")


def project(subject: Subject, everything: Sequence[Case], candidates: Sequence[Case], seed: int) -> pd.DataFrame:
    """The paper's case study for the first of the sampled candidates.

    Args:
        everything: all cases of the data set, whose other fold the encoder learns from.
        candidates: cases to take one from.

    Returns:
        One row for each prompt and query: ``dataset``, ``case_id``, ``query`` (``last`` token as in GRACE, encoded ``mean`` as in
        A-GRACE), ``kind`` of the prompt, its place ``x``, ``y`` and its ``distance`` from the edit prompt in the whole space.
    """
    from sklearn.decomposition import PCA

    (case,) = sample_cases(candidates, 1, seed)
    halves = folds(everything, seed)
    other_half = set(halves[0 if case.case_id in halves[1] else 1])
    learnt = [learnt for learnt in everything if learnt.case_id in other_half]
    editor = fitted_editor(subject, A_GRACE, learnt, [case], seed=seed)
    assert editor.trained is not None
    prompts = [case.prompt, case.rephrased[0], *case.unrelated]
    means = stored_queries(subject, prompts, editor.hparams.layer, "mean").to(subject.device)
    points = {
        "last": stored_queries(subject, prompts, editor.hparams.layer, "last"),
        "mean": editor.trained.encoder(means).cpu(),
    }
    tables = []
    for query, of_query in points.items():
        # the sign of a component is arbitrary: the edit prompt lies on its positive side
        plane = PCA(2, svd_solver="full").fit_transform(of_query.double().numpy())
        plane = plane * [1 if value >= 0 else -1 for value in plane[0]]
        kinds = [KINDS[min(place, 2)] for place in range(len(prompts))]
        distances = [float((point - of_query[0]).norm()) for point in of_query]
        columns = {"kind": kinds, "x": plane[:, 0], "y": plane[:, 1], "distance": distances}
        tables.append(pd.DataFrame({"dataset": case.dataset, "case_id": case.case_id, "query": query, **columns}))
    return pd.concat(tables, ignore_index=True)
