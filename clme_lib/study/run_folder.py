"""A run's folder: its records, its manifest, and what two starts of one run must agree on.

::

    run.json                      configuration and, of each start, an id and its provenance
    folds.json                    case ids of both folds, per data set
    records/<data set>.<editor>.jsonl

Records are only appended. A published run (copies.py) is only read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from ..datasets.base import list_datasets
from ..datasets.cases import Case
from ..editors.registry import list_editors
from ..evaluation.records import Record, frame, read_records
from ..support.errors import StudyError
from ..support.journal import append_rows, read_rows, write_text
from .config import RunConfig
from .protocols import Step

MANIFEST_VERSION = 2
# what two starts of one run must agree on; the number of cases may grow, batching is free
_IDENTITY = ("name", "subject", "source", "preset", "values", "seed", "dtype", "protocol", "metrics")


def load_run(
    folder: Path | str, *, chosen: dict[str, list[Case]] | None = None, editors: Sequence[str] | None = None
) -> pd.DataFrame:
    """Records of a run folder (:func:`clme_lib.evaluation.records.frame`); optionally only of given cases and editors.

    Raises:
        StudyError: there are none, or a file is damaged.
    """
    table = frame(read_records(record_files(Path(folder))))
    if chosen is not None:
        keys = {(name, case.case_id) for name, cases in chosen.items() for case in cases}
        table = table[[key in keys for key in zip(table["dataset"], table["case_id"])]]
    if editors is not None:
        table = table[table["editor"].isin(editors)]
    ranks = {name: rank for names in (list_datasets(), list_editors()) for rank, name in enumerate(names)}
    placed = table.assign(_dataset=table["dataset"].map(ranks), _editor=table["editor"].map(ranks))
    order = placed.sort_values(["_dataset", "_editor", "position", "case_id"], kind="stable").index
    return table.loc[order].reset_index(drop=True)


def shared_cases(records: pd.DataFrame, by: list[str]) -> set[int]:
    """Ids of the cases that all groups of records have."""
    groups = [set(case_ids) for _, case_ids in records.groupby(by)["case_id"]]
    return set.intersection(*groups) if groups else set()


def record_files(folder: Path) -> list[Path]:
    """The files of a run's records, in order of their names; StudyError when there are none."""
    files = sorted((folder / "records").glob("*.jsonl"))
    if not files:
        raise StudyError(f"{folder}: no records; expected {folder}/records/*.jsonl")
    return files


def records_file(config: RunConfig, dataset: str, editor: str) -> Path:
    """Where the records of a data set and editor are."""
    return config.out / "records" / f"{dataset}.{editor}.jsonl"


def recorded(config: RunConfig, dataset: str, editor: str, cases: Iterable[Case]) -> set[tuple[int, int]]:
    """Position and case id of every record that a data set and editor have; StudyError when a case has changed since."""
    file, hashes = records_file(config, dataset, editor), {case.case_id: case.sha256 for case in cases}
    keys = set()
    for row in read_rows(file):
        case_id = row["case_id"]
        if hashes.get(case_id, row["case_sha256"]) != row["case_sha256"]:
            raise StudyError(
                f"{file}: case {case_id} of {dataset} has changed since it was recorded; move the run folder away or "
                "choose another out="
            )
        keys.add((row.get("position", 1), case_id))
    return keys


def is_recorded(step: Step, keys: set[tuple[int, int]]) -> bool:
    """Whether all that a step evaluates is among these positions and case ids."""
    return all((step.position, case.case_id) in keys for case in step.evaluated)


def load_manifest(folder: Path | str) -> dict:
    """The ``run.json`` of a run folder; StudyError when there is none, or it cannot be read."""
    file = Path(folder) / "run.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{file}: cannot be read: {error}; is {folder} a run folder?") from error
    if manifest.get("schema_version") != MANIFEST_VERSION:
        raise StudyError(
            f"{file}: schema_version {manifest.get('schema_version')!r}, expected {MANIFEST_VERSION}; older runs are converted "
            "by `python results/migrate.py FOLDER NEW_FOLDER`"
        )
    return manifest


def is_published(folder: Path) -> bool:
    """Whether a run folder is a published one, which is only read."""
    return (folder / "run.json").is_file() and "published" in load_manifest(folder)


def run_name(config: RunConfig) -> str:
    """What a run is called in its records: as asked for, else as it was called before, else like its folder."""
    if config.name is None and (config.out / "run.json").is_file():
        return load_manifest(config.out)["config"]["name"]
    return config.name or re.sub(r"[^A-Za-z0-9._-]", "-", config.out.resolve().name)


def check_same_run(config: RunConfig) -> None:
    """Raise StudyError when the folder holds a run of another configuration; the message names what differs."""
    if not (config.out / "run.json").is_file():
        return
    manifest = load_manifest(config.out)
    before, now = manifest["config"], _described(config)
    differing = [(name, before[name], now[name]) for name in _IDENTITY if name in before and before[name] != now[name]]
    for start in manifest["starts"]:
        for editor in set(start["hyperparameters"]) & set(config.editors):
            old, new = start.get("set", {}).get(editor, {}), now["set"].get(editor, {})
            differing += [(f"set {editor}", old, new)] if old != new else []
    for name, old, new in differing:
        raise StudyError(
            f"{config.out} holds a run with {name}={old!r}, asked for is {name}={new!r}: choose another out= or move the folder away"
        )


def _described(config: RunConfig) -> dict:
    return {**config.model_dump(mode="json", exclude={"out"}), "name": run_name(config)}


def write_manifest(config: RunConfig, start: dict) -> None:
    """``run.json`` with this start's provenance appended (or, when it has finished, replaced)."""
    starts = load_manifest(config.out)["starts"] if (config.out / "run.json").is_file() else []
    starts = [earlier for earlier in starts if earlier["id"] != start["id"]] + [start]
    _write(config.out, {"schema_version": MANIFEST_VERSION, "config": _described(config), "starts": starts})


def write_copy(run: Path, target: Path, manifest: dict, records: dict[str, list[Record]]) -> None:
    """Write a copy of a run with another manifest and other records (by file name); it appears whole or not at all."""
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, of_file in records.items():
        append_rows(unfinished / "records" / name, [record.model_dump() for record in of_file])
    _write(unfinished, manifest)
    for file in (run / "folds.json", *run.glob("*.csv")):
        if file.is_file():
            shutil.copy(file, unfinished)
    unfinished.rename(target)


def _write(folder: Path, manifest: dict) -> None:
    write_text(folder / "run.json", json.dumps(manifest, indent=1) + "\n")
