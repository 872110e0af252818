"""What a dataset is: a name, a prompt template, whether its texts may be published, and how its cases are loaded.

A new dataset is a :class:`Dataset` in its own file, registered by :func:`register_dataset` or by the entry-point group
``clme_lib.datasets`` of an installed package; or a JSON file that states its name and template (:mod:`clme_lib.datasets.registry`).
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


EMBEDDED = Path(str(resources.files("clme_lib"))) / "datasets" / "embedded"  # the files shipped with the library


@dataclass(frozen=True)
class Layout:
    """How the paper's authors store a dataset: the field names of edit input, target and rephrased input, and the file's name."""

    text: str
    target: str
    rephrased: str
    file: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset.

    Attributes:
        name: used in options, records and file names.
        title: used in tables and figures.
        before, after: the prompt template, put around an edit input. A prompt ends in a colon, where editors read their key.
        load: returns the cases from a source: ``embedded``, ``published``, or the path of a file. Raises StudyError for any other source.
        code: which of ``input`` and ``target`` are Python code.
        publish_texts: whether a published run may keep generated texts; otherwise it keeps only hashes and scores.
        paper_cases: number of cases in the paper; None for a dataset that is not the paper's.
        selection: ids of the embedded cases that are reserved for choosing hyperparameters and are part of no run.
        layout: the authors' file layout, if it has one.
        file: the path of a dataset that is a single file; its records name that path as their source.
        order: position in tables.
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
        """The prompt: an edit input in the template.

        Plain concatenation: code is full of braces, which any kind of format string would trip over.
        """
        return self.before + text + self.after

    def text(self, prompt: str) -> str:
        """The edit input inside a prompt."""
        return prompt.removeprefix(self.before).removesuffix(self.after)


_DATASETS: Registry[Dataset] = Registry("dataset", "clme_lib.datasets", "clme_lib.datasets.paper")
register_dataset, get_dataset, list_datasets = _DATASETS.register, _DATASETS.get, _DATASETS.names


def dataset_title(name: str) -> str:
    """A dataset's name in tables; a name that is not registered here is returned unchanged."""
    return _DATASETS[name].title if name in _DATASETS else name
