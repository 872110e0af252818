"""The work of a run: the cases of one dataset, edited by one editor and scored, in whatever process that happens.

What is planned (:func:`planned`) and how a batch becomes records (:class:`Work`) is here; who is asked to do it, and who keeps the
records, is :mod:`clme_lib.study.runs` in one process, and :mod:`clme_lib.study.cluster` in many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from ..datasets.base import get_dataset
from ..datasets.cases import Case, split_cases
from ..editors.base import Editor
from ..editors.registry import load_editor
from ..edits.base import Edit
from ..evaluation.evaluate import Circumstances, score
from ..evaluation.likelihood import mean_losses
from ..evaluation.records import Record, finite
from ..subjects.subject import Subject
from ..support.batching import Batches
from ..support.errors import CaseError, StudyError
from ..support.memory import is_out_of_memory, release_memory
from . import run_folder
from .config import RunConfig
from .protocols import Protocol, Step, get_protocol
from .states import CASE_FAULTS, State, States

_EVALUATED_AT_ONCE = 16  # cases, between two records of one state
_TOO_LARGE = "this case alone does not fit into the device's memory"


@dataclass(frozen=True)
class Part:
    """Steps that are made by one editor: what a trained one learns from, and the cases that it edits then."""

    steps: list[Step]
    learnt_from: Sequence[Case] = ()
    edited: Sequence[Case] = ()


def planned(config: RunConfig, editor: str, cases: Sequence[Case], everything: Sequence[Case]) -> list[Part]:
    """The steps of some cases of a dataset, of which there is ``everything``; the last ``config.held_out`` of them are not edited.

    A trained editor edits the cases of one fold after learning from the other, or all after learning from all that it does not edit: as
    the protocol says.

    Raises:
        StudyError: nothing is left to learn from, cases are held out of single edits, or failed cases are to be tried again among many
            edits in one model.
    """
    protocol = get_protocol(config.protocol)
    count = len(cases) - config.held_out
    cases, held_out = cases[:count], tuple(cases[count:])
    if held_out and protocol.folded:
        raise StudyError(
            f"held_out={config.held_out}: protocol={config.protocol} edits each case in the unedited model, whose neighbours show what else "
            "changed; leave it out, or choose a protocol of many edits"
        )
    if config.retry_failed and not protocol.folded:
        raise StudyError(
            f"retry_failed: protocol={config.protocol} made the later edits without the failed ones; leave it out, or move the run folder "
            "away to begin again"
        )
    if not run_folder.trains(config, editor):
        return [Part(_with_held_out(protocol.plan(cases), held_out))]
    if not protocol.folded:
        chosen = {case.case_id for case in (*cases, *held_out)}
        others = [case for case in everything if case.case_id not in chosen]
        if len(others) < 2:
            raise StudyError(
                f"cases: {editor} has to learn from cases of {everything[0].dataset} that are not edited, but only {len(others)} are left; "
                "edit fewer"
            )
        return [Part(_with_held_out(protocol.plan(cases), held_out), others, cases)]
    halves = split_cases(everything, config.seed)
    parts = []
    for fold, half in enumerate(halves):
        ids = {case.case_id for case in half}
        if part := [case for case in cases if case.case_id in ids]:
            parts.append(Part(protocol.plan(part), halves[1 - fold], half))
    return parts


def _with_held_out(steps: list[Step], held_out: tuple[Case, ...]) -> list[Step]:
    """The same steps; whenever a state is evaluated, so it is on the cases that are held out."""
    return [replace(step, held_out=held_out) if step.evaluated else step for step in steps]


def edited_alone(config: RunConfig, steps: Sequence[Step], keys: set[tuple[int, int]]) -> list[Case]:
    """The cases of steps missing from ``keys`` that edit and evaluate one case and are not built upon; none where the protocol has its
    own way."""
    protocol = type(get_protocol(config.protocol))
    if (protocol.edit, protocol.join) != (Protocol.edit, Protocol.join):
        return []
    built_upon = {step.after for step in steps}
    return [
        step.edited[0]
        for number, step in enumerate(steps)
        if number not in built_upon and step.after is None and step.edited == step.scored
        and len(step.edited) == 1 and not run_folder.is_recorded(step, keys)
    ]  # fmt: skip


def make_editor(config: RunConfig, name: str, subject: Subject) -> Editor:
    """A run's editor of its subject."""
    values, overrides = config.values, config.set.get(name, {})
    return load_editor(name, subject, values=values, preset=config.preset, seed=config.seed, **overrides)  # type: ignore[arg-type]


def circumstances_of(
    config: RunConfig, editor: str, dataset: str, everything: Sequence[Case], start: Mapping[str, str]
) -> Circumstances:
    """What all records of a dataset and an editor share; ``start`` has the id, library and commit of what makes them."""
    halves = split_cases(everything, config.seed)
    return Circumstances(
        editor,
        run=run_folder.run_name(config),
        source=get_dataset(dataset).file or config.source,
        preset=config.preset,
        seed=config.seed,
        protocol=config.protocol,
        metrics=config.metrics if config.scored else None,
        folds={case.case_id: fold for fold, half in enumerate(halves) for case in half},
        start=start["id"],
        library=start["library"],
        commit=start["commit"],
    )


