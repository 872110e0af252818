"""A run's folder: its records, its manifest, and what two starts of one run must agree on.

::

    run.json                      configuration and, of each start, an id and its provenance
    folds.json                    case ids of both folds, per dataset
    records/<dataset>.<editor>.jsonl
    states/<dataset>.<editor>.safetensors    of protocols of many edits, the last state

Records are only appended. A published run (copies.py) is only read.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..datasets.base import list_datasets
from ..datasets.cases import Case, dataset_sha256, folds
from ..datasets.registry import load_cases
from ..editors.registry import get_editor, list_editors, resolve_hparams
from ..evaluation.records import FAILED, Record, frame, read_records
from ..subjects.settings import load_settings
from ..subjects.subject import torch_dtype
from ..support.errors import StudyError
from ..support.journal import append_rows, write_text
from ..support.reading import read_json
from ..support.schema import Schema, parse
from . import provenance
from .config import RunConfig
from .protocols import Step, get_protocol

MANIFEST_VERSION = 2
# what two starts of one run must agree on; the number of cases may grow, batching is free
_IDENTITY = ("name", "subject", "source", "preset", "values", "seed", "dtype", "protocol", "metrics")


class _Start(Schema, extra="allow"):
    """The parts of a start's provenance that later starts rely on."""

    id: str
    library: str
    commit: str
    dtype: str
    model: str
    data: dict[str, str]
    cases: dict[str, int]
    sample: int
    hyperparameters: dict[str, dict[str, Any]]


class _Manifest(Schema, extra="allow"):
    schema_version: Literal[2]
    config: dict[str, Any]
    starts: list[_Start]


def load_run(folder: Path | str, *, editors: Sequence[str] | None = None) -> pd.DataFrame:
    """Records of a run folder (:func:`clme_lib.evaluation.records.frame`); optionally only of given editors.

    Raises:
        StudyError: there are no records, or a file is damaged.
    """
    folder = Path(folder)
    table = frame(read_records(record_files(folder)))
    if (folder / "run.json").is_file():
        config = load_manifest(folder)["config"]
        for name, field in (("run", "name"), ("subject", "subject")):
            if len(strange := table[table[name] != config[field]]):
                row = strange.iloc[0]
                file = f"{row['dataset']}.{row['editor']}.jsonl"
                raise StudyError(
                    f"{folder}: {file} has records of {name} {row[name]!r}, but run.json names {config[field]!r}; move the file away"
                )
    if editors is not None:
        table = table[table["editor"].isin(editors)]
    ranks = {name: rank for names in (list_datasets(), list_editors()) for rank, name in enumerate(names)}
    placed = table.assign(_dataset=table["dataset"].map(ranks), _editor=table["editor"].map(ranks))
    order = placed.sort_values(["_dataset", "_editor", "position", "case_id"], kind="stable").index
    return table.loc[order].reset_index(drop=True)


def check_cases(folder: Path) -> None:
    """Raise StudyError if a run has a record of a case that its dataset does not have, or that has changed since."""
    for file in record_files(folder):
        for record in read_records([file]):
            hashes = _case_hashes(record.dataset, record.source)
            if hashes.get(record.case_id) != record.case_sha256:
                what = f"case {record.case_id} of {record.dataset} ({record.source})"
                raise StudyError(f"{file}: {what} does not exist, or has changed since it was recorded")


@lru_cache(maxsize=8)
def _case_hashes(dataset: str, source: str) -> dict[int, str]:
    return {case.case_id: case.sha256 for case in load_cases(dataset, source)}


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
    """The file of the records of a dataset and editor."""
    return config.out / "records" / f"{dataset}.{editor}.jsonl"


def state_file(config: RunConfig, dataset: str, editor: str) -> Path:
    """Where the last state is kept (states.py)."""
    return config.out / "states" / f"{dataset}.{editor}.safetensors"


def recorded(config: RunConfig, dataset: str, editor: str, cases: Iterable[Case]) -> set[tuple[int, int]]:
    """Position and case id of every record of a dataset and editor that need not be made again: a failed case is tried again
    when that is asked for, or when the library has changed. Among many edits in one model it is not, since the later edits were made
    without it.

    Args:
        cases: all of the dataset.

    Raises:
        StudyError: a record is wrong, of another run, or of a case that is not there or has changed since.
    """
    file, hashes = records_file(config, dataset, editor), {case.case_id: case.sha256 for case in cases}
    library, keys, alone = provenance.library_sha256(), set(), get_protocol(config.protocol).folded
    for record in read_records([file]):
        what = f"{file}: case {record.case_id} of {dataset}"
        if (record.run, record.subject) != (run_name(config), config.subject):
            raise StudyError(f"{what} belongs to the run {record.run!r} of {record.subject!r}; move the file away")
        if hashes.get(record.case_id) != record.case_sha256:
            raise StudyError(
                f"{what} does not exist, or has changed since it was recorded; move the run folder away or choose another out="
            )
        if record.state != FAILED or not alone or not (config.retry_failed or record.library != library):
            keys.add((record.position, record.case_id))
    return keys


