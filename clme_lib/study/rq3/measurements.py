"""RQ3's measurements other than records: each is made if a run's folder does not have it yet, and kept there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...datasets.cases import Case, sample_cases, split_cases
from ...datasets.paper import PAPER_DATASET_NAMES
from ...datasets.registry import load_cases, selection_cases
from ...editors.a_grace import AGRACE
from ...editors.contrastive_encoder import make_pairs
from ...editors.registry import load_editor
from ...evaluation.evaluate import evaluate
from ...evaluation.loading import load_subject
from ...evaluation.unedited import answers_for
from ...forward.prompt_keys import stored_queries
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ..config import ReportConfig, RunConfig
from ..paper import A_GRACE, A_GRACE_VARIANTS, UNEDITED
from ..provenance import hardware
from ..rq2.measure import ready, time_edit
from ..run_folder import is_published, load_manifest, run_name
from ..runs import run, sampled
from ..tables import read_csv, write_csv

MARGINS = (1.0, 1.5, 2.0, 3.0, 4.0)
RADII = 61  # number of radii in the sweep, from zero to the largest distance
_EVERYTHING = 1e9
_SWEEP = "radius.csv"
# columns of the files that have to be numbers
_NUMBERS = {
    _SWEEP: ("margin", "radius", "cases", "generalization", "specificity_rate"),
    "case_study.csv": ("case_id", "x", "y", "distance"),
    "overhead.csv": ("case_id", "seconds", "peak_mib"),
}
_TIMED = 5  # cases edited alone, per dataset and variant


def compat_run(config: RunConfig) -> pd.DataFrame:
    """Run the same cases with the released program's defects, in the folder ``<out>-compat``.

    Raises:
        StudyError: the run's own preset is ``compat``.
    """
    if config.preset != "clean":
        raise StudyError("preset: RQ3 runs both presets by itself; leave it at 'clean'")
    folder = config.out.with_name(f"{config.out.name}-compat")
    # the released defects do not affect the unedited model
    editors = tuple(name for name in config.editors if name in A_GRACE_VARIANTS)
    changed = {"preset": "compat", "out": folder, "name": f"{run_name(config)}-compat", "editors": editors}
    return run(config.model_copy(update=changed))


def sweep(config: RunConfig) -> pd.DataFrame:
    """A run's sweep of the deferral radius (:func:`sweep_radius`)."""
    cases = min(config.cases or 30, 30)
    return _kept(config, _SWEEP, lambda subject, file: sweep_radius(subject, file, cases))


def sweep_beside(config: ReportConfig) -> dict[str, pd.DataFrame]:
    """The sweep in the folder of the run that is shown beside this one, by that run's subject; empty if the folder has none."""
    if config.beside is None or not (file := config.beside / _SWEEP).is_file():
        return {}
    return {load_manifest(config.beside)["config"]["subject"]: read_csv(file, _NUMBERS[_SWEEP])}


def sweep_radius(subject: Subject, file: Path, cases: int = 30, margins: Sequence[float] = MARGINS) -> pd.DataFrame:
    """Exact match of all measures as a function of the deferral radius, on the selection cases; written as CSV.

    One row for each dataset, editor, margin and radius: ``effectiveness``, ``generalization``, ``specificity`` (all five
    neighbours unchanged) and ``specificity_rate``, in [0, 1]. Encoders are trained on all cases that are not selection
    cases. GRACE and A-GRACE without contrastive learning have no margin. The text after a prompt *if* the codebook fires does not
    depend on the encoder, so every radius can be computed from the texts of one set of edits with a practically infinite radius and
    the distances under each encoder.

    Args:
        cases: use this many of each dataset's selection cases, from the first.
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
            # for each case: the rephrased prompt's distance, then the neighbours'
            distances = [part.cpu().numpy() for part in of_pairs.split([1 + len(case.unrelated) for case in chosen])]
            # the paper's radius is always included
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
) -> AGRACE:
    """A-GRACE, or its ablation that has an encoder, trained on ``learnt``; ``options`` go to ``load_editor``."""
    editor = load_editor(name, subject, **options)
    assert isinstance(editor, AGRACE)
    editor.fit(learnt, edited=edited)
    return editor


def projection(config: RunConfig) -> pd.DataFrame:
    """The paper's case study: the projected prompts of one case of each dataset (:func:`project`)."""

    def make(subject: Subject, file: Path) -> None:
        sets = [(load_cases(name, config.source), sampled(config, name)) for name in config.dataset]
        places = [project(subject, everything, candidates, config.seed) for everything, candidates in sets]
        write_csv(pd.concat(places), file, digits=5)

    return _kept(config, "case_study.csv", make)


