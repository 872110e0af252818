"""Scoring a run's texts where they were not scored: on a machine that has the metrics' packages, and no need of the model.

Records are never edited: the scored run is another folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..datasets.registry import load_cases
from ..evaluation.evaluate import scores_of
from ..evaluation.records import TEXTS, UNSCORED, Record, read_records
from ..support.errors import StudyError
from ..support.journal import append_rows
from .run_folder import load_manifest


def score_run(run: Path, target: Path) -> int:
    """Write a copy of ``run`` to ``target`` in which every record has its scores; returns how many were scored now.

    Raises:
        StudyError: the target exists, or a case is not the one that the record was made from.
    """
    if target.exists():
        raise StudyError(f"{target} exists already: choose another name or remove it")
    manifest = load_manifest(run)
    files = sorted((run / "records").glob("*.jsonl"))
    if not files:
        raise StudyError(f"{run}: no records to score")
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    count = 0
    for file in files:
        rows = []
        for record in read_records([file]):
            if record.error == UNSCORED:
                record, count = _scored(record, file), count + 1
            rows.append(record.row())
        append_rows(unfinished / "records" / file.name, rows)
    manifest["config"]["scored"] = True
    (unfinished / "run.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for other in (run / "folds.json", *run.glob("*.csv")):
        if other.is_file():
            shutil.copy(other, unfinished / other.name)
    unfinished.rename(target)
    return count


def _scored(record: Record, file: Path) -> Record:
    by_id = {case.case_id: case for case in load_cases(record.dataset, record.source)}
    case = by_id.get(record.case_id)
    if case is None or case.sha256 != record.case_sha256:
        raise StudyError(
            f"{file}: case {record.case_id} of {record.dataset} is not the one that this record was made from"
        )
    texts = {name: getattr(record, f"generated_{name}") for name in TEXTS}
    scores = scores_of(texts, case.target, record.answers or [])
    return record.model_copy(update={**scores, "answers": None, "error": None})
