"""What is left of a run's work, and what a worker that has nothing to do is asked for next. Knows nothing of Ray.

The work of a dataset and an editor falls into groups: the parts of its plan (:func:`clme_lib.study.work.planned`), each prepared once by the
worker that is asked for it first. Cases of a group are given out in batches, the longest first; towards the end batches get smaller, so that
nobody holds the end up. A walk (a protocol's steps that build on each other) is one unit, which goes on from the last state that was kept.
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
SUSPECT_AFTER = 2  # workers that died of several cases
BLAMED_AFTER = 3  # workers that died of what cannot be halved: twice may be chance, where many die of something else
_AHEAD_WHILE = 4  # batches that wait for each worker, at least, while workers are asked ahead


@dataclass(frozen=True)
class Unit:
    """What a worker is asked for at once; ``cases`` are ids, ``deaths`` how many workers died of it."""

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
        waiting: ids of cases that are edited each alone, those that take longest first.
        walked: how many records a walk is to give; 0: there is none.
    """

    place: Place
    waiting: list[int]
    walked: int = 0
    prepared: bool = field(default=False, init=False)
    underway: int = field(default=0, init=False)  # units that workers have
    records: int = field(default=0, init=False)  # that came
    seconds: float = field(default=0.0, init=False)  # that workers spent on them
    units: list[Unit] = field(init=False)  # to prepare, to walk, and those whose workers died

    def __post_init__(self) -> None:
        self.units = [Unit(self.place, "walk")] if self.walked else []
        self.units.append(Unit(self.place, "prepare"))

    @property
    def left(self) -> int:
        """Records that nobody works on."""
        of_units = (len(unit.cases) or self.walked * (unit.kind == "walk") for unit in self.units)
        return len(self.waiting) + sum(of_units)

    def take(self, size: int) -> Unit | None:
        """The next unit, of ``size`` cases at most; None if there is nothing to do yet, or any more."""
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
    """The groups of a dataset and an editor in which something is missing from ``keys``."""
    for number, part in enumerate(planned(config, editor, cases, everything)):
        alone = edited_alone(config, part.steps, keys)
        done = keys | {(1, case.case_id) for case in alone}
        walked = sum((step.position, case.case_id) not in done for step in part.steps for case in step.scored)
        # no model is needed to know that more text takes longer; what is written counts for every step
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
        """What one of the ``workers`` is asked for that was ``at`` a place before and takes ``size`` cases; None if it has to wait.

        It stays where it is as long as there is work; else what others wait for comes first, then what will take longest.
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
        """A batch for a worker that has one still, so that it need not wait for the driver; None towards the end, when others would wait for it."""
        group = self.groups[at]
        if len(group.waiting) < _AHEAD_WHILE * size * workers:
            return None
        group.underway += 1
        return group.take(size)

    def came(self, unit: Unit, records: int, seconds: float) -> None:
        """Records of a unit came, in so many seconds of a worker."""
        group = self.groups[unit.place]
        group.records, group.seconds = group.records + records, group.seconds + seconds

    def finished(self, unit: Unit) -> None:
        group = self.groups[unit.place]
        group.underway -= 1
        group.prepared |= unit.kind == "prepare"

    def returned(self, unit: Unit) -> None:
        """A worker died before it came to the unit, or with its node: it is given to another."""
        group = self.groups[unit.place]
        group.underway -= 1
        group.units.append(unit)

    def died(self, unit: Unit) -> tuple[int, ...]:
        """A worker died with the unit: it is given to another. Cases of which two workers died are halved; a single case of which three
        did is returned, for nobody to be asked for it again.

        Raises:
            StudyError: workers die of what cannot be halved.
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
            # one more death tells which half it is; a single case is not blamed for what may have been its neighbours' fault
            group.units.append(replace(unit, cases=cases, deaths=SUSPECT_AFTER - 1 if len(cases) > 1 else 0))
        return ()

    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """By dataset and editor, records and the seconds that workers spent on them."""
        rates: dict[str, dict[str, dict[str, float]]] = {}
        for (dataset, editor, _), group in self.groups.items():
            known = rates.setdefault(dataset, {}).setdefault(editor, {"records": 0, "seconds": 0.0})
            known["records"] += group.records
            known["seconds"] = round(known["seconds"] + group.seconds, 3)
        return rates

    def _seconds_of_a_record(self) -> dict[Place, float]:
        """Of each group, or where none of its came yet of all of them."""
        records = sum(group.records for group in self.groups.values())
        mean = sum(group.seconds for group in self.groups.values()) / records if records else 1.0
        return {place: group.seconds / group.records if group.records else mean for place, group in self.groups.items()}