def edited_ids(config: RunConfig, chosen: Sequence[Case]) -> list[int]:
    """Ids of the edited cases among all that a configuration asks for, in their order; the others are held out."""
    return [case.case_id for case in chosen[: len(chosen) - config.held_out]]


def is_recorded(step: Step, keys: set[tuple[int, int]]) -> bool:
    """Whether every case that a step evaluates is among these positions and case ids."""
    return all((step.position, case.case_id) in keys for case in step.scored)


def is_of_sample(edited: Set[int], apart: Set[int], position: int, case_id: int, held_out: bool) -> bool:
    """Whether a record belongs to a sample: a state that holds no more edits than the sample has, and a case of it. A run that grew has
    more states than a new run of the same size, but all of them are states of the same sequence.

    Args:
        edited: ids of the sample's edited cases; ``apart``: of its held-out cases.
    """
    return position <= len(edited) and case_id in (apart if held_out else edited)


def load_manifest(folder: Path | str) -> dict:
    """The ``run.json`` of a run folder; StudyError if it does not exist or cannot be read."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise StudyError(f"{file}: no such file; is {folder} a run folder?")
    manifest = read_json(file)
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION:
        raise StudyError(
            f"{file}: schema_version {version!r}, expected {MANIFEST_VERSION}; older runs are converted "
            "by `python results/migrate.py FOLDER NEW_FOLDER`"
        )
    parse(_Manifest, manifest, str(file), strict=True)
    for field in ("name", "subject"):
        if not isinstance(value := manifest["config"].get(field), str):
            raise StudyError(f"{file}: config.{field}: expected text, not {value!r}")
    return manifest


def is_published(folder: Path) -> bool:
    """Whether a run folder is a published run, which is never written to."""
    return (folder / "run.json").is_file() and "published" in load_manifest(folder)


def run_name(config: RunConfig) -> str:
    """A run's name in its records: the requested name, else its earlier name, else its folder's name."""
    if config.name is None and (config.out / "run.json").is_file():
        return load_manifest(config.out)["config"]["name"]
    return config.name or re.sub(r"[^A-Za-z0-9._-]", "-", config.out.resolve().name)


def check_same_run(
    config: RunConfig,
    data: Mapping[str, str] | None = None,
    model: str | None = None,
    edited: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Raise StudyError if the folder's records were made with anything different from what would be used now; the message names it.
    For a published run, which is only read, only the configuration is compared.

    Args:
        data: SHA-256 of the cases, by dataset.
        model: the subject's fingerprint, if known.
        edited: ids of the edited cases in their order, by dataset.
    """
    file = config.out / "run.json"
    if not file.is_file():
        if any((config.out / "records").glob("*.jsonl")):
            raise StudyError(
                f"{config.out}: has records, but no run.json that says what made them: restore it, or choose another out="
            )
        return
    manifest = load_manifest(config.out)
    before, now = manifest["config"], _described(config)
    # A metric that a published run lacks is shown as not measured.
    identity = [name for name in _IDENTITY if name in before and not ("published" in manifest and name == "metrics")]
    differing = [(name, before[name], now[name]) for name in identity if before[name] != now[name]]
    for start in () if "published" in manifest else manifest["starts"]:
        differing += [
            (f"the cases of {name}", start["data"].get(name, digest), digest) for name, digest in (data or {}).items()
        ]
        if not get_protocol(config.protocol).folded:
            # In which order cases are edited is the sample's, and what a trained editor learns from are all others.
            differing.append(("sample", start["sample"], config.sample))
            trained = any(trains(config, name) for name in set(start["hyperparameters"]) & set(config.editors))
            before_it = start["cases"] if trained else {}
            differing += [
                (f"cases of {name}", before_it.get(name, len(ids)), len(ids)) for name, ids in (edited or {}).items()
            ]
            for name, ids in (edited or {}).items():
                earlier = start.get("edited", {}).get(name, [])
                differing += [
                    (f"case {n} of the edits of {name}", *pair) for n, pair in enumerate(zip(earlier, ids), 1)
                ]
            # a run's datasets may have been held out differently
            if trained and set(start["cases"]) & set(edited or {}):
                differing.append(("held_out", start.get("held_out", 0), config.held_out))
        differing.append(("dtype", start["dtype"], str(torch_dtype(config.dtype)).removeprefix("torch.")))
        differing.append(("model", start["model"], model or start["model"]))
        for editor in set(start["hyperparameters"]) & set(config.editors):
            differing.append((f"set {editor}", start.get("set", {}).get(editor, {}), now["set"].get(editor, {})))
            if config.accept != "library" and "code" in start["hyperparameters"][editor]:
                code = start["hyperparameters"][editor]["code"]
                differing.append((f"code of {editor}", code, provenance.code_sha256(get_editor(editor))))
            hparams = _comparable_hparams(config, editor)
            made_with = start["hyperparameters"][editor].get("values", {})
            # A hyperparameter that did not exist at the time had its default.
            defaults = {name: field.default for name, field in get_editor(editor).Hyperparameters.model_fields.items()}
            differing += [
                (f"{editor}.{name}", made_with.get(name, defaults[name]), value) for name, value in hparams.items()
            ]
    remedy = "choose another out= or move the folder away"
    if "published" not in manifest and config.accept != "library":
        differing += [("library", start["library"], provenance.library_sha256()) for start in manifest["starts"][-1:]]
    for name, old, new in differing:
        if json.dumps(old) != json.dumps(new):
            if name == "library" or name.startswith("code of "):
                remedy += ", or pass --accept library if its changes cannot affect results"
            raise StudyError(
                f"{file}: {config.out} holds a run with {name}={old!r}, but {name}={new!r} was requested: {remedy}"
            )


