"""Workers: each loads the subject once and turns units of work into records. On a cluster a worker is an actor; it also works without Ray."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...datasets.base import Dataset, list_datasets, register_dataset
from ...datasets.cases import Case
from ...evaluation.loading import check_lengths, load_subject
from ...evaluation.unedited import kept_texts
from ...subjects.subject import Subject
from ...support.artifact import shared_by
from ...support.errors import StudyError
from .. import provenance
from ..config import RunConfig
from ..states import state_files, write_state
from ..work import Part, Work, circumstances_of, make_editor, planned
from .queue import Place, Unit
from .sharing import Sharing

MUST_AGREE = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Job:
    """The input of all workers of a run: the configuration, each dataset's cases, and the ids of the cases that are edited."""

    config: RunConfig
    datasets: Sequence[Dataset]
    everything: Mapping[str, Sequence[Case]]
    chosen: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Result:
    """The result of a unit, or of a part of it.

    Attributes:
        records: new records, in the form in which they are appended to the run's files.
        seconds: the time that the worker spent.
        finished: whether the unit is complete.
        size: how many cases the worker takes at once from now on.
        state: for a walk, the contents of the last state's files that have changed, by suffix (states.py).
        texts: texts that the unedited subject newly generated, for other caches.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    size: int | None = None
    state: dict[str, bytes] = field(default_factory=dict)
    texts: list[dict[str, Any]] = field(default_factory=list)


class Worker:
    """A worker of one run.

    Args:
        ask: calls one of the registry's methods by its name; None if there is only one cache.
    """

    def __init__(self, job: Job, name: str, ask: Callable[..., Any] | None = None, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._job = job
        self._sharing = Sharing(name, ask) if ask else None
        for dataset in job.datasets:
            if dataset.name not in list_datasets():
                register_dataset(dataset)
        self._subject: Subject
        self._parts: dict[tuple[str, str], list[Part]] = {}
        self._prepared: dict[str, Place] = {}
        self._works: dict[tuple[str, str], Work] = {}
        self._size: int | None = None
        self._walked: tuple[Unit, Iterator[Result]] | None = None

    def hello(self) -> dict[str, Any]:
        """Load the subject; returns the worker's node and all that must agree among a run's workers, or the ``problem`` if it cannot work."""
        config = self._job.config
        try:
            self._subject = load_subject(config.subject, config.device, config.dtype)
            for dataset, cases in self._edited().items():
                check_lengths(self._subject, cases, dataset)
        except StudyError as error:
            return {"node": platform.node(), "problem": str(error)}
        return {
            "node": platform.node(),
            "cache": self._sharing.cache if self._sharing else "",
            "library": provenance.library_sha256(),
            **{name: provenance.versions()[name] for name in MUST_AGREE},
            **provenance.model(self._subject),
        }

    def prepare(self, unit: Unit, start: Mapping[str, str]) -> dict[str, Any]:
        """Let an editor learn and gather what it needs at a place; returns its hyperparameters and a description of the preparation."""
        editor = self._work(unit.place, start).editor
        return {"hyperparameters": provenance.hyperparameters(editor), "setup": editor.setup()}

    def edit(self, unit: Unit, start: Mapping[str, str], texts: Sequence[dict] | None = None) -> Result:
        """Edit a batch of cases and return their records.

        ``texts`` are the unedited subject's texts that workers with other caches have generated; None if there is only this cache.
        """
        began = time.perf_counter()
        known = kept_texts(self._subject)
        if unknown := [row for row in texts or () if row not in known]:
            known.append(*unknown)
        before = set(known.rows) if texts is not None else set()
        work = self._work(unit.place, start)
        cases = {case.case_id: case for case in self._job.everything[unit.place[0]]}
        batches = work.batches([cases[case_id] for case_id in unit.cases], self._size)
        records = [record.model_dump() for batch in work.alone(batches) for record in batch]
        # if a batch did not fit into memory, all later batches are smaller; if it left room, they are larger
        self._size = batches.size
        new = [known.rows[key] for key in known.rows.keys() - before] if texts is not None else []
        return Result(records, time.perf_counter() - began, size=self._size, texts=new)

    def begin_walk(
        self, unit: Unit, start: Mapping[str, str], keys: set[tuple[int, int]], state: Mapping[str, bytes]
    ) -> Result:
        """Begin the steps at a place that build on each other, from the last kept state; returns the first records, like :meth:`go_on`."""
        self._walked = unit, self._walk(unit, start, keys, state)
        return self.go_on(unit)

    def go_on(self, unit: Unit) -> Result:
        """The walk's next records, and its state if it has changed."""
        assert self._walked is not None and self._walked[0].place == unit.place
        return next(self._walked[1], Result())

    def _walk(
        self, unit: Unit, start: Mapping[str, str], keys: set[tuple[int, int]], state: Mapping[str, bytes]
    ) -> Iterator[Result]:
        part = self._part(unit.place)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "state.safetensors"
            write_state(file, state)
            written = _times(file)
            for records in self._work(unit.place, start).walk(part.steps, keys, file):
                before, written = written, _times(file)
                files = state_files(file).items()
                changed = {suffix: path.read_bytes() for suffix, path in files if before.get(suffix) != written[suffix]}
                seconds, began = time.perf_counter() - began, time.perf_counter()
                rows = [record.model_dump() for record in records]
                yield Result(rows, seconds, finished=False, state=changed)

    def _edited(self) -> dict[str, list[Case]]:
        job = self._job
        ids = {name: set(chosen) for name, chosen in job.chosen.items()}
        return {name: [case for case in job.everything[name] if case.case_id in ids[name]] for name in ids}

    def _part(self, place: Place) -> Part:
        dataset, editor, number = place
        if (dataset, editor) not in self._parts:
            everything = self._job.everything[dataset]
            by_id = {case.case_id: case for case in everything}
            cases = [by_id[case_id] for case_id in self._job.chosen[dataset]]
            self._parts[dataset, editor] = planned(self._job.config, editor, cases, everything)
        return self._parts[dataset, editor][number]

    def _work(self, place: Place, start: Mapping[str, str]) -> Work:
        """The work at a place, with an editor that has learnt what it needs there."""
        dataset, name, _ = place
        config, everything = self._job.config, self._job.everything[dataset]
        if (dataset, name) not in self._works:
            known = next((work.editor for (_, other), work in self._works.items() if other == name), None)
            editor = known or make_editor(config, name, self._subject)
            circumstances = circumstances_of(config, name, dataset, everything, start)
            self._works[dataset, name] = Work(config, self._subject, editor, circumstances)
        work = self._works[dataset, name]
        if self._prepared.get(name) != place:
            with shared_by(self._sharing) if self._sharing else nullcontext():
                work.learn(self._part(place))
                work.editor.setup()
            self._prepared[name] = place
        return work


def _times(file: Path) -> dict[str, int]:
    """When the files of a state were written."""
    return {suffix: path.stat().st_mtime_ns for suffix, path in state_files(file).items()}
