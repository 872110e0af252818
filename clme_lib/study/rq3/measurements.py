"""What RQ3 measures beside the records, made when a run's folder does not have it and kept there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from ...datasets.cases import Case, sample_cases, split_cases
from ...datasets.registry import load_cases
from ...forward.prompt_keys import stored_queries
from ...subjects.subject import Subject, load_subject
from ...support.errors import StudyError
from ..config import RunConfig
from ..paper import A_GRACE, A_GRACE_VARIANTS
from ..provenance import hardware
from ..rq2.measure import ready, time_edit
from ..run_folder import is_published, run_name
from ..runs import run, sampled
from ..tables import write_csv
from . import radius

_TIMED = 5  # cases edited alone, per data set and variant


def compat_run(config: RunConfig) -> pd.DataFrame:
    """The same cases with the released program's defects, in the folder ``<out>-compat``.

    Raises:
        StudyError: the run itself has them.
    """
    if config.preset != "clean":
        raise StudyError("preset: RQ3 compares both presets by itself; leave it at 'clean'")
    folder = config.out.with_name(f"{config.out.name}-compat")
    # nothing was wrong with leaving a model unedited
    editors = tuple(name for name in config.editors if name in A_GRACE_VARIANTS)
    changed = {"preset": "compat", "out": folder, "name": f"{run_name(config)}-compat", "editors": editors}
    return run(config.model_copy(update=changed))


def sweep(config: RunConfig) -> pd.DataFrame:
    """The sweep of the radius that belongs to a run (radius.py)."""
    cases = min(config.cases or 30, 30)
    return _kept(config, "radius.csv", lambda subject, file: radius.sweep_radius(subject, file, cases))


def projection(config: RunConfig) -> pd.DataFrame:
    """The paper's case study: the places of one case of each data set (:func:`project`)."""

    def make(subject: Subject, file: Path) -> None:
        sets = [(load_cases(name, config.source), sampled(config, name)) for name in config.dataset]
        places = [project(subject, everything, candidates, config.seed) for everything, candidates in sets]
        write_csv(pd.concat(places), file, digits=5)

    return _kept(config, "case_study.csv", make)


def project(subject: Subject, everything: Sequence[Case], candidates: Sequence[Case], seed: int) -> pd.DataFrame:
    """The prompts of the first of the sampled candidates in the plane of their queries' first two principal components.

    Args:
        everything: all cases of the data set, whose other fold the encoder learns from.
        candidates: cases to take one from.

    Returns:
        One row for each prompt and query: ``dataset``, ``case_id``, ``query`` (``last`` token as in GRACE, encoded ``mean`` as in
        A-GRACE), ``kind`` of the prompt, its place ``x``, ``y`` and its ``distance`` from the edit prompt in the whole space.
    """
    from sklearn.decomposition import PCA

    (case,) = sample_cases(candidates, 1, seed)
    (other_half,) = [half for half in split_cases(everything, seed) if case not in half]
    editor = radius.fitted_editor(subject, A_GRACE, other_half, [case], seed=seed)
    prompts = [case.prompt, case.rephrased[0], *case.unrelated]
    last, means = (stored_queries(subject, prompts, editor.hparams.layer, query) for query in ("last", "mean"))
    tables = []
    for query, points in (("last", last), ("mean", editor.trained.encoder(means.to(subject.device)).cpu())):
        # the sign of a component is arbitrary: the edit prompt lies on its positive side
        plane = PCA(2, svd_solver="full").fit_transform(points.double().numpy())
        plane = plane * [1 if value >= 0 else -1 for value in plane[0]]
        kinds = ["edit", "rephrased", *["neighbour"] * len(case.unrelated)]
        distances = [float((point - points[0]).norm()) for point in points]
        columns = {"kind": kinds, "x": plane[:, 0], "y": plane[:, 1], "distance": distances}
        tables.append(pd.DataFrame({"dataset": case.dataset, "case_id": case.case_id, "query": query, **columns}))
    return pd.concat(tables, ignore_index=True)


def overhead(config: RunConfig) -> pd.DataFrame:
    """A few edits by every variant, each made alone (time_edit).

    The variants take turns on a case, so that a machine that slows down slows all of them.
    """

    def make(subject: Subject, file: Path) -> None:
        machine = hardware(subject)
        rows = []
        for dataset in config.dataset:
            cases, everything = sampled(config, dataset), load_cases(dataset, config.source)
            editors = {name: ready(subject, name, everything, False, config.seed) for name in A_GRACE_VARIANTS}
            for editor in editors.values():
                editor.edit(cases[-1:], batch_size=1)  # the first pays for what a process does once
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
            raise StudyError(f"{file} is missing: a published run of RQ3 has it; restore it from the repository")
        make(load_subject(config.subject, config.device, config.dtype), file)
    return pd.read_csv(file)
