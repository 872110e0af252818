"""States of a model between the steps of a protocol: how they are made, and the file from which a later start resumes.

``states/<dataset>.<editor>.safetensors`` in a run's folder holds the last state that was evaluated, and in the end the state with all edits,
as one edits file (read by :func:`~clme_lib.edits.files.load_edits`). Each such state replaces the one before. Writing all edits after each
edit would take time and space with the square of their number: what a step adds to the file's state is therefore kept in a file of its own
beside it until the next state is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.linalg import LinAlgError

from ..datasets.cases import Case
from ..editors.base import Editor
from ..edits.base import Edit, EditLog, Unedited
from ..edits.files import load_edits, read_about, save_edits
from ..support.errors import CaseError, StudyError
from ..support.journal import write_bytes
from ..support.memory import is_out_of_memory
from .protocols import Protocol, Step

# errors caused by a case, not by the environment
CASE_FAULTS = (CaseError, ValueError, ArithmeticError, LinAlgError)


@dataclass(frozen=True)
class State:
    """The model's state after a step: its edit, how each case's edit was made, and why others could not be made."""

    edit: Edit
    logs: dict[int, EditLog] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def state_files(file: Path) -> dict[str, Path]:
    """The files that keep a walk's last state, by what their names add to the stem of ``file``: that of the state, and those of the edits
    added since."""
    files = sorted(path for path in file.parent.glob(f"*{file.suffix}") if path.name.startswith(f"{file.stem}."))
    return {path.name.removeprefix(file.stem): path for path in files}


def write_state(file: Path, contents: Mapping[str, bytes]) -> None:
    """Write some of a state's files, by suffix; the file of the whole state supersedes those of edits added before."""
    if file.suffix in contents:
        write_bytes(file, contents[file.suffix])
        for suffix, path in state_files(file).items():
            if suffix not in contents:
                path.unlink()
    for suffix in contents.keys() - {file.suffix}:
        write_bytes(file.with_name(f"{file.stem}{suffix}"), contents[suffix])


