"""A run's remaining work, and which unit of it an idle worker gets next. This module does not depend on Ray.

The work of a dataset and an editor is divided into groups: the parts of its plan (:func:`clme_lib.study.work.planned`), each prepared once by
the worker that gets it first. A group's cases are given out in batches, the longest first; towards the end batches get smaller, so that
no worker delays the end. A walk (a protocol's steps that build on each other) is one unit, which resumes from the last kept state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...datasets.cases import Case
from ...support.errors import StudyError
from ..config import RunConfig
from ..work import edited_alone, planned

Place = tuple[str, str, int]  # dataset, editor, and which part of its plan
SUSPECT_AFTER = 2  # deaths of workers after which a batch of several cases is halved
BLAMED_AFTER = 3  # deaths after which a unit that cannot be halved is given up: two may be chance if workers often die for other reasons
_AHEAD_WHILE = 4  # workers get units ahead only while at least this many batches per worker are waiting


@dataclass(frozen=True)
class Unit:
    """The work that a worker gets at once; ``cases`` are ids, ``deaths`` is the number of workers that died while working on it."""

    place: Place
    kind: Literal["prepare", "edit", "walk"]
    cases: tuple[int, ...] = ()
    deaths: int = 0

    def __str__(self) -> str:
        dataset, editor, _ = self.place
        return f"{self.kind} {editor} on {dataset}" + (f", {len(self.cases)} cases" if self.cases else "")


@dataclass
class Group:
    """The work at one place.

    Args:
        waiting: ids of the cases to be edited alone, the longest first.
        walked: how many records the walk must produce; 0 if there is no walk.
    """

    place: Place
    waiting: list[int]
    walked: int = 0
    prepared: bool = field(default=False, init=False)
    underway: int = field(default=0, init=False)  # units being worked on
    records: int = field(default=0, init=False)  # records received
    seconds: float = field(default=0.0, init=False)  # that workers spent on these records
    units: list[Unit] = field(init=False)  # the preparation, the walk, and units whose workers died

    def __post_init__(self) -> None:
        self.units = [Unit(self.place, "walk")] if self.walked else []
        self.units.append(Unit(self.place, "prepare"))

    @property
    def left(self) -> int:
        """The number of missing records that no worker is working on."""
        of_units = (len(unit.cases) or self.walked * (unit.kind == "walk") for unit in self.units)
        return len(self.waiting) + sum(of_units)

    def take(self, size: int) -> Unit | None:
        """The next unit, with at most ``size`` cases; None if there is nothing to do yet, or nothing left."""
        if not self.prepared:
            return self.units.pop() if self.units and self.units[-1].kind == "prepare" else None
        if self.units and self.units[-1].kind == "edit":
            return self.units.pop()
        if self.waiting:
            cases, self.waiting = self.waiting[:size], self.waiting[size:]
            return Unit(self.place, "edit", tuple(cases))
        return self.units.pop() if self.units else None


def groups_of(
    config: RunConfig,
    dataset: str,
    editor: str,
    cases: Sequence[Case],
    everything: Sequence[Case],
    keys: set[tuple[int, int]],
) -> Iterator[Group]:
    """The groups of a dataset and an editor that have records to make, i.e. not in ``keys``: (position, case id)."""
    for number, part in enumerate(planned(config, editor, cases, everything)):
        alone = edited_alone(config, part.steps, keys)
        done = keys | {(1, case.case_id) for case in alone}
        walked = sum((step.position, case.case_id) not in done for step in part.steps for case in step.scored)
        # more text takes longer, which can be judged without a model; the target counts more because every step of an edit processes it
        alone.sort(key=lambda case: (-len(case.prompt) - 4 * len(case.target), case.case_id))
        if alone or walked:
            yield Group((dataset, editor, number), [case.case_id for case in alone], walked)


class Queue:
    """The groups of a run."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = {group.place: group for group in groups}

    @property
    def unfinished(self) -> bool:
        return any(group.left or group.underway for group in self.groups.values())

    def next(self, at: Place | None, size: int, workers: int) -> Unit | None:
        """The next unit for one of the ``workers``, which was ``at`` a place before and takes ``size`` cases; None if it must wait.

        A worker stays at its place while there is work; otherwise preparations come first, then the group that will take longest.
        """
        with_work = [group for group in self.groups.values() if group.left]
        left = sum(group.left for group in with_work)
        size = max(1, min(size, math.ceil(left / (2 * workers))))
        rate = self._seconds_of_a_record()
        with_work.sort(key=lambda group: (group.place != at, group.prepared, -group.left * rate[group.place]))
        for group in with_work:
            if (unit := group.take(size)) is not None:
                group.underway += 1
                return unit
        return None

    def ahead(self, at: Place, size: int, workers: int) -> Unit | None:
        """Another batch for a worker that is still busy, so that it need not wait for the driver; None towards the end, to share the work evenly."""
        group = self.groups[at]
        if len(group.waiting) < _AHEAD_WHILE * size * workers:
            return None
        group.underway += 1
        return group.take(size)

    def came(self, unit: Unit, records: int, seconds: float) -> None:
        """Note that some of a unit's records came, on which a worker spent ``seconds``."""
        group = self.groups[unit.place]
        group.records, group.seconds = group.records + records, group.seconds + seconds

    def finished(self, unit: Unit) -> None:
        group = self.groups[unit.place]
        group.underway -= 1
        group.prepared |= unit.kind == "prepare"

    def returned(self, unit: Unit) -> None:
        """Put back a unit whose worker died before beginning it, or with its node: another worker gets it."""
        group = self.groups[unit.place]
        group.underway -= 1
        group.units.append(unit)

    def died(self, unit: Unit) -> tuple[int, ...]:
        """Put back a unit whose worker died while working on it. After two deaths a batch of cases is halved; after three, a single case
        is returned and not given out again.

        Raises:
            StudyError: too many workers died while working on a unit that has no cases to halve.
        """
        group = self.groups[unit.place]
        group.underway -= 1
        deaths = unit.deaths + 1
        if deaths < (SUSPECT_AFTER if len(unit.cases) > 1 else BLAMED_AFTER):
            group.units.append(replace(unit, deaths=deaths))
            return ()
        if unit.kind != "edit":
            raise StudyError(
                f"{unit}: {deaths} workers died while working on it; see Ray's logs, or try it in one process (--on here)"
            )
        if len(unit.cases) == 1:
            return unit.cases
        half = len(unit.cases) // 2
        for cases in (unit.cases[:half], unit.cases[half:]):
            # one more death shows which half is at fault; a single case starts at zero, because other cases may have caused the deaths
            group.units.append(replace(unit, cases=cases, deaths=SUSPECT_AFTER - 1 if len(cases) > 1 else 0))
        return ()

    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """The number of records, and the seconds that workers spent on them, by dataset and editor."""
        rates: dict[str, dict[str, dict[str, float]]] = {}
        for (dataset, editor, _), group in self.groups.items():
            known = rates.setdefault(dataset, {}).setdefault(editor, {"records": 0, "seconds": 0.0})
            known["records"] += group.records
            known["seconds"] = round(known["seconds"] + group.seconds, 3)
        return rates

    def _seconds_of_a_record(self) -> dict[Place, float]:
        """Seconds per record of each group, or of all groups together if none of its records has come yet."""
        records = sum(group.records for group in self.groups.values())
        mean = sum(group.seconds for group in self.groups.values()) / records if records else 1.0
        return {place: group.seconds / group.records if group.records else mean for place, group in self.groups.items()}
