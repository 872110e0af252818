"""The one process that plans a run, asks workers for units of it, and alone writes its folder; workers are Ray actors (worker.py).

A worker that dies is replaced, and its units are assigned again (queue.py limits how often). A record is written once, whoever sends it.
Killing the driver loses the current batches; the same command resumes the run, with Ray or without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...datasets.base import get_dataset
from ...datasets.cases import Case
from ...datasets.registry import load_cases
from ...support.errors import StudyError
from ...support.journal import append_rows
from .. import provenance, run_folder
from ..config import RunConfig
from ..states import state_files, write_state
from ..work import circumstances_of
from .connection import connected, resources_of, room
from .crew import Crew, Member
from .queue import Queue, Unit, groups_of
from .sharing import Registry
from .worker import MUST_AGREE, Job, Result, Worker

_FIRST_SIZE = 8  # of a batch, where its size is left to the workers


def complete_on_ray(
    config: RunConfig, chosen: dict[str, list[Case]], data: dict[str, str], pending: Sequence[tuple[str, str]]
) -> None:
    """Complete a run on a cluster, or on this machine's workers.

    Args:
        data: SHA-256 of each dataset's cases.
        pending: datasets and editors of which records are missing.

    Raises:
        StudyError: Ray is not installed or cannot be reached, no worker can start, workers differ from this process, or
            something ends the run that ends it in one process.
    """
    everything = {name: load_cases(name, config.source) for name in config.dataset}
    ids = {name: [case.case_id for case in cases] for name, cases in chosen.items()}
    datasets = [replace(get_dataset(name), load=_no_cases) for name in config.dataset]
    with connected(config) as ray:
        job = ray.put(Job(config, datasets, everything, ids))
        # on the driver's node, so that it does not die with another node
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        placed = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        registry = ray.remote(Registry).options(**placed).remote()
        options = resources_of(ray, config)

        def start_worker(name: str) -> Any:
            actor = ray.remote(_Actor).options(max_restarts=0, scheduling_strategy="SPREAD", **options)
            return actor.remote(job, name, registry, int(options["num_cpus"]))

        crew = Crew(ray, start_worker, lambda: room(ray, config), registry)
        Driver(config, chosen, everything, data, pending, crew).run()


def _no_cases(source: str) -> Sequence[Case]:
    raise StudyError(f"workers are given their cases and cannot load any from {source}")


class _Actor(Worker):
    """A worker as an actor, which reaches the registry through Ray."""

    def __init__(self, job: Job, name: str, registry: Any, threads: int) -> None:
        import ray

        super().__init__(job, name, lambda method, *args: ray.get(getattr(registry, method).remote(*args)), threads)


class Driver:
    """Completes the ``pending`` part of a run with a crew."""

    def __init__(
        self,
        config: RunConfig,
        chosen: dict[str, list[Case]],
        everything: Mapping[str, Sequence[Case]],
        data: dict[str, str],
        pending: Sequence[tuple[str, str]],
        crew: Crew,
    ) -> None:
        self._config, self._chosen, self._everything, self._data = config, chosen, everything, data
        self._crew = crew
        self._keys = {pair: run_folder.recorded(config, *pair, everything[pair[0]]) for pair in pending}
        self._queue = Queue(
            group
            for name, editor in pending
            for group in groups_of(config, name, editor, chosen[name], everything[name], self._keys[name, editor])
        )
        versions = provenance.versions()
        self._own = {"library": provenance.library_sha256(), **{name: versions[name] for name in MUST_AGREE}}
        self._start: dict[str, Any] = {}
        self._model: dict[str, Any] = {}
        self._retried = 0
        self._unwritten: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self._caches: set[str] = set()
        # of the unedited subject, by dataset and case: which of the lists has them
        self._texts: dict[tuple[str, int], list[list[dict]]] = defaultdict(list)

    def run(self) -> None:
        total = sum(group.left for group in self._queue.groups.values())
        try:
            with tqdm(total=total, desc="on Ray", unit="case") as self._bar:
                while self._queue.unfinished:
                    self._crew.fill()
                    self._give_out()
                    # while the workers are busy again
                    self._write()
                    for member, unit, answer in self._crew.news():
                        self._hear(member, unit, answer)
                    alive = sum(bool(member.about) for member in self._crew.members.values())
                    self._bar.set_postfix(workers=alive, retried=self._retried)
        finally:
            self._write()
            self._crew.end()
            if self._start:
                workers = [member.describe() for member in self._crew.past]
                made = {"workers": workers, "retried": self._retried, "rates": self._queue.rates()}
                finished = {} if self._queue.unfinished else {"finished": provenance.now()}
                run_folder.write_manifest(self._config, {**self._start, **made, **finished})

    def _give_out(self) -> None:
        ready = [member for member in self._crew.members.values() if member.about]
        for member in [member for member in ready if not member.units]:
            unit = self._queue.next(member.at, self._size(member), len(ready))
            if unit is None:
                return
            self._ask(member, unit)
        for member in ready:
            if len(member.units) == 1 and member.units[0].kind == "edit":
                ahead = self._queue.ahead(member.units[0].place, self._size(member), len(ready))
                if ahead is not None:
                    self._ask(member, ahead)

    def _size(self, member: Member) -> int:
        """The number of cases to assign to a worker at once."""
        return member.size or (_FIRST_SIZE if self._config.batch_size == "auto" else self._config.batch_size)

    def _ask(self, member: Member, unit: Unit) -> None:
        member.units.append(unit)
        member.at = unit.place
        made_by = {name: self._start[name] for name in ("id", "library", "commit")}
        if unit.kind == "prepare":
            self._crew.ask(member, "prepare", unit, made_by)
        elif unit.kind == "edit":
            texts = None
            if len(self._caches) > 1:
                known = [rows for case in unit.cases for rows in self._texts[unit.place[0], case]]
                texts = [row for rows in {id(rows): rows for rows in known}.values() for row in rows]
            self._crew.ask(member, "edit", unit, made_by, texts)
        else:
            state = {suffix: path.read_bytes() for suffix, path in state_files(self._state_file(unit)).items()}
            self._crew.ask(member, "begin_walk", unit, made_by, self._keys[unit.place[:2]], state)

    def _hear(self, member: Member, unit: Unit | None, answer: Any) -> None:
        if isinstance(answer, self._crew.ray.exceptions.RayTaskError):
            self._failed(member, answer)
        elif isinstance(answer, Exception):
            if unit is None:
                self._crew.died_starting(member)
            else:
                self._retried += 1
                first, *others = member.units
                blameless = member.units if self._crew.node_is_gone(answer) else others
                for other in blameless:
                    self._queue.returned(other)
                for case_id in self._queue.died(first) if blameless is others else ():
                    self._blame(first, case_id)
        elif not member.about and "problem" in answer:
            self._crew.leave_out(member, f"node {answer['node']}: {answer['problem']}")
        elif not member.about:
            self._welcome(member, answer)
        elif unit is not None and unit.kind == "prepare":
            self._prepared(unit, answer)
            member.units.remove(unit)
            self._queue.finished(unit)
        elif unit is not None:
            self._came(member, unit, answer)

    def _welcome(self, member: Member, about: dict[str, Any]) -> None:
        for name, value in self._own.items():
            if about[name] != value:
                raise StudyError(
                    f"on: node {about['node']} has {name} {about[name]}, but this process has {value}: install the same version on all nodes"
                )
        if not self._start:
            self._model = {name: about[name] for name in ("hardware", "dtype", "model")}
            run_folder.check_same_run(self._config, self._data, about["model"])
            self._start = run_folder.begin(self._config, self._model, {}, {}, self._chosen)
        for name in ("model", "dtype"):
            if about[name] != self._model[name]:
                raise StudyError(
                    f"on: node {about['node']} has a different {name} from the first worker's: {about[name]}, not {self._model[name]}"
                )
        member.about, member.state = about, "working"
        self._caches.add(about["cache"])

    def _failed(self, member: Member, error: Any) -> None:
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        kind = "" if isinstance(cause, StudyError) else f"{type(cause).__name__}: "
        raise StudyError(f"{member.name} on node {member.about.get('node', 'unknown')}: {kind}{cause}") from error

    def _prepared(self, unit: Unit, prepared: dict[str, Any]) -> None:
        editor = unit.place[1]
        run_folder.check_statistics(self._config, {editor: prepared["setup"]})
        values = {**self._start["hyperparameters"], editor: prepared["hyperparameters"]}
        setup = {**self._start["setup"], **({editor: prepared["setup"]} if prepared["setup"] else {})}
        overrides = {name: self._config.set[name] for name in values if name in self._config.set}
        self._start |= {"hyperparameters": values, "setup": setup, "set": overrides}
        run_folder.write_manifest(self._config, self._start)

    def _came(self, member: Member, unit: Unit, result: Result) -> None:
        write_state(self._state_file(unit), result.state)
        self._keep(unit, result.records)
        self._queue.came(unit, len(result.records), result.seconds)
        member.records, member.busy = member.records + len(result.records), member.busy + result.seconds
        member.size = result.size if self._config.batch_size == "auto" else None
        for case_id in unit.cases if result.texts else ():
            self._texts[unit.place[0], case_id].append(result.texts)
        if result.finished:
            member.units.remove(unit)
            self._queue.finished(unit)
        else:
            member.units[0] = replace(unit, deaths=0)  # it got on
            self._crew.ask(member, "go_on", member.units[0])

    def _keep(self, unit: Unit, rows: Sequence[dict[str, Any]]) -> None:
        """Accept records that are not there yet; :meth:`_write` appends them."""
        keys = self._keys[unit.place[:2]]
        new = [row for row in rows if (row["position"], row["case_id"]) not in keys]
        keys.update((row["position"], row["case_id"]) for row in new)
        self._unwritten[unit.place[:2]] += new

    def _write(self) -> None:
        for pair, rows in self._unwritten.items():
            if rows:
                append_rows(run_folder.records_file(self._config, *pair), rows)
                self._bar.update(len(rows))
        self._unwritten.clear()

    def _blame(self, unit: Unit, case_id: int) -> None:
        dataset, editor, _ = unit.place
        cases = self._everything[dataset]
        case = next(case for case in cases if case.case_id == case_id)
        circumstances = circumstances_of(self._config, editor, dataset, cases, self._start)
        reason = f"{unit.deaths + 1} workers died of this case alone"
        self._keep(unit, [circumstances.record(self._config.subject, case, error=reason).model_dump()])

    def _state_file(self, unit: Unit) -> Path:
        return run_folder.state_file(self._config, *unit.place[:2])
