"""The workers as the driver knows them: starting, asking and replacing them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...support.errors import StudyError
from .queue import Place, Unit

_LOOKS_EVERY = 1.0  # seconds, without news
COUNTS_NODES_EVERY = 10.0  # seconds
_DEATHS_OF_STARTING = 4  # workers of a run, before no other takes the place of the next


@dataclass
class Member:
    """A worker as the driver knows it."""

    name: str
    actor: Any
    about: dict[str, Any] = field(default_factory=dict)  # its description of itself; empty until it is ready
    units: list[Unit] = field(default_factory=list)  # the units assigned to it, in order: it works on the first
    at: Place | None = None
    size: int | None = None
    records: int = 0
    busy: float = 0.0
    state: str = "starting"

    def describe(self) -> dict[str, Any]:
        node = {"node": self.about.get("node", "unknown"), "hardware": self.about.get("hardware", {})}
        return {
            "name": self.name,
            **node,
            "records": self.records,
            "busy_seconds": round(self.busy, 1),
            "state": self.state,
        }


class Crew:
    """The workers: starting, asking, and replacing them.

    Args:
        start_worker: an actor with a :class:`Worker`'s methods, by its name.
        room: how many workers there should be now.
        registry: told when a worker dies.
    """

    def __init__(
        self, ray: Any, start_worker: Callable[[str], Any], room: Callable[[], int], registry: Any = None
    ) -> None:
        self.ray, self._start, self._room, self._registry = ray, start_worker, room, registry
        self.members: dict[str, Member] = {}
        self.past: list[Member] = []
        self._asked: dict[Any, tuple[Member, Unit | None]] = {}
        self._counted = -COUNTS_NODES_EVERY
        self._started = self._left_out = self._died_starting = 0

    def fill(self) -> None:
        """Start as many workers as there is room for."""
        if time.monotonic() - self._counted < COUNTS_NODES_EVERY and self.members:
            return
        self._counted = time.monotonic()
        room = self._room()
        if room == 0 and not self.members:
            raise StudyError(
                "on: no node of the cluster has the CPUs and GPUs that a worker needs; lower cpus_per_worker or gpus_per_worker"
            )
        for _ in range(room - len(self.members) - self._left_out):
            self._started += 1
            name = f"worker-{self._started}"
            member = self.members[name] = Member(name, self._start(name))
            self._asked[member.actor.hello.remote()] = member, None

    def ask(self, member: Member, method: str, unit: Unit, *args: Any) -> None:
        self._asked[getattr(member.actor, method).remote(unit, *args)] = member, unit

    def news(self) -> Iterator[tuple[Member, Unit | None, Any]]:
        """The answers that have arrived: worker, unit, and answer or error; waits a moment for the first."""
        asked = list(self._asked)
        ready, _ = self.ray.wait(asked, num_returns=1, timeout=_LOOKS_EVERY)
        if ready and len(asked) > 1:
            ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=0)
        for reference in ready:
            if reference not in self._asked:  # the answer of a worker that has just died
                continue
            member, unit = self._asked.pop(reference)
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                answer = error
            except self.ray.exceptions.RayError as error:
                self.dismiss(member, "died")
                answer = error
            yield member, unit, answer

    def node_is_gone(self, error: Exception) -> bool:
        """Whether a worker was lost because its node or the connection to it failed, rather than its own process (which its work may have killed)."""
        return isinstance(error, self.ray.exceptions.ActorUnavailableError) or "its node has died" in str(error)

    def dismiss(self, member: Member, state: str) -> None:
        """Remove a worker that died or cannot be used."""
        member.state = state
        self.past.append(self.members.pop(member.name))
        self._asked = {reference: asked for reference, asked in self._asked.items() if asked[0] is not member}
        self._counted = -COUNTS_NODES_EVERY  # another may take its place
        if self._registry is not None:
            self._registry.forget.remote(member.name)
        with contextlib.suppress(Exception):
            self.ray.kill(member.actor)

    def died_starting(self, member: Member) -> None:
        """Handle a worker that died before it was ready. Its node may be gone, so it is replaced, unless this happens repeatedly."""
        self._died_starting += 1
        if self._died_starting > _DEATHS_OF_STARTING:
            self.leave_out(member, "it died while starting, like others before it; see Ray's logs")

    def leave_out(self, member: Member, reason: str) -> None:
        """Continue without a worker that cannot start, and do not replace it.

        Raises:
            StudyError: no other worker is left.
        """
        self._left_out += 1
        if member.name in self.members:
            self.dismiss(member, "left out")
        member.state = f"left out: {reason}"
        if not self.members:
            raise StudyError(f"on: no worker can start: {reason}")
        print(f"\nclme: {member.name} is left out: {reason}", file=sys.stderr)

    def end(self) -> None:
        """Stop all workers that this run started."""
        for member in list(self.members.values()):
            self.dismiss(member, "finished")
