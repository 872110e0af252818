"""Registries of named things: the library's own, and those that other installed packages add through an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import walk_packages
from typing import Generic, TypeVar

from .errors import StudyError, first_line

T = TypeVar("T")
_LAST = 1_000_000


class Registry(Generic[T]):
    """Entries by name, ordered by their ``order`` and then by name; those without an order come last.

    Modules register what they define when they are imported, which happens when the registry is first used: the library's own modules,
    and those that other packages name under the entry-point group, whose values are entries or modules that register some.

    Args:
        what: kind of entry, for messages; group: entry-point group.
        package: import path of the library's own entries: a module, or a package whose modules register them.
    """

    def __init__(self, what: str, group: str, package: str) -> None:
        self.what, self.group, self._package = what, group, package
        self._entries: dict[str, T] = {}
        self._own: frozenset[str] = frozenset()
        self._broken: dict[str, str] = {}
        self._ambiguous: dict[str, str] = {}
        self._loading = self._loaded = False

    def register(self, entry: T) -> T:
        """Add an entry; StudyError if the library itself, or another module, has an entry of this name.

        It replaces an earlier entry of the same name and module, as when a notebook's cell is run again.
        """
        name = entry.name  # type: ignore[attr-defined]
        known = self._entries.get(name, entry)
        if (name in self._own and known is not entry) or known.__module__ != entry.__module__:
            message = (
                f"two definitions of {self.what} {name!r}, in {known.__module__} and {entry.__module__}: rename one"
            )
            if self._loading:  # a package's error, which is not raised
                self._ambiguous[name] = message
            raise StudyError(message)
        self._entries[name] = entry
        return entry

    def names(self) -> list[str]:
        """All names, in order."""
        self._load()
        return sorted(self._entries, key=lambda name: (getattr(self._entries[name], "order", _LAST), name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def get(self, name: str) -> T:
        """The entry that a user asks for by name. Unlike ``registry[name]``, which describes what there is, it raises StudyError if an
        installed package defines the name too, since it may be the package's that the user means."""
        self._load()
        if name in self._ambiguous:
            raise StudyError(self._ambiguous[name])
        return self[name]

    def __getitem__(self, name: str) -> T:
        """The entry of a name; StudyError if there is none, or the package that adds it could not be loaded."""
        if name in self:
            return self._entries[name]
        if name in self._broken:
            raise StudyError(f"{self.what} {name!r}: {self._broken[name]}")
        raise StudyError(f"unknown {self.what} {name!r}; known: {', '.join(self)}")

    def _load(self) -> None:
        if self._loading or self._loaded:
            return
        self._loading = True
        try:
            package = import_module(self._package)
            for module in walk_packages(getattr(package, "__path__", ()), f"{self._package}."):
                import_module(module.name)
            self._own = self._own or frozenset(self._entries)
            for point in entry_points(group=self.group):
                self._add(point)
            self._loaded = True
        finally:
            self._loading = False

    def _add(self, point: EntryPoint) -> None:
        """Add an entry point; a package that does not load only affects its own entries."""
        package = point.dist.name if point.dist else point.value
        try:
            if hasattr(entry := point.load(), "name"):
                self.register(entry)
        except Exception as error:  # whatever another package raises
            reason = f"package {package!r} does not load ({point.value}): {first_line(error)}; fix or remove it"
            self._broken[point.name] = reason
