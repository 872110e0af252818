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
from typing import Any

import pandas as pd
from tqdm import tqdm

from ..datasets.cases import Case, dataset_sha256, folds
from ..datasets.registry import load_cases
from ..editors.base import Editor
from ..editors.registry import load_editor
from ..evaluation.evaluate import failed, score
from ..evaluation.records import Record
from ..subjects.subject import Subject, load_subject, torch_device
from ..support.batching import Batches
from ..support.errors import StudyError
from ..support.journal import append_rows, write_text
from ..support.memory import is_out_of_memory, raising_when_full
from . import provenance
from .config import RunConfig
from .plan import sampled
from .run_folder import _check_same_run, _missing, _records_file, _write_manifest, is_published, load_run


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
