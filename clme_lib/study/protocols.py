"""What a protocol is: which cases are edited from which state of the model, and which are evaluated when.

A new one is a class of :class:`Protocol` in a file of its own, registered by :func:`register_protocol` or by the entry-point group
``clme_lib.protocols`` of an installed package. The paper's is :class:`SingleEdits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..datasets.cases import Case
from ..evaluation.evaluate import SINGLE
from ..support.registry import Registry


@dataclass(frozen=True)
class Step:
    """A state of the model, how it is reached, and what is evaluated in it.

    Attributes:
        edited: the cases that are edited, each from the state that step ``after`` left.
        evaluated: the cases that are evaluated once all these edits act together.
        position: how many edits the model then holds.
        after: index of the step whose state is edited; None for the unedited subject.
    """

    edited: tuple[Case, ...]
    evaluated: tuple[Case, ...]
    position: int
    after: int | None = None


class Protocol(ABC):
    """Plans what is done with the cases of a run."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def plan(self, cases: Sequence[Case]) -> list[Step]:
        """The steps, each after the one it builds on. A case is evaluated once at a position."""


class SingleEdits(Protocol):
    """The paper's: each case is edited alone, in the unedited subject, and evaluated (section III-D)."""

    name = SINGLE
    title = "single edits"

    def plan(self, cases):
        return [Step((case,), (case,), position=1) for case in cases]


_PROTOCOLS: Registry[Protocol] = Registry("protocol", "clme_lib.protocols", __name__)
register_protocol, get_protocol, list_protocols = _PROTOCOLS.register, _PROTOCOLS.__getitem__, _PROTOCOLS.names


register_protocol(SingleEdits())