class Work:
    """Cases of one dataset, edited by one editor and scored: batches of records, for the caller to keep."""

    def __init__(self, config: RunConfig, subject: Subject, editor: Editor, circumstances: Circumstances) -> None:
        self.config, self.subject, self.editor, self.circumstances = config, subject, editor, circumstances

    def learn(self, part: Part) -> None:
        """Have a trained editor learn, or load what it has learnt, for a part of the plan."""
        if part.learnt_from:
            self.editor.fit(part.learnt_from, edited=part.edited)
            self.editor.setup()  # here, so that its copies for edited states share what it prepares

    def alone(self, batches: Batches[Case]) -> Iterator[list[Record]]:
        """Records of cases that are edited and evaluated each on its own: a batch at a time, each row of it another edited model."""
        for batch in batches:
            try:
                yield self.attempt(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) > 1:
                    batches.did_not_fit(batch)
                    continue
                yield [self._failed(batch[0], _TOO_LARGE)]

    def batches(self, cases: Sequence[Case], size: int | None = None) -> Batches[Case]:
        """Cases in batches of like cost, of the run's size or of the ``size`` that others have come to."""
        ordered = sorted(cases, key=lambda case: (self._cost(case), case.case_id))
        batches = Batches(ordered, self.config.batch_size, self.subject.device)
        batches.size = size or batches.size
        return batches

    def walk(self, steps: Sequence[Step], keys: set[tuple[int, int]], file: Path) -> Iterator[list[Record]]:
        """Records of steps that build on each other, or evaluate several cases, in order; those that nothing missing needs are left out.

        Args:
            keys: position and case of what is recorded already.
            file: where the last state is kept; a list, which may be empty, comes after each change of it.
        """
        if all(run_folder.is_recorded(step, keys) for step in steps):
            return
        states = States(file, get_protocol(self.config.protocol), self.editor, steps)
        needed: set[int] = set()
        for number in reversed(range(len(steps))):
            if number in needed or not run_folder.is_recorded(steps[number], keys):
                before = steps[number].after
                needed |= {number} if before is None or number in states else {number, before}
        for number in sorted(needed):
            state, position = states.reach(number), steps[number].position
            missing = [case for case in steps[number].scored if (position, case.case_id) not in keys]
            failed = [case for case in missing if case.case_id in state.failed]
            yield [self._failed(case, state.failed[case.case_id], position) for case in failed]
            left = [case for case in missing if case.case_id not in state.failed]
            apart = {case.case_id for case in steps[number].held_out}
            for first in range(0, len(left), _EVALUATED_AT_ONCE):
                yield self._evaluated(state, left[first : first + _EVALUATED_AT_ONCE], position, apart)

    def _evaluated(self, state: State, cases: Sequence[Case], position: int, apart: Set[int]) -> list[Record]:
        """Records of cases in a state; ``apart``: ids of those that are held out. If they do not fit into memory together, or one of them
        cannot be evaluated, each half is tried; a case that fails alone is recorded as failed."""
        held_out = [case for case in cases if case.case_id in apart]
        try:
            losses = self._losses(state.edit, held_out)
            edits = [state.edit] * len(cases)
            records = score(self.subject, cases, edits, self.circumstances, position=position, logs=state.logs)
        except Exception as error:
            too_large = is_out_of_memory(error)
            if not too_large and not isinstance(error, CASE_FAULTS):
                raise
            release_memory(self.subject.device)
            if (half := len(cases) // 2) > 0:
                parts = cases[:half], cases[half:]
                return [record for part in parts for record in self._evaluated(state, part, position, apart)]
            reason = _TOO_LARGE if too_large else f"{type(error).__name__}: {error}"
            failed = self._failed(cases[0], f"with {position} edits: {reason}", position)
            return [failed.model_copy(update={"held_out": cases[0].case_id in apart})]
        size = sum(tensor.nbytes for tensor in state.edit.tensors().values()) / 2**20
        more: dict[int, dict] = {case: {"held_out": True, "target_loss": loss} for case, loss in losses.items()}
        return [record.model_copy(update={"edits_mib": size, **more.get(record.case_id, {})}) for record in records]

    def _losses(self, edit: Edit, cases: Sequence[Case]) -> dict[int, float | None]:
        """How unlikely the edited model thinks the targets of cases that are held out, by their ids."""
        if not cases:
            return {}
        losses = mean_losses(self.subject.edited(edit), [(case.prompt, case.target) for case in cases])
        return {case.case_id: finite(loss) for case, loss in zip(cases, losses)}

    def attempt(self, batch: list[Case]) -> list[Record]:
        """Records of a batch. If it fails, its cases are tried alone, so that a bad case spoils no other's result. A fault of the
        environment (a damaged file, a full disk) is no case's fault, and ends the run."""
        try:
            edits = self.editor.edit(batch, batch_size=len(batch))
            return score(self.subject, batch, edits, self.circumstances)
        except CASE_FAULTS as error:
            if len(batch) > 1:
                return [record for case in batch for record in self.attempt([case])]
            return [self._failed(batch[0], f"{type(error).__name__}: {error}")]

    def _failed(self, case: Case, reason: str, position: int = 1) -> Record:
        return self.circumstances.record(self.subject.name, case, position, error=reason)

    def _cost(self, case: Case) -> int:
        try:
            return self.editor.cost(case)
        except CaseError:
            return 0  # it fails when it is edited, and is recorded as failed
