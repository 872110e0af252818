"""Publishing a run: what the repository keeps of it.

CNLE texts are published. CSNE is mined from packages whose text is not ours to publish, so its records keep scores and
hashes only; whoever re-runs a case can still compare every string by its hash.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..evaluation.records import Record, read_records, without_texts
from ..support.errors import StudyError
from ..support.journal import append_rows
from . import provenance
from .config import make_config
from .plan import sampled
from .run_folder import load_manifest, load_run


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
    files = sorted((run / "records").glob("*.jsonl"))
    manifest = load_manifest(run)
    contents = {file.name: read_records([file]) for file in files}
    if not contents:
        raise StudyError(f"{run}: no records to publish")
    failures = [record for records in contents.values() for record in records if record.error]
    if failures:
        raise StudyError(f"{run}: case {failures[0].case_id} by {failures[0].editor} failed: {failures[0].error}")
    samples = {name: _finished_sample(run, manifest, records) for name, records in contents.items()}
    here = provenance.library_sha256(), provenance.commit()
    for start in manifest["starts"]:
        # made where there was no repository, by the library that this one holds
        if (start["commit"], start["library"]) == ("unknown", here[0]):
            start["commit"] = here[1]
    manifest["published"] = provenance.now()
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, records in contents.items():
        kept = [record for record in records if record.case_id in samples[name]]
        rows = [record.row() for record in sorted(kept, key=lambda record: record.case_id)]
        append_rows(
            unfinished / "records" / name,
            [without_texts(row) if row["dataset"] == "csne" else row for row in rows],
        )
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
    done = {record.case_id for record in records}
    found: set[int] = set()
    for start in manifest["starts"]:
        # a start that was killed counts as well, once another has completed its sample
        if dataset in start["cases"] and editor in start["hyperparameters"]:
            config = {**manifest["config"], "cases": start["cases"][dataset], "sample": start["sample"], "out": run}
            sample = {case.case_id for case in sampled(make_config(**config), dataset)}
            if sample <= done and len(sample) > len(found):
                found = sample
    if not found:
        raise StudyError(f"{run}: {editor} has not finished on {dataset}: start the run again, then publish")
    return found


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
