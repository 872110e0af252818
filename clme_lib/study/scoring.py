"""Scoring a run's texts again, or where they were not scored: on a machine that has the metrics' packages, and no need of the model.

Records are never edited: the scored run is another folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..datasets.registry import load_cases
from ..evaluation.records import SCORED, UNSCORED, Record, read_records
from ..metrics.base import Evaluated, get_metric, list_metrics, scores_of
from ..metrics.paper import PAPER_METRICS
from ..support.errors import StudyError
from ..support.journal import append_rows
from .paper import UNEDITED
from .run_folder import load_manifest, record_files


def score_run(run: Path, target: Path, metrics: Sequence[str] | None = None) -> int:
    """Write a copy of ``run`` to ``target`` with scores from its texts; returns how many records were scored now.

    Args:
        metrics: computed anew in every record that has texts, other scores stay. None: the paper's, in records not scored yet.

    Raises:
        StudyError: the target exists, a case is not the one that the record was made from, or texts or answers were not kept.
    """
    if target.exists():
        raise StudyError(f"{target} exists already: choose another name or remove it")
    manifest = load_manifest(run)
    contents = {file: read_records([file]) for file in record_files(run)}
    unedited = {
        (record.dataset, record.case_id): (record.texts or {}).get("specificity")
        for records in contents.values()
        for record in records
        if record.editor == UNEDITED
    }
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    count = 0
    for file, records in contents.items():
        rows = []
        for record in records:
            if record.state == UNSCORED or (metrics and record.state == SCORED):
                answers = record.answers or unedited.get((record.dataset, record.case_id))
                record, count = _scored(record, file, answers, metrics or PAPER_METRICS), count + 1
            rows.append(record.model_dump())
        append_rows(unfinished / "records" / file.name, rows)
    names = [*manifest["config"].get("metrics", PAPER_METRICS), *(metrics or ())]
    manifest["config"] |= {"scored": True, "metrics": [name for name in list_metrics() if name in names]}
    (unfinished / "run.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for other in (run / "folds.json", *run.glob("*.csv")):
        if other.is_file():
            shutil.copy(other, unfinished / other.name)
    unfinished.rename(target)
    return count


def _scored(record: Record, file: Path, answers: Sequence[str] | None, metrics: Sequence[str]) -> Record:
    what = f"{file}: case {record.case_id} of {record.dataset}"
    by_id = {case.case_id: case for case in load_cases(record.dataset, record.source)}
    case = by_id.get(record.case_id)
    if case is None or case.sha256 != record.case_sha256:
        raise StudyError(f"{what} is not the one that this record was made from")
    if record.texts is None:
        raise StudyError(f"{what} has no texts to score: they were not published; score a run of your own")
    if case.unrelated and answers is None and any(get_metric(name).measure == "specificity" for name in metrics):
        raise StudyError(
            f"{what} keeps no answers of the unedited subject: run the editor {UNEDITED!r} in the same folder first"
        )
    computed = scores_of(Evaluated(case, record.texts, answers or ()), metrics)
    return record.model_copy(update={"scores": {**(record.scores or {}), **computed}})
