"""What RQ3 measures beside the records, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ...datasets.registry import load_cases
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ..config import RunConfig
from ..paper import A_GRACE_VARIANTS
from ..provenance import hardware
from ..run_folder import is_published, run_name
from ..runs import run, sampled
from ..tables import write_csv

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
    """The sweep of the radius that belongs to a run (radius.py), made when its folder does not have it."""
    from .radius import sweep_radius

    def make(subject: Subject, file: Path) -> None:
        sweep_radius(subject, file, min(config.cases or 30, 30))

    return _kept(config, "radius.csv", make)


def projection(config: RunConfig) -> pd.DataFrame:
    """The places of one case of each data set (case_study.py), made when the run's folder does not have them."""
    from .case_study import project

    def make(subject: Subject, file: Path) -> None:
        sets = [(load_cases(name, config.source), sampled(config, name)) for name in config.dataset]
        places = [project(subject, everything, candidates, config.seed) for everything, candidates in sets]
        write_csv(pd.concat(places), file, digits=5)

    return _kept(config, "case_study.csv", make)


def overhead(config: RunConfig) -> pd.DataFrame:
    """A few edits by every variant, each made alone (time_edit), made when the run's folder does not have them.

    The variants take turns on a case, so that a machine that slows down slows all of them.
    """
    from ..rq2.measure import ready, time_edit

    def make(subject: Subject, file: Path) -> None:
        machine = hardware(subject)
        place = {"machine": machine["name"], "threads": machine["threads"]}
        rows = []
        for dataset in config.dataset:
            cases, everything = sampled(config, dataset), load_cases(dataset, config.source)
            editors = {name: ready(subject, name, everything, False, config.seed) for name in A_GRACE_VARIANTS}
            for editor in editors.values():
                editor.edit(cases[-1:], batch_size=1)  # the first pays for what a process does once
            for case in cases[:_TIMED]:
                for name, editor in editors.items():
                    measured = time_edit(editor, case)
                    kept = {column: measured[column] for column in ("case_id", "seconds", "peak_mib")}
                    rows.append({"dataset": dataset, "editor": name, **kept, **place})
        write_csv(pd.DataFrame(rows), file)

    return _kept(config, "overhead.csv", make)


def _kept(config: RunConfig, name: str, make: Callable[[Subject, Path], None]) -> pd.DataFrame:
    from ...subjects.subject import load_subject

    file = config.out / name
    if not file.is_file():
        if is_published(config.out):
            raise StudyError(f"{file} is missing: a published run of RQ3 has it; restore it from the repository")
        make(load_subject(config.subject, config.device, config.dtype), file)
    return pd.read_csv(file)