def check_statistics(config: RunConfig, setup: Mapping[str, dict]) -> None:
    """Raise StudyError if an editor's second moments (``statistics`` of what it prepared, by editor) are not those of the run's earlier
    starts: a folder of texts or a dataset on the hub may have changed."""
    file = config.out / "run.json"
    for start in load_manifest(config.out)["starts"] if file.is_file() else ():
        for editor, prepared in setup.items():
            now = json.loads(json.dumps(prepared))  # layers are text in JSON
            if start.get("setup", {}).get(editor, now).get("statistics") != now.get("statistics"):
                raise StudyError(
                    f"{file}: {editor} gathered its statistics from other texts when the run started ({start['started']}) than are there now: "
                    "restore the corpus, or choose another out="
                )


def hparams_of(config: RunConfig, editor: str) -> Schema:
    """An editor's hyperparameters in a run."""
    options: dict[str, Any] = {"values": config.values, "preset": config.preset, **config.set.get(editor, {})}
    return resolve_hparams(editor, config.subject, **options)


def trains(config: RunConfig, editor: str) -> bool:
    """Whether an editor of a run must learn from cases before it edits."""
    return get_editor(editor).trains(hparams_of(config, editor))


def _comparable_hparams(config: RunConfig, editor: str) -> dict[str, Any]:
    """An editor's hyperparameters as they would be now, without layers that are the paper's (they move with the subject's depth)."""
    hparams = hparams_of(config, editor).model_dump(mode="json")
    own = load_settings(config.subject).editors.get(editor, {}) if config.values == "subject" else {}
    moved = {"layer", "layers"} - set(own) - set(config.set.get(editor, {}))
    return {name: value for name, value in hparams.items() if name not in moved}


def _described(config: RunConfig) -> dict:
    # A notebook's configuration has more, which is not the run's.
    return {**config.model_dump(mode="json", include=set(RunConfig.model_fields) - {"out"}), "name": run_name(config)}


def begin(
    config: RunConfig,
    model: dict,
    hyperparameters: dict[str, dict],
    setup: dict[str, dict],
    chosen: dict[str, list[Case]],
) -> dict:
    """Record provenance before the first case: a start of the run.

    Args:
        model: what :func:`clme_lib.study.provenance.model` says of the subject.
        hyperparameters: those of the editors in this start; ``setup``: what these editors prepared.
    """
    cases = {name: load_cases(name, config.source) for name in config.dataset}
    write_text(config.out / "folds.json", json.dumps({name: folds(cases[name], config.seed) for name in cases}) + "\n")
    start = {
        "id": secrets.token_hex(4),
        "started": provenance.now(),
        "commit": provenance.commit(),
        "library": provenance.library_sha256(),
        "versions": provenance.versions(),
        **model,
        "data": {name: dataset_sha256(loaded) for name, loaded in cases.items()},
        "cases": {name: len(sample) - config.held_out for name, sample in chosen.items()},
        "held_out": config.held_out,
        "sample": config.sample,
        "set": {name: config.set[name] for name in hyperparameters if name in config.set},
        "hyperparameters": hyperparameters,
        "setup": setup,
    }
    if not get_protocol(config.protocol).folded:
        start["edited"] = {name: edited_ids(config, sample) for name, sample in chosen.items()}
    write_manifest(config, start)
    return start


def write_manifest(config: RunConfig, start: dict) -> None:
    """Write ``run.json`` with this start's provenance appended (or, once the start has finished, replaced)."""
    starts = load_manifest(config.out)["starts"] if (config.out / "run.json").is_file() else []
    starts = [earlier for earlier in starts if earlier["id"] != start["id"]] + [start]
    _write(config.out, {"schema_version": MANIFEST_VERSION, "config": _described(config), "starts": starts})


def write_copy(run: Path, target: Path, manifest: dict, records: dict[str, list[Record]]) -> None:
    """Write a copy of a run with another manifest and other records (by file name); it appears completely or not at all."""
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
