"""A run's folder: its records, its manifest, and what two starts of one run must agree on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..datasets.cases import Case
from ..editors.registry import list_editors
from ..evaluation.records import frame, read_records
from ..support.errors import StudyError
from ..support.journal import read_rows, write_text
from .config import RunConfig

# what two starts of one run must agree on; the number of cases may grow, batching is free
_IDENTITY = ("name", "subject", "source", "preset", "values", "seed", "dtype")


def load_run(
    folder: Path | str, *, chosen: dict[str, list[Case]] | None = None, editors: Sequence[str] | None = None
) -> pd.DataFrame:
    """Records of a run folder; optionally only of given cases and editors."""
    folder = Path(folder)
    files = sorted((folder / "records").glob("*.jsonl"))
    if not files:
        raise StudyError(f"{folder}: no records; expected {folder}/records/*.jsonl")
    table = frame(read_records(files))
    if chosen is not None:
        wanted = {(name, case.case_id) for name, cases in chosen.items() for case in cases}
        keys = zip(table["dataset"], table["case_id"])
        table = table[[key in wanted for key in keys]]
    if editors is not None:
        table = table[table["editor"].isin(editors)]
    order = table["editor"].map({name: n for n, name in enumerate(list_editors())})
    return (
        table.assign(_order=order)
        .sort_values(["dataset", "_order", "case_id"])
        .drop(columns="_order")
        .reset_index(drop=True)
    )


def load_manifest(folder: Path | str) -> dict:
    """The ``run.json`` of a run folder."""
    file = Path(folder) / "run.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{file}: cannot be read: {error}; is {folder} a run folder?") from error


def is_published(folder: Path) -> bool:
    """Whether a run folder is a published one, which is only read."""
    return (folder / "run.json").is_file() and "published" in load_manifest(folder)


def _records_file(config: RunConfig, dataset: str, editor: str) -> Path:
    return config.out / "records" / f"{dataset}.{editor}.jsonl"


def _missing(config: RunConfig, dataset: str, editor: str, cases: list[Case]) -> list[Case]:
    done = {row["case_id"]: row["case_sha256"] for row in read_rows(_records_file(config, dataset, editor))}
    for case in cases:
        if done.get(case.case_id, case.sha256) != case.sha256:
            raise StudyError(
                f"{_records_file(config, dataset, editor)}: case {case.case_id} of {dataset} has changed since it was "
                "recorded; move the run folder away or choose another out="
            )
    return [case for case in cases if case.case_id not in done]


def _check_same_run(config: RunConfig) -> None:
    if not (config.out / "run.json").is_file():
        return
    before = load_manifest(config.out)["config"]
    now = config.model_dump(mode="json")
    for field in _IDENTITY:
        if before.get(field) != now[field]:
            raise StudyError(
                f"{config.out} holds a run with {field}={before.get(field)!r}, asked for is {field}={now[field]!r}: "
                "choose another out= or move the folder away"
            )


def _write_manifest(config: RunConfig, start: dict) -> None:
    """``run.json`` with this start's provenance appended (or, when it has finished, replaced)."""
    file = config.out / "run.json"
    starts = load_manifest(config.out)["starts"] if file.is_file() else []
    starts = [one for one in starts if one["started"] != start["started"]] + [start]
    content = {"config": config.model_dump(mode="json", exclude={"out"}), "starts": starts}
    write_text(file, json.dumps(content, indent=1) + "\n")
