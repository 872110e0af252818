"""Copies of a run: published (for the repository), or scored again. Records are never edited.

A dataset says whether its texts may be published. CSNE is mined from packages whose code may not be redistributed here, so its records
keep only scores and hashes; anybody who re-runs a case can still compare every string by its hash. Scoring needs the metrics'
packages, but no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..datasets.base import get_dataset
from ..datasets.registry import load_cases
from ..evaluation.evaluate import SINGLE
from ..evaluation.records import FAILED, SCORED, UNKNOWN, UNSCORED, Record, evaluated, read_records
from ..metrics.base import get_metric, list_metrics, scores_of
from ..metrics.free import STUDY_METRICS
from ..metrics.paper import PAPER_METRICS
from ..support.errors import StudyError
from . import provenance
from .config import make_config
from .paper import UNEDITED
from .run_folder import check_cases, is_of_sample, is_recorded, load_manifest, load_run, record_files, write_copy
from .runs import sampled
from .work import planned


def publish(run: Path, target: Path) -> int:
    """Copy a run to ``target`` for the repository; returns the number of records.

    For each editor and dataset the largest finished sample is published: a run that was stopped while growing has more
    cases, but not a random sample. The copy is marked as published, so :func:`~clme_lib.study.runs.run` only reads it.

    Raises:
        StudyError: the target exists, a case failed in the run, or a sample is not finished.
    """
    if target.exists():
        raise StudyError(
            f"{target} already exists, and published records are never changed; choose another name or remove it"
        )
    manifest = load_manifest(run)
    load_run(run)
    check_cases(run)
    contents = {file.name: read_records([file]) for file in record_files(run)}
    failures = [record for records in contents.values() for record in records if record.state == FAILED]
    if failures:
        raise StudyError(f"{run}: case {failures[0].case_id} by {failures[0].editor} failed: {failures[0].error}")
    if empty := [name for name, records in contents.items() if not records]:
        raise StudyError(f"{run}: {empty[0]} has no records yet: run the same command again, then publish")
    finished = {name: _largest_finished(run, manifest, records) for name, records in contents.items()}
    library, commit = provenance.library_sha256(), provenance.commit()

    def committed(made_by: str, library_then: str) -> str:
        """The commit of what was made where there was no repository, by the library that this one holds."""
        return commit if (made_by, library_then) == (UNKNOWN, library) else made_by

    for start in manifest["starts"]:
        start["commit"] = committed(start["commit"], start["library"])
    manifest["published"] = provenance.now()
    published: dict[str, list[Record]] = {}
    for name, records in contents.items():
        of_sample = [
            record
            for record in records
            if is_of_sample(*finished[name], record.position, record.case_id, record.held_out)
        ]
        of_sample.sort(key=lambda record: (record.position, record.case_id))
        published[name] = [
            record.model_copy(
                update={
                    "commit": committed(record.commit, record.library),
                    **({} if get_dataset(record.dataset).publish_texts else {"texts": None, "answers": None}),
                }
            )
            for record in of_sample
        ]
    write_copy(run, target, manifest, published)
    if manifest["config"].get("protocol", SINGLE) == SINGLE:  # The figure is of single edits.
        draw(target)
    return len(load_run(target))


def _largest_finished(run: Path, manifest: dict, records: list[Record]) -> tuple[set[int], set[int]]:
    """Ids of the edited and of the held-out cases of the largest sample that the records of one editor and dataset contain completely."""
    dataset, editor = records[0].dataset, records[0].editor
    keys = {(record.position, record.case_id) for record in records}
    largest: list[int] = []
    count = 0
    for start in manifest["starts"]:
        # a start that was killed also counts once another start has completed its sample
        if dataset in start["cases"] and editor in start["hyperparameters"]:
            of_start = {"sample": start["sample"], "held_out": start.get("held_out", 0), "out": run}
            config = make_config(**{**manifest["config"], "cases": start["cases"][dataset], **of_start})
            sample = sampled(config, dataset)
            parts = planned(config, editor, sample, load_cases(dataset, config.source))
            steps = [step for part in parts for step in part.steps]
            if len(sample) > len(largest) and all(is_recorded(step, keys) for step in steps):
                largest, count = [case.case_id for case in sample], len(sample) - config.held_out
    if not largest:
        raise StudyError(f"{run}: {editor} has not finished on {dataset}: run the same command again, then publish")
    return set(largest[:count]), set(largest[count:])


def draw(published: Path) -> None:
    """Draw the headline figure of a published run from its records, and store it next to them."""
    import matplotlib

    matplotlib.use("Agg")
    from .rq1 import proficiency_figure

    records = load_run(published)
    whole = records[~records["editor"].str.contains("-wo-")]  # ablations are RQ3's
    file = published / "proficiency.png"
    proficiency_figure(whole).savefig(file, dpi=160, bbox_inches="tight", metadata={"Software": None})


def score_run(run: Path, target: Path, metrics: Sequence[str] | None = None) -> int:
    """Write a copy of ``run`` to ``target`` with scores from its texts; returns how many records were scored now.

    Args:
        metrics: recomputed in every record that has texts; other scores stay. None: the study's, in records not scored yet.

    Raises:
        StudyError: the target exists, a case has changed since its record was made, no record has texts, a record that is not
        scored yet has none, or the unedited answers were not kept.
    """
    if target.exists():
        raise StudyError(f"{target} already exists: choose another name or remove it")
    manifest = load_manifest(run)
    load_run(run)
    contents = {file: read_records([file]) for file in record_files(run)}
    unedited = {
        (record.dataset, record.case_id): (record.texts or {}).get("specificity")
        for records in contents.values()
        for record in records
        if record.editor == UNEDITED
    }
    scored: dict[str, list[Record]] = {}
    count = 0
    for file, records in contents.items():
        scored[file.name] = []
        for record in records:
            if record.state == UNSCORED or (metrics and record.state == SCORED and record.texts is not None):
                answers = record.answers or unedited.get((record.dataset, record.case_id))
                record, count = _scored(record, file, answers, metrics or STUDY_METRICS), count + 1
            scored[file.name].append(record)
    if metrics and not count:
        raise StudyError(f"{run}: no record has texts to score, because they were not published; score your own run")
    names = [*manifest["config"].get("metrics", PAPER_METRICS), *(metrics or ())]
    manifest["config"] |= {"scored": True, "metrics": [name for name in list_metrics() if name in names]}
    write_copy(run, target, manifest, scored)
    return count


def _scored(record: Record, file: Path, answers: Sequence[str] | None, metrics: Sequence[str]) -> Record:
    what = f"{file}: case {record.case_id} of {record.dataset}"
    by_id = {case.case_id: case for case in load_cases(record.dataset, record.source)}
    case = by_id.get(record.case_id)
    if case is None or case.sha256 != record.case_sha256:
        raise StudyError(f"{what} differs from the one that this record was made from")
    if record.texts is None:
        raise StudyError(f"{what} has no texts to score, because they were not published; score your own run")
    if case.unrelated and answers is None and any(get_metric(name).measure == "specificity" for name in metrics):
        raise StudyError(
            f"{what} has no answers of the unedited subject: run the editor {UNEDITED!r} in the same folder first"
        )
    computed = scores_of(evaluated(record, case, answers or ()), metrics)
    return record.model_copy(update={"scores": {**(record.scores or {}), **computed}})
