"""What a dataset is: a name, a prompt template, what may be published of it, and how its cases are loaded.

A new one is an object of :class:`Dataset` in a file of its own, registered by :func:`register_dataset` or by the entry-point group
``clme_lib.datasets`` of an installed package; or a JSON file that says its own name and template (:mod:`clme_lib.datasets.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..support.registry import Registry

if TYPE_CHECKING:
    from .cases import Case


EMBEDDED = Path(str(resources.files("clme_lib"))) / "datasets" / "embedded"  # the files that come with the library


@dataclass(frozen=True)
class Layout:
    """How the paper's authors store a dataset: field names of a case's edit input, target and rephrased input, and the file's name."""

    text: str
    target: str
    rephrased: str
    file: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset.

    Attributes:
        name: as in options, records and file names.
        title: as in tables and figures.
        before, after: the prompt template, put around an edit input. A prompt ends in a colon, where editors read their key.
        load: its cases from a source: ``embedded``, ``published``, or the path of a file. Raises StudyError for a source it does not have.
        code: which of ``input`` and ``target`` are Python code.
        publish_texts: whether generated texts may be kept in a published run; else hashes and scores are.
        paper_cases: how many the paper has; None for a dataset that is not the paper's.
        selection: ids of embedded cases that are for choosing hyperparameters and enter no run.
        layout: the authors' file layout, if it has one.
        file: the path of a dataset that is one file; its records name it as their source.
        order: place in tables.
    """

    name: str
    title: str
    before: str
    after: str
    load: Callable[[str], Sequence[Case]]
    code: frozenset[str] = frozenset()
    publish_texts: bool = True
    paper_cases: int | None = None
    selection: frozenset[int] = frozenset()
    layout: Layout | None = None
    file: str | None = None
    order: int = 100

    def prompt(self, text: str) -> str:
        """An edit input in its template.

        Plain concatenation: code is full of braces, which any kind of format string would trip over.
        """
        return self.before + text + self.after

    def text(self, prompt: str) -> str:
        """The edit input inside a prompt."""
        return prompt.removeprefix(self.before).removesuffix(self.after)


_DATASETS: Registry[Dataset] = Registry("dataset", "clme_lib.datasets", "clme_lib.datasets.paper")
register_dataset, get_dataset, list_datasets = _DATASETS.register, _DATASETS.__getitem__, _DATASETS.names


def dataset_title(name: str) -> str:
    """A dataset's name in tables; a name that is not registered here stands for itself."""
    return _DATASETS[name].title if name in _DATASETS else name
