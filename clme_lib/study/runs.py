"""Runs: a grid of data sets and editors over sampled cases, resumable, with provenance (run_folder.py has the files).

Records are appended batch by batch. Killing the process loses at most the batch in flight; starting the same run again
completes it. Asking for more cases extends it, because samples are nested.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from ..datasets.base import get_dataset
from ..datasets.cases import Case, dataset_sha256, folds, sample_cases, split_cases
from ..datasets.registry import load_cases, selection_ids
from ..editors.base import Editor
from ..editors.registry import load_editor
from ..evaluation.evaluate import Circumstances, score
from ..evaluation.loading import check_lengths, load_subject
from ..evaluation.records import Record
from ..subjects.files import subject_fingerprint
from ..subjects.subject import Subject, torch_device
from ..support.batching import Batches
from ..support.errors import CaseError, StudyError
from ..support.journal import append_rows, write_text
from ..support.locks import only_writer
from ..support.memory import is_out_of_memory
from . import provenance, run_folder
from .config import RunConfig
from .protocols import Protocol, Step, get_protocol
from .states import CASE_FAULTS, States

_EVALUATED_AT_ONCE = 16  # cases, between two records of one state


def run(config: RunConfig) -> pd.DataFrame:
    """Complete a run and return its records.

    Raises:
        StudyError: the folder holds a run of another configuration, or a published one that lacks what is asked for, or
            something else that the user can mend.
    """
    if run_folder.is_published(config.out):
        run_folder.check_same_run(config)
        return _read_published(config, {name: sampled(config, name) for name in config.dataset})
    # what is quickly said comes first: a wrong subject or device, then the cases, then what the folder holds
    torch_device(config.device)
    model = subject_fingerprint(config.subject)
    chosen = {name: sampled(config, name) for name in config.dataset}
    data = {name: dataset_sha256(load_cases(name, config.source)) for name in config.dataset}
    with only_writer(config.out):
        run_folder.check_same_run(config, data, model, {name: len(cases) for name, cases in chosen.items()})
        _complete(config, chosen, data)
    return run_folder.load_run(config.out, chosen=chosen, editors=config.editors)


def _complete(config: RunConfig, chosen: dict[str, list[Case]], data: dict[str, str]) -> None:
    grid = [(name, editor) for name in config.dataset for editor in config.editors]
    pending = [(name, editor) for name, editor in grid if _is_missing(config, name, editor, chosen[name])]
    if pending:
        subject = load_subject(config.subject, config.device, config.dtype)
        run_folder.check_same_run(config, data, subject.fingerprint)
        for name, cases in chosen.items():
            check_lengths(subject, cases, get_dataset(name).file or config.source)
        editors = {name: _load_editor(config, name, subject) for name in dict.fromkeys(name for _, name in pending)}
        start = _start(config, subject, editors, chosen)
        for name, editor in pending:
            _Work(config, subject, editors[editor], name, start).complete(chosen[name])
        run_folder.write_manifest(config, {**start, "finished": provenance.now()})


def sampled(config: RunConfig, dataset: str) -> list[Case]:
    """The cases of a data set that a configuration asks for."""
    cases = load_cases(dataset, config.source)
    if (file := get_dataset(dataset).file) and config.source not in ("embedded", file):
        raise StudyError(f"source={config.source}: {dataset} has its cases in {file}; leave the source out")
    if config.within is not None:
        earlier = run_folder.load_run(config.within, editors=config.editors)
        shared = run_folder.shared_cases(earlier[earlier["dataset"] == dataset], ["editor"])
        cases = [case for case in cases if case.case_id in shared]
        if not cases:
            who = ", ".join(config.editors)
            raise StudyError(f"within={config.within}: that run has no cases of {dataset} by {who}")
    elif config.source == "embedded":
        cases = [case for case in cases if case.case_id not in selection_ids(dataset)]
    # the default is a few, or all where there are fewer
    if config.cases is not None and config.cases > len(cases) and "cases" in config.model_fields_set:
        raise StudyError(
            f"cases={config.cases}: {dataset} has {len(cases)} to draw from; ask for at most so many, or for all of them"
        )
    return sample_cases(cases, config.cases, config.sample)


def _load_editor(config: RunConfig, name: str, subject: Subject) -> Editor:
    values, overrides = config.values, config.set.get(name, {})
    return load_editor(name, subject, values=values, preset=config.preset, seed=config.seed, **overrides)  # type: ignore[arg-type]


def _read_published(config: RunConfig, chosen: dict[str, list[Case]]) -> pd.DataFrame:
    """What a published run has of the chosen cases; an editor may have fewer cases than another."""
    records = run_folder.load_run(config.out, chosen=chosen, editors=config.editors)
    pairs = set(zip(records["dataset"], records["editor"]))
    missing = [f"{editor} on {name}" for name in chosen for editor in config.editors if (name, editor) not in pairs]
    if missing:
        raise StudyError(
            f"{config.out} is a published run and has no records of {', '.join(missing)}: choose another out=, or copy the "
            'folder, take "published" out of its run.json and extend the copy'
        )
    return records


@dataclass(frozen=True)
class Part:
    """Steps that are made by one editor: what a trained one learns from, and the cases that it edits then."""

    steps: list[Step]
    learnt_from: Sequence[Case] = ()
    edited: Sequence[Case] = ()


def planned(config: RunConfig, dataset: str, editor: str, cases: Sequence[Case]) -> list[Part]:
    """The steps of some cases. A trained editor edits the cases of one fold after learning from the other, or all after learning from
    all that it does not edit: as the protocol says."""
    protocol = get_protocol(config.protocol)
    if not run_folder.trains(config, editor):
        return [Part(protocol.plan(cases))]
    everything = load_cases(dataset, config.source)
    if not protocol.folded:
        edited = {case.case_id for case in cases}
        others = [case for case in everything if case.case_id not in edited]
        if len(others) < 2:
            raise StudyError(
                f"cases: {editor} has to learn from cases of {dataset} that are not edited, and {len(others)} are left; edit fewer"
            )
        return [Part(protocol.plan(cases), others, cases)]
    halves = split_cases(everything, config.seed)
    parts = []
    for fold, half in enumerate(halves):
        ids = {case.case_id for case in half}
        if part := [case for case in cases if case.case_id in ids]:
            parts.append(Part(protocol.plan(part), halves[1 - fold], half))
    return parts


def _is_missing(config: RunConfig, dataset: str, editor: str, cases: Sequence[Case]) -> bool:
    keys = run_folder.recorded(config, dataset, editor, load_cases(dataset, config.source))
    plans = planned(config, dataset, editor, cases)
    return not all(run_folder.is_recorded(step, keys) for part in plans for step in part.steps)


class _Work:
    """What one start of a run has to do with a data set and an editor."""

    def __init__(self, config: RunConfig, subject: Subject, editor: Editor, dataset: str, start: dict) -> None:
        self.config, self.subject, self.editor, self.dataset = config, subject, editor, dataset
        self.file = run_folder.records_file(config, dataset, editor.name)
        self.halves = split_cases(load_cases(dataset, config.source), config.seed)
        self.circumstances = Circumstances(
            editor.name,
            run=run_folder.run_name(config),
            source=get_dataset(dataset).file or config.source,
            preset=config.preset,
            seed=config.seed,
            protocol=config.protocol,
            metrics=config.metrics if config.scored else None,
            folds={case.case_id: fold for fold, half in enumerate(self.halves) for case in half},
            start=start["id"],
            library=start["library"],
            commit=start["commit"],
        )

    def complete(self, cases: Sequence[Case]) -> None:
        """Edit and score what has not been recorded yet."""
        keys = run_folder.recorded(self.config, self.dataset, self.editor.name, [*self.halves[0], *self.halves[1]])
        plans = planned(self.config, self.dataset, self.editor.name, cases)
        total = sum(len(step.evaluated) for part in plans for step in part.steps)
        with tqdm(total=total, initial=len(keys), desc=f"{self.dataset} {self.editor.name}", unit="case") as self.bar:
            for part in plans:
                if part.learnt_from:
                    self.editor.fit(part.learnt_from, edited=part.edited)
                alone = self._alone(part.steps, keys)
                self._edit_alone(alone)
                self._walk(part.steps, keys | {(1, case.case_id) for case in alone})

    def _alone(self, steps: Sequence[Step], keys: set[tuple[int, int]]) -> list[Case]:
        """The cases of missing steps that edit and evaluate one case and are not built upon; none where the protocol has its own way."""
        protocol = type(get_protocol(self.config.protocol))
        if (protocol.edit, protocol.join) != (Protocol.edit, Protocol.join):
            return []
        built_upon = {step.after for step in steps}
        return [
            step.edited[0]
            for number, step in enumerate(steps)
            if number not in built_upon and step.after is None and step.edited == step.evaluated
            and len(step.edited) == 1 and not run_folder.is_recorded(step, keys)
        ]  # fmt: skip

    def _walk(self, steps: Sequence[Step], keys: set[tuple[int, int]]) -> None:
        """The steps that build on each other, or evaluate several cases, in order; those that nothing missing needs are left out."""
        if all(run_folder.is_recorded(step, keys) for step in steps):
            return
        file = run_folder.state_file(self.config, self.dataset, self.editor.name)
        states = States(file, get_protocol(self.config.protocol), self.editor, steps)
        needed: set[int] = set()
        for number in reversed(range(len(steps))):
            if number in needed or not run_folder.is_recorded(steps[number], keys):
                before = steps[number].after
                needed |= {number} if before is None or number in states else {number, before}
        for number in sorted(needed):
            state, position = states.reach(number), steps[number].position
            missing = [case for case in steps[number].evaluated if (position, case.case_id) not in keys]
            failed = [case for case in missing if case.case_id in state.failed]
            self._record(
                [
                    self.circumstances.record(self.subject, case, position, error=state.failed[case.case_id])
                    for case in failed
                ]
            )
            left = [case for case in missing if case.case_id not in state.failed]
            for first in range(0, len(left), _EVALUATED_AT_ONCE):
                part = left[first : first + _EVALUATED_AT_ONCE]
                edits = [state.edit] * len(part)
                self._record(score(self.subject, part, edits, self.circumstances, position=position, logs=state.logs))

    def _edit_alone(self, cases: Sequence[Case]) -> None:
        """Cases that are edited and evaluated each on its own: a batch at a time, each row of it another edited model."""
        ordered = sorted(cases, key=lambda case: (self._cost(case), case.case_id))
        for batch in (batches := Batches(ordered, self.config.batch_size, self.subject.device)):
            try:
                self._record(self._attempt(batch))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) > 1:
                    batches.did_not_fit(batch)
                    continue
                reason = "the device's memory does not suffice for this case alone"
                self._record([self.circumstances.record(self.subject, batch[0], error=reason)])

    def _cost(self, case: Case) -> int:
        try:
            return self.editor.cost(case)
        except CaseError:
            return 0  # it fails when it is edited, and is recorded as failed

    def _attempt(self, batch: list[Case]) -> list[Record]:
        """Records of a batch. If it fails, its cases are tried alone, so that a bad case spoils no other's result. A fault of the
        environment (a damaged file, a full disk) is no case's fault, and ends the run."""
        try:
            edits = self.editor.edit(batch, batch_size=len(batch))
            return score(self.subject, batch, edits, self.circumstances)
        except CASE_FAULTS as error:
            if len(batch) > 1:
                return [record for case in batch for record in self._attempt([case])]
            return [self.circumstances.record(self.subject, batch[0], error=f"{type(error).__name__}: {error}")]

    def _record(self, records: list[Record]) -> None:
        append_rows(self.file, [record.model_dump() for record in records])
        self.bar.update(len(records))


def _start(config: RunConfig, subject: Subject, editors: dict[str, Editor], chosen: dict[str, list[Case]]) -> dict:
    """Record provenance before the first case."""
    cases = {name: load_cases(name, config.source) for name in config.dataset}
    write_text(config.out / "folds.json", json.dumps({name: folds(cases[name], config.seed) for name in cases}) + "\n")
    start = {
        "id": secrets.token_hex(4),
        "started": provenance.now(),
        "commit": provenance.commit(),
        "library": provenance.library_sha256(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(subject),
        "dtype": subject.dtype_name,
        "model": subject.fingerprint,
        "data": {name: dataset_sha256(loaded) for name, loaded in cases.items()},
        "cases": {name: len(sample) for name, sample in chosen.items()},
        "sample": config.sample,
        "set": {name: config.set[name] for name in editors if name in config.set},
        "hyperparameters": {name: provenance.hyperparameters(editor) for name, editor in editors.items()},
        "setup": {name: prepared for name, editor in editors.items() if (prepared := editor.setup())},
    }
    run_folder.write_manifest(config, start)
    return start
