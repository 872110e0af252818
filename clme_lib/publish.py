"""Publishing a run: what the repository keeps of it.

CNLE texts are published. CSNE is mined from packages whose text is not ours to publish, so its records keep scores and
hashes only; whoever re-runs a case can still compare every string by its hash.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import provenance
from .errors import StudyError
from .jsonl import append_rows
from .records import read_records, without_texts
from .runs import load_manifest, load_run


def publish(run: Path, target: Path) -> int:
    """Copy a run to ``target`` for the repository; returns the number of records.

    Only cases that every editor has done are published: a run that was stopped while growing has more of some.

    Raises:
        StudyError: the target exists, or a case failed in the run.
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
    done: dict[str, list[set[int]]] = {}
    for records in contents.values():
        done.setdefault(records[0].dataset, []).append({record.case_id for record in records})
    common = {dataset: set.intersection(*ids) for dataset, ids in done.items()}
    here = provenance.library_sha256(), provenance.commit()
    for start in manifest["starts"]:
        # made where there was no repository, by the library that this one holds
        if (start["commit"], start["library"]) == ("unknown", here[0]):
            start["commit"] = here[1]
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, records in contents.items():
        kept = [record for record in records if record.case_id in common[record.dataset]]
        rows = [record.model_dump() for record in sorted(kept, key=lambda record: record.case_id)]
        append_rows(
            unfinished / "records" / name,
            [without_texts(row) if row["dataset"] == "csne" else row for row in rows],
        )
    (unfinished / "run.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if (run / "folds.json").is_file():
        shutil.copy(run / "folds.json", unfinished / "folds.json")
    unfinished.rename(target)
    draw(target)
    return len(load_run(target))


def draw(published: Path) -> Path:
    """Draw the headline figure of a published run beside its records, from them; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from .report import proficiency_figure

    file = published / "proficiency.png"
    proficiency_figure(load_run(published)).savefig(file, dpi=160, bbox_inches="tight", metadata={"Software": None})
    return file
