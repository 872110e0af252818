"""Publishing a run: what the repository keeps of it.

A data set says whether texts may be published. CSNE is mined from packages whose text is not ours to publish, so its records keep
scores and hashes only; whoever re-runs a case can still compare every string by its hash.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..datasets.base import get_dataset
from ..evaluation.records import FAILED, Record, read_records
from ..support.errors import StudyError
from ..support.journal import append_rows
from . import provenance
from .config import make_config
from .run_folder import is_recorded, load_manifest, load_run, record_files
from .runs import planned, sampled


def publish(run: Path, target: Path) -> int:
    """Copy a run to ``target`` for the repository; returns the number of records.

    Of each editor and data set the largest finished sample is published: a run that was stopped while growing has more
    cases, and not random ones. The copy is marked as published, which :func:`~clme_lib.study.runs.run` only reads.

    Raises:
        StudyError: the target exists, a case failed in the run, or a sample is not finished.
    """
    if target.exists():
        raise StudyError(
            f"{target} exists already: published records are never changed; choose another name or remove it"
        )
    manifest = load_manifest(run)
    contents = {file.name: read_records([file]) for file in record_files(run)}
    failures = [record for records in contents.values() for record in records if record.state == FAILED]
    if failures:
        raise StudyError(f"{run}: case {failures[0].case_id} by {failures[0].editor} failed: {failures[0].error}")
    samples = {name: _finished_sample(run, manifest, records) for name, records in contents.items()}
    library, commit = provenance.library_sha256(), provenance.commit()

    def committed(made_by: str, library_then: str) -> str:
        """The commit of what was made where there was no repository, by the library that this one holds."""
        return commit if (made_by, library_then) == ("unknown", library) else made_by

    for start in manifest["starts"]:
        start["commit"] = committed(start["commit"], start["library"])
    manifest["published"] = provenance.now()
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, records in contents.items():
        rows = []
        for record in sorted(records, key=lambda record: (record.position, record.case_id)):
            if record.case_id in samples[name]:
                removed = {} if get_dataset(record.dataset).publish_texts else {"texts": None, "answers": None}
                rows.append(record.model_dump() | removed | {"commit": committed(record.commit, record.library)})
        append_rows(unfinished / "records" / name, rows)
    (unfinished / "run.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file in (run / "folds.json", *sorted(run.glob("*.csv"))):
        if file.is_file():
            shutil.copy(file, unfinished / file.name)
    unfinished.rename(target)
    draw(target)
    return len(load_run(target))


def _finished_sample(run: Path, manifest: dict, records: list[Record]) -> set[int]:
    """Ids of the largest sample that the records of one editor and data set contain whole."""
    dataset, editor = records[0].dataset, records[0].editor
    keys = {(record.position, record.case_id) for record in records}
    largest: set[int] = set()
    for start in manifest["starts"]:
        # a start that was killed counts as well, once another has completed its sample
        if dataset in start["cases"] and editor in start["hyperparameters"]:
            fields = {**manifest["config"], "cases": start["cases"][dataset], "sample": start["sample"], "out": run}
            config = make_config(**fields)
            sample = sampled(config, dataset)
            steps = [step for _, plan in planned(config, dataset, editor, sample) for step in plan]
            if len(sample) > len(largest) and all(is_recorded(step, keys) for step in steps):
                largest = {case.case_id for case in sample}
    if not largest:
        raise StudyError(f"{run}: {editor} has not finished on {dataset}: start the run again, then publish")
    return largest


def draw(published: Path) -> Path:
    """Draw the headline figure of a published run beside its records, from them; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from .rq1 import proficiency_figure

    file = published / "proficiency.png"
    records = load_run(published)
    whole = records[~records["editor"].str.contains("-wo-")]  # ablations are RQ3's
    proficiency_figure(whole).savefig(file, dpi=160, bbox_inches="tight", metadata={"Software": None})
    return file
