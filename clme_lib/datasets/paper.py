"""The paper's two datasets (section III-C). Their names are spelt here alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..support.errors import StudyError
from .base import EMBEDDED, Dataset, Layout, get_dataset, register_dataset

if TYPE_CHECKING:
    from .cases import Case


def _load(name: str, embedded: str, source: str) -> Sequence[Case]:
    """Cases of one of the paper's datasets; ``embedded`` is the module that makes the embedded ones."""
    published = import_module("clme_lib.datasets.published")
    dataset = get_dataset(name)
    if source == "embedded":
        return import_module(f"clme_lib.datasets.{embedded}").load(dataset)
    if source == "published":
        return published.read(published.fetch(dataset), dataset)
    if os.path.isfile(source):
        return published.read(source, dataset)
    raise StudyError(f"source {source!r} is neither 'embedded', 'published', nor the path of a JSON file")


def _paper(name: str, embedded: str, **fields: Any) -> Dataset:
    selection = json.loads((EMBEDDED / "selection.json").read_text(encoding="utf-8"))
    load, ids = partial(_load, name, embedded), frozenset(selection[name])
    return register_dataset(Dataset(name, name.upper(), load=load, selection=ids, **fields))


CNLE = _paper(
    "cnle",
    "embedded_cnle",
    before="Intent: ",
    after="\nCode:",
    code=frozenset({"target"}),
    paper_cases=21_055,
    layout=Layout("intent", "snippet", "rewritten_intent", "EditConala"),
    order=1,
)
CSNE = _paper(
    "csne",
    "embedded_csne",
    before="Code: ",
    after="\nDescription:",
    code=frozenset({"input"}),
    publish_texts=False,  # mined from packages whose source code may not be redistributed here
    paper_cases=16_000,  # the paper says slightly more than this
    layout=Layout("code", "code_doc", "code_rewrite", "EditCodeSearchNet"),
    order=2,
)
PAPER_DATASETS = (CNLE, CSNE)
PAPER_DATASET_NAMES = tuple(dataset.name for dataset in PAPER_DATASETS)