class States:
    """The states of one dataset and editor.

    Args:
        file: where the last state is kept.
    """

    def __init__(self, file: Path, protocol: Protocol, editor: Editor, steps: Sequence[Step]) -> None:
        self._file, self._protocol, self._editor, self._steps = file, protocol, editor, steps
        self._built_upon = {step.after for step in steps} - {None}
        self._identities = self._identify()
        self._held: dict[int, State] = {}
        self._made: dict[int, tuple[Edit | None, str | None]] = {}
        self._kept = -1  # number of the last state in the files
        self._resume()

    def _resume(self) -> None:
        """Hold the file's state with what was added to it since, which becomes the file's."""
        about = self._about(self._file)
        if about.get("position", 0) > self._steps[-1].position:
            self._kept = len(self._steps)  # of a larger sample, whose state with all edits stays
            return
        if about.get("identity") not in self._identities:
            return
        self._kept = in_file = self._identities.index(about["identity"])
        state = self._read(self._file, about)
        for number in range(in_file + 1, len(self._steps)):
            about = self._about(self._added_file(number))
            if self._steps[number].after != self._kept or about.get("identity") != self._identities[number]:
                break
            state = self._after(state, self._read(self._added_file(number), about))
            self._kept = number
        self._held[self._kept] = state
        if self._kept > in_file:
            self._write_whole(self._kept, state)

    def _about(self, file: Path) -> dict:
        return read_about(file) if file.is_file() else {}

    def _read(self, file: Path, about: dict) -> State:
        (edit,) = load_edits(file, self._editor.subject)
        logs = {int(case): EditLog.from_json(log) for case, log in about["logs"].items()}
        return State(edit, logs, {int(case): reason for case, reason in about["failed"].items()})

    def _write(self, file: Path, number: int, state: State) -> None:
        about = {
            "identity": self._identities[number],
            "position": self._steps[number].position,
            "logs": {str(case): log.as_json() for case, log in state.logs.items()},
            "failed": {str(case): reason for case, reason in state.failed.items()},
        }
        save_edits(file, [state.edit], self._editor.subject, about)

    def _write_whole(self, number: int, state: State) -> None:
        self._write(self._file, number, state)
        for earlier in range(number + 1):  # what was added later may belong to a larger sample
            self._added_file(earlier).unlink(missing_ok=True)

    def _added_file(self, number: int) -> Path:
        return self._file.with_suffix(f".{number}{self._file.suffix}")

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def reach(self, number: int) -> State:
        """The state after a step, whose preceding state must be held here; states that no later step builds on are dropped."""
        if number not in self._held:
            step = self._steps[number]
            before = None if step.after is None else self._held[step.after]
            added = self._make(step, before)
            state = added if before is None else self._after(before, added)
            self._held = {
                other: held
                for other, held in self._held.items()
                if other > number or self._is_built_upon(other, number)  # the file's state may be needed later
            }
            self._held[number] = state
            # a state before the one in the file is only evaluated again
            if number > self._kept:
                self._keep(number, state, added)
        return self._held[number]

    def _keep(self, number: int, state: State, added: State) -> None:
        last = number == len(self._steps) - 1
        if not last and number not in self._built_upon:
            return
        step = self._steps[number]
        if last or step.scored or step.after != self._kept:
            self._write_whole(number, state)
        else:
            self._write(self._added_file(number), number, added)
        self._kept = number

    @staticmethod
    def _after(before: State, added: State) -> State:
        return State(Edit.compose([before.edit, added.edit]), before.logs | added.logs, before.failed | added.failed)

    def _is_built_upon(self, earlier: int, number: int) -> bool:
        return any(step.after == earlier for step in self._steps[number + 1 :])

    def _identify(self) -> list[str]:
        """Each state's identity: a hash of its subject, editor, protocol and cases, in the order in which they were edited."""
        editor, identities = self._editor, list[str]()
        for step in self._steps:
            before = None if step.after is None else identities[step.after]
            made_by = [*editor.subject.identity.values(), editor.name, editor.hparams.model_dump_json(), editor.seed]
            content = [before, made_by, self._protocol.name, [case.sha256 for case in step.edited]]
            identities.append(hashlib.sha256(json.dumps(content).encode()).hexdigest())
        return identities

    def _make(self, step: Step, before: State | None) -> State:
        """What a step adds to the state before it."""
        editor = self._editor if before is None else self._editor.of(self._editor.subject.edited(before.edit))
        if not self._protocol.reused:
            self._made = {}
        new = [case for case in step.edited if case.case_id not in self._made]
        self._made |= self._attempt(editor, new)
        made = {case: self._made[case.case_id] for case in step.edited}
        edits = {case: edit for case, (edit, _) in made.items() if edit is not None}
        whole: Edit = Unedited(step.edited[-1].case_id, editor.name)
        if edits:
            whole = self._protocol.join(editor, list(edits), list(edits.values()))
        logs = {edit.case_id: edit.log for edit in edits.values()}
        failed = {case.case_id: reason for case, (_, reason) in made.items() if reason is not None}
        return State(whole, logs, failed)

    def _attempt(self, editor: Editor, cases: Sequence[Case]) -> dict[int, tuple[Edit | None, str | None]]:
        """Each case's edit, or why there is none; a case that fails does not affect the other cases' edits."""
        if not cases:
            return {}
        try:
            return {edit.case_id: (edit, None) for edit in self._protocol.edit(editor, cases)}
        except Exception as error:
            if is_out_of_memory(error):
                # not a failed case: later edits would be made without it, although it is no fault of its own
                raise StudyError(
                    f"{editor.name}: out of memory while editing (cases at once: {len(cases)}); free some of the device's memory and run the "
                    "same command again, which goes on where this one stopped, or edit fewer cases"
                ) from error
            if not isinstance(error, CASE_FAULTS):
                raise
            reason = f"{type(error).__name__}: {error}"
            if len(cases) == 1:
                return {cases[0].case_id: (None, reason)}
        alone = {case.case_id: self._attempt(editor, [case])[case.case_id] for case in cases}
        good = [case for case in cases if alone[case.case_id][1] is None]
        if len(good) == len(cases):
            raise StudyError(
                f"{editor.name} can make each edit of the batch, but not all {len(cases)} of them together: {reason}"
            )
        return alone | self._attempt(editor, good)
