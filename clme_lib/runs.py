"""Runs: a grid of data sets and editors over sampled cases, resumable, with provenance.

A run is a folder::

    run.json                      configuration and, per start, provenance
    folds.json                    case ids of both folds, per data set
    records/<data set>.<editor>.jsonl

Records are appended batch by batch. Killing the process loses at most the batch in flight; starting the same run again
completes it. Asking for more cases extends it, because samples are nested. A published run (publish.py) is only read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, BeforeValidator, Field
from tqdm import tqdm

from . import provenance
from .batches import Batches
from .datasets import dataset_sha256, folds, load_cases, sample_cases, selection_ids
from .datasets.cases import Case
from .editors import EDITORS, load_editor
from .editors.base import Editor
from .errors import StudyError
from .evaluation import failed, score
from .hyperparameters import Schema, parse
from .jsonl import append_rows, read_rows, write_text
from .memory import is_out_of_memory, raising_when_full
from .prompts import DATASETS, Preset
from .records import Record, frame, read_records
from .seeds import DEFAULT_SEED
from .subjects import Subject, load_subject, torch_device

# what two starts of one run must agree on; the number of cases may grow, batching is free
_IDENTITY = ("name", "subject", "source", "preset", "values", "seed", "dtype")


def _split(value: Any) -> Any:
    """``"none,grace"`` as a list: papermill's -p and a shell pass lists as text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def named(known: Sequence[str], what: str) -> Any:
    """The type of a configuration's list of names: each among ``known``, kept once, and at least one."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"no {what} given; known: {', '.join(known)}")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return Annotated[Names, AfterValidator(check)]


def _batch_size(value: Any) -> Any:
    if value != "auto" and not (str(value).isdigit() and int(value) >= 1):
        raise ValueError("a whole number of at least 1 is needed, or auto")
    return value


class RunConfig(Schema):
    """What to run. Lists may be given as comma-separated text.

    ``cases`` is per data set (None: all) and ``sample`` says which ones: samples of one number are nested, of another
    number they are other random cases. ``within`` draws them from the cases of an earlier run, to repeat a part of
    it; only cases are drawn that all of the editors have there. ``batch_size`` cases are edited and scored together; with ``auto`` the
    number grows as long as memory is left. A batch that does not fit is halved. ``scored=False`` leaves the scores to ``clme score``. The embedded sets' selection cases are never drawn. ``seed`` is that of every random draw of the study.
    """

    subject: str = "smollm2-135m"
    dataset: named(DATASETS, "data set") = DATASETS  # type: ignore[valid-type]
    editors: named(tuple(EDITORS), "editor") = ("none", "ft-l", "grace")  # type: ignore[valid-type]
    cases: int | None = Field(default=8, ge=1)
    seed: int = DEFAULT_SEED
    source: str = "embedded"
    preset: Preset = "clean"
    values: str = Field(default="subject", pattern="^(subject|transferred)$")
    device: str = "auto"
    dtype: str = "auto"
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_batch_size)] = 8
    sample: int = 0
    within: Path | None = None
    scored: bool = True
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    out: Path = Path("runs/run")


def make_config(**values: Any) -> RunConfig:
    """A checked configuration; StudyError names the field and what was expected."""
    return parse(RunConfig, values, "run configuration")


def run(config: RunConfig) -> pd.DataFrame:
    """Complete a run and return its records.

    Raises:
        StudyError: the folder holds a run of another configuration, or a published one that lacks what is asked for, or
            something else that the user can mend.
    """
    chosen = {name: sampled(config, name) for name in config.dataset}
    if is_published(config.out):
        return _read_published(config, chosen)
    pending = [(name, editor) for name in config.dataset for editor in config.editors
               if _missing(config, name, editor, chosen[name])]  # fmt: skip
    _check_same_run(config)
    if pending:
        with raising_when_full(torch_device(config.device)):
            subject = load_subject(config.subject, config.device, config.dtype)
            editors = {name: load_editor(name, subject, values=config.values, preset=config.preset, seed=config.seed)  # type: ignore[arg-type]
                       for name in dict.fromkeys(editor for _, editor in pending)}  # fmt: skip
            start = _start(config, subject, editors, chosen)
            for name, editor in pending:
                missing = _missing(config, name, editor, chosen[name])
                _complete(config, subject, editors[editor], chosen[name], missing)
            _write_manifest(config, {**start, "finished": provenance.now()})
    return load_run(config.out, chosen=chosen, editors=config.editors)


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
    order = table["editor"].map({name: n for n, name in enumerate(EDITORS)})
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


def _read_published(config: RunConfig, chosen: dict[str, list[Case]]) -> pd.DataFrame:
    """What a published run has of the chosen cases; an editor may have fewer cases than another."""
    _check_same_run(config)
    table = load_run(config.out, chosen=chosen, editors=config.editors)
    there = set(zip(table["dataset"], table["editor"]))
    if missing := [
        f"{editor} on {name}" for name in chosen for editor in config.editors if (name, editor) not in there
    ]:
        raise StudyError(
            f"{config.out} is a published run and has no records of {', '.join(missing)}: choose another out=, or copy the "
            'folder, take "published" out of its run.json and extend the copy'
        )
    return table


def sampled(config: RunConfig, dataset: str) -> list[Case]:
    """The cases of a data set that a configuration asks for."""
    cases = load_cases(dataset, config.source)
    if config.within is not None:
        earlier = load_run(config.within, editors=config.editors)
        earlier = earlier[earlier["dataset"] == dataset]
        each = [set(mine["case_id"]) for _, mine in earlier.groupby("editor")]
        recorded = set.intersection(*each) if each else set()
        cases = [case for case in cases if case.case_id in recorded]
        if not cases:
            raise StudyError(
                f"within={config.within}: that run has no cases of {dataset} by {', '.join(config.editors)}"
            )
    elif config.source == "embedded":
        cases = [case for case in cases if case.case_id not in selection_ids(dataset)]
    return sample_cases(cases, config.cases, config.sample)


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


def _complete(config: RunConfig, subject: Subject, editor: Editor, cases: list[Case], missing: list[Case]) -> None:
    """Edit and score the missing cases, batch by batch."""
    file = _records_file(config, missing[0].dataset, editor.name)
    everything = load_cases(missing[0].dataset, config.source)
    halves = folds(everything, config.seed)
    folds_of = {case_id: fold for fold, ids in enumerate(halves) for case_id in ids}
    # a trained editor edits the cases of one fold after learning from the other
    parts = [missing]
    if editor.needs_training:
        parts = [part for fold in (0, 1) if (part := [case for case in missing if folds_of[case.case_id] == fold])]
    common: dict[str, Any] = {
        "preset": config.preset,
        "run": config.name,
        "source": config.source,
        "folds_of": folds_of,
    }
    scoring = {"seed": config.seed, "scored": config.scored}
    description = f"{missing[0].dataset} {editor.name}"
    with tqdm(total=len(cases), initial=len(cases) - len(missing), desc=description, unit="case") as bar:
        for part in parts:
            if editor.needs_training:
                fold = folds_of[part[0].case_id]
                halves_of = [[case for case in everything if folds_of[case.case_id] == one] for one in (0, 1)]
                editor.fit(halves_of[1 - fold], edited=halves_of[fold])
            ordered = sorted(part, key=lambda case: (editor.cost(case), case.case_id))
            batches = Batches(ordered, config.batch_size, subject.device)
            for batch in batches:
                try:
                    records = _attempt(subject, editor, batch, scoring, common)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(batch) > 1:
                        batches.did_not_fit(batch)
                        continue
                    reason = "the device's memory does not suffice for this case alone"
                    records = [failed(subject, batch[0], editor.name, error=reason, **common)]
                append_rows(file, [record.row() for record in records])
                bar.update(len(batch))


def _attempt(subject: Subject, editor: Editor, batch: list[Case], scoring: dict, common: dict) -> list[Record]:
    """Records of a batch. If it fails, its cases are tried alone, so that one bad case spoils no other's result."""
    try:
        edits = editor.edit(batch, batch_size=len(batch))
        return score(subject, batch, edits, **scoring, **common)
    except (StudyError, ValueError, ArithmeticError) as error:
        if len(batch) > 1:
            return [record for case in batch for record in _attempt(subject, editor, [case], scoring, common)]
        return [failed(subject, batch[0], editor.name, error=f"{type(error).__name__}: {error}", **common)]


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


