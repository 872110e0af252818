"""Protocols: which cases are edited in which state of the model, and when each case is evaluated.

A new protocol is a subclass of :class:`Protocol` in its own file, registered by :func:`register_protocol` or by the entry-point group
``clme_lib.protocols`` of an installed package. The paper's is :class:`SingleEdits`. The others put many edits into one model, in the sample's
order, and evaluate all of them whenever the model holds 1, 3, 10, 30, 100 ... edits, and at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..datasets.cases import Case
from ..editors.base import Editor
from ..edits.base import Edit
from ..edits.simie import simie
from ..evaluation.evaluate import SINGLE
from ..support.registry import Registry


@dataclass(frozen=True)
class Step:
    """A state of the model, how it is reached, and which cases are evaluated in it.

    Attributes:
        edited: the cases that are edited, each in the state after step ``after``.
        evaluated: the cases that are evaluated while all these edits act together.
        held_out: cases that no step edits; they are also evaluated, to show what the model can still do.
        position: how many edits the model then holds.
        after: index of the step whose state is edited; None for the unedited subject.
    """

    edited: tuple[Case, ...]
    evaluated: tuple[Case, ...]
    position: int
    after: int | None = None
    held_out: tuple[Case, ...] = ()

    @property
    def scored(self) -> tuple[Case, ...]:
        """All cases that get a record."""
        return self.evaluated + self.held_out


class Protocol(ABC):
    """Plans how the cases of a run are edited and evaluated.

    Attributes:
        folded: a trained editor edits each half of the dataset after learning from the other, as in the paper. Otherwise it learns from
            all cases that are not edited, so that one model can hold all edits.
        joins_weights: it can only join edits that update weights.
        reused: a step may reuse the edits that an earlier step made from the same cases, because each edit depends only on its case.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folded: ClassVar[bool] = False
    joins_weights: ClassVar[bool] = False
    reused: ClassVar[bool] = False

    @abstractmethod
    def plan(self, cases: Sequence[Case]) -> list[Step]:
        """The steps, each after the one it builds on. A case is evaluated at most once per position."""

    def edit(self, editor: Editor, cases: Sequence[Case]) -> list[Edit]:
        """The edits of a step's cases, made by an editor for the state that the step builds on."""
        return editor.edit(cases)

    def join(self, editor: Editor, cases: Sequence[Case], edits: Sequence[Edit]) -> Edit:
        """One edit of the unedited subject that joins the edits of a step's cases, which ``editor`` has made."""
        return Edit.compose(edits)


class SingleEdits(Protocol):
    """The paper's protocol: each case is edited alone, in the unedited subject, and evaluated (section III-D)."""

    name = SINGLE
    title = "single edits"
    folded = True

    def plan(self, cases):
        return [Step((case,), (case,), position=1) for case in cases]


class SequentialEdits(Protocol):
    """Edit n is made on the model that holds the earlier edits."""

    name = "sequential"
    title = "one after another"

    def plan(self, cases):
        cases = tuple(cases)
        evaluated = milestones(len(cases))
        return [
            Step((case,), cases[: n + 1] if n + 1 in evaluated else (), n + 1, after=n - 1 if n else None)
            for n, case in enumerate(cases)
        ]


class BatchEdits(Protocol):
    """All edits are made on the unedited subject, together if the editor supports it (:meth:`~clme_lib.editors.base.Editor.edit_together`)."""

    name = "batch"
    title = "all at once"

    def plan(self, cases):
        cases = tuple(cases)
        return [Step(cases[:count], cases[:count], count) for count in milestones(len(cases))]

    def edit(self, editor, cases):
        return editor.edit_together(cases)


class SimIEEdits(BatchEdits):
    """Each edit is made alone, on the unedited subject; then they are joined as if made one after another (edits/simie.py)."""

    name = "simie"
    title = "joined by SimIE"
    joins_weights = True
    reused = True
    initial: ClassVar[dict[str, Any]] = {}  # the authors' m

    def edit(self, editor, cases):
        return editor.edit(cases)

    def join(self, editor, cases, edits):
        return simie(edits, lambda layer: editor.lookup_keys(cases, layer), **self.initial)


class ScaledSimIEEdits(SimIEEdits):
    """SimIE with m in proportion to the squared norm of the first key, which varies between models. It is so small that a first
    edit keeps 99% of what it adds at its own key."""

    name = "simie-scaled"
    title = "joined by SimIE, scaled m"
    initial = {"initial": 0.01, "relative": True}


def milestones(count: int) -> list[int]:
    """The numbers of edits after which a model is evaluated: 1, 3, 10, 30, 100 ... and ``count``."""
    steps = [digit * 10**power for power in range(7) for digit in (1, 3)]
    return sorted({step for step in steps if step < count} | {count})


_PROTOCOLS: Registry[Protocol] = Registry("protocol", "clme_lib.protocols", __name__)
register_protocol, get_protocol, list_protocols = _PROTOCOLS.register, _PROTOCOLS.get, _PROTOCOLS.names


def protocol_title(name: str) -> str:
    """A protocol's name in tables; a name that is not registered here is returned unchanged."""
    return _PROTOCOLS[name].title if name in _PROTOCOLS else name


for _protocol in (SingleEdits(), SequentialEdits(), BatchEdits(), SimIEEdits(), ScaledSimIEEdits()):
    register_protocol(_protocol)
