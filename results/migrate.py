"""Convert a run of records of schema 1 to schema 2: values, texts and hashes stay what they are.

usage: python results/migrate.py OLD_RUN_FOLDER NEW_RUN_FOLDER

Schema 2 keeps scores, texts and hashes in mappings, and says which start of ``run.json`` made a record. Of old records this is proved as
far as ``run.json`` and the records themselves allow, and else *unknown*. A batch's records have the same seconds; the start that made a
batch asked for all of its cases, and began before any start that asked for one of them had finished.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases, selection_ids
from clme_lib.evaluation.evaluate import SINGLE
from clme_lib.evaluation.records import UNKNOWN, Record
from clme_lib.metrics.base import TEXTS
from clme_lib.metrics.paper import PAPER_METRICS
from clme_lib.support.journal import append_rows, read_rows, write_text

_OLD_UNSCORED = "not scored yet: clme score"
_KEPT = ("run", "subject", "dataset", "source", "editor", "preset", "fold", "case_id", "case_sha256")
_MEASURED = ("edit_seconds", "edit_batch", "steps", "loss", "peak_memory_mib", "initial_sha256", "distances", "fired")


def converted(row: dict, possible: list[dict]) -> Record:
    """A row of schema 1 as a record of schema 2, made by one of the ``possible`` starts."""
    unscored = row["error"] == _OLD_UNSCORED
    made = {
        field: possible[0][name] if len({start[name] for start in possible}) == 1 else UNKNOWN
        for field, name in (("start", "id"), ("library", "library"), ("commit", "commit"))
    }
    texts, hashes = (
        {name: row[f"{kind}_{name}"] for name in TEXTS if row[f"{kind}_{name}"] is not None}
        for kind in ("generated", "sha256")
    )
    return Record(
        **{name: row[name] for name in (*_KEPT, *_MEASURED)},
        **made,
        protocol=SINGLE,
        position=1,
        scores=None if row["error"] else {name: row[name] for name in PAPER_METRICS},
        texts=texts or None,
        sha256=hashes or None,
        answers=row.get("answers"),
        error=None if unscored else row["error"],
    )


def makers(rows: list[dict], starts: list[dict]) -> dict[int, list[dict]]:
    """The starts that may have made each case's record, by case id."""
    dataset, editor, source = (rows[0][name] for name in ("dataset", "editor", "source"))
    asked = sorted(
        (start for start in starts if dataset in start["cases"] and editor in start["hyperparameters"]),
        key=lambda start: start["started"],
    )
    batches = defaultdict(list)
    for row in rows:
        batches[(row["edit_seconds"], row["peak_memory_mib"]) if row["edit_seconds"] else row["case_id"]].append(row)
    cases = [case for case in load_cases(dataset, source) if case.case_id not in selection_ids(dataset)]
    ranks = {}
    for sample in {start["sample"] for start in asked}:
        ranks[sample] = {case.case_id: rank for rank, case in enumerate(sample_cases(cases, None, sample))}

    def asked_for(start: dict, row: dict) -> bool:
        return ranks[start["sample"]][row["case_id"]] < start["cases"][dataset]

    result = {}
    for batch in batches.values():
        possible = [start for start in asked if all(asked_for(start, row) for row in batch)]
        for row in batch:
            done = min(
                (start["finished"] for start in asked if "finished" in start and asked_for(start, row)), default="9"
            )
            possible = [start for start in possible if start["started"] < done]
        result |= {row["case_id"]: possible for row in batch}
    return result


def migrate(old: Path, new: Path) -> None:
    """Write the converted run; the old one stays as it is."""
    if new.exists():
        sys.exit(f"{new} exists already: choose another folder")
    manifest = json.loads((old / "run.json").read_text(encoding="utf-8"))
    for number, start in enumerate(manifest["starts"], 1):
        start["id"] = str(number)
    for file in sorted((old / "records").glob("*.jsonl")):
        rows = read_rows(file)
        made_by = makers(rows, manifest["starts"])
        records = [converted(row, made_by[row["case_id"]]) for row in rows]
        append_rows(new / "records" / file.name, [record.model_dump() for record in records])
        unknown = [possible for possible in made_by.values() if len(possible) != 1]
        starts = sorted({start["id"] for possible in unknown for start in possible}, key=int)
        print(
            f"{file.name}: {len(rows)} records, of {len(unknown)} the start is {UNKNOWN} ({' or '.join(starts) or 'none'})"
        )
    write_text(new / "run.json", json.dumps({"schema_version": 2, **manifest}, indent=1) + "\n")
    for file in old.iterdir():
        if file.is_file() and file.name != "run.json":
            (new / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    migrate(Path(sys.argv[1]), Path(sys.argv[2]))