def _start(config: RunConfig, subject: Subject, editors: dict[str, Editor], chosen: dict[str, list[Case]]) -> dict:
    """Record provenance before the first case."""
    everything = {name: load_cases(name, config.source) for name in config.dataset}
    halves = {name: folds(cases, config.seed) for name, cases in everything.items()}
    write_text(config.out / "folds.json", json.dumps(halves) + "\n")
    start = {
        "started": provenance.now(),
        "commit": provenance.commit(),
        "library": provenance.library_sha256(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(subject),
        "dtype": subject.dtype_name,
        "model": subject.fingerprint,
        "data": {name: dataset_sha256(cases) for name, cases in everything.items()},
        "cases": {name: len(cases) for name, cases in chosen.items()},
        "sample": config.sample,
        "hyperparameters": {name: provenance.hyperparameters(editor) for name, editor in editors.items()},
        "setup": {name: made for name, editor in editors.items() if (made := editor.setup())},
    }
    _write_manifest(config, start)
    return start


def _write_manifest(config: RunConfig, start: dict) -> None:
    """``run.json`` with this start's provenance appended (or, when it has finished, replaced)."""
    file = config.out / "run.json"
    starts = load_manifest(config.out)["starts"] if file.is_file() else []
    starts = [one for one in starts if one["started"] != start["started"]] + [start]
    content = {"config": config.model_dump(mode="json", exclude={"out"}), "starts": starts}
    write_text(file, json.dumps(content, indent=1) + "\n")