def project(subject: Subject, everything: Sequence[Case], candidates: Sequence[Case], seed: int) -> pd.DataFrame:
    """Project one case's prompts onto the first two principal components of their queries.

    Args:
        everything: all cases of the dataset; the encoder learns from the half that does not contain the case.
        candidates: cases from which the case is sampled.

    Returns:
        One row for each prompt and query: ``dataset``, ``case_id``, ``query`` (``last`` token as in GRACE, encoded ``mean`` as in
        A-GRACE), the prompt's ``kind``, its coordinates ``x`` and ``y``, and its ``distance`` from the edit prompt in the whole space.
    """
    from sklearn.decomposition import PCA

    (case,) = sample_cases(candidates, 1, seed)
    (other_half,) = [half for half in split_cases(everything, seed) if case not in half]
    editor = fitted_editor(subject, A_GRACE, other_half, [case], seed=seed)
    prompts = [case.prompt, case.rephrased[0], *case.unrelated]
    last, means = (stored_queries(subject, prompts, editor.hparams.layer, query) for query in ("last", "mean"))
    tables = []
    for query, points in (("last", last), ("mean", editor.trained.encoder(means.to(subject.device)).cpu())):
        # the sign of a component is arbitrary: make the edit prompt's coordinates positive
        plane = PCA(2, svd_solver="full").fit_transform(points.double().numpy())
        plane = plane * [1 if value >= 0 else -1 for value in plane[0]]
        kinds = ["edit", "rephrased", *["neighbour"] * len(case.unrelated)]
        distances = [float((point - points[0]).norm()) for point in points]
        columns = {"kind": kinds, "x": plane[:, 0], "y": plane[:, 1], "distance": distances}
        tables.append(pd.DataFrame({"dataset": case.dataset, "case_id": case.case_id, "query": query, **columns}))
    return pd.concat(tables, ignore_index=True)


def overhead(config: RunConfig) -> pd.DataFrame:
    """Time a few edits by every variant, each made alone (time_edit).

    The variants take turns on each case, so that a slowdown of the machine affects all of them.
    """

    def make(subject: Subject, file: Path) -> None:
        machine = hardware(subject)
        rows = []
        for dataset in config.dataset:
            cases, everything = sampled(config, dataset), load_cases(dataset, config.source)
            editors = {name: ready(subject, name, everything, False, config.seed) for name in A_GRACE_VARIANTS}
            for editor in editors.values():
                editor.edit(cases[-1:], batch_size=1)  # warm-up: includes work done once per process
            rows += [
                {"dataset": dataset, "editor": name, **time_edit(editor, case)}
                for case in cases[:_TIMED]
                for name, editor in editors.items()
            ]
        timed = pd.DataFrame(rows)[["dataset", "editor", "case_id", "seconds", "peak_mib"]]
        write_csv(timed.assign(machine=machine["name"], threads=machine["threads"]), file)

    return _kept(config, "overhead.csv", make)


def _kept(config: RunConfig, name: str, make: Callable[[Subject, Path], object]) -> pd.DataFrame:
    file = config.out / name
    if not file.is_file():
        if is_published(config.out):
            raise StudyError(f"{file} is missing from a published run of RQ3; restore it from the repository")
        make(load_subject(config.subject, config.device, config.dtype), file)
    return read_csv(file, _NUMBERS[name])
