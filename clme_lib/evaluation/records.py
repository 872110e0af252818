"""Records: one row per case of a run. Every table, figure and number of the book is a function of them.

Prompts and targets are never in a record; the case id finds them and ``case_sha256`` proves they are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import pandas as pd

from ..metrics.base import TEXTS
from ..metrics.paper import PAPER_METRICS
from ..support.errors import StudyError
from ..support.journal import read_rows
from ..support.schema import Schema, parse

SCHEMA_VERSION = 2
UNKNOWN = "unknown"  # where a record comes from, when that cannot be proved
SCORED, UNSCORED, FAILED = "scored", "not scored yet", "failed"
_MAPPINGS = {"scores", "texts", "sha256"}  # fields with a value for each metric or measure
_KEY = attrgetter("run", "subject", "dataset", "editor", "preset", "protocol", "position", "case_id")


class Record(Schema):
    """One case under one editor.

    ``protocol`` says how cases were edited, and ``position`` how many edits the model held when the case was evaluated.
    ``start`` is the id, in ``run.json``, of the start that made the record; ``library`` and ``commit`` are of the code that did.
    ``scores`` has a value for each metric (in [0, 1]; fluency in bits; None where a case has nothing to measure it on), or is None when
    the texts have not been scored yet. Seconds and memory describe the batch the edit was made in, seconds divided by its size.
    ``distances`` are a codebook's query distances: edit prompt, rephrased prompt, then the neighbours (None where it was not consulted).
    ``texts`` holds what was written, by measure, or None where it is not ours to publish; ``sha256`` its hashes always; ``answers`` the
    unedited subject's, with which specificity is compared (None in published records and in those of the first schema).
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    subject: str
    dataset: str
    source: str
    editor: str
    preset: str
    protocol: str
    position: int
    fold: int
    case_id: int
    case_sha256: str
    start: str = UNKNOWN
    library: str = UNKNOWN
    commit: str = UNKNOWN
    scores: dict[str, float | None] | None = None
    edit_seconds: float | None = None
    edit_batch: int | None = None
    steps: int | None = None
    loss: float | None = None
    peak_memory_mib: float | None = None
    initial_sha256: str = ""
    distances: list[float | None] | None = None
    fired: list[bool] | None = None
    texts: dict[str, list[str]] | None = None
    sha256: dict[str, list[str]] | None = None
    answers: list[str] | None = None
    error: str | None = None

    @property
    def state(self) -> str:
        """``scored``, ``not scored yet``, or ``failed`` with a reason in ``error``."""
        if self.error is not None:
            return FAILED
        return UNSCORED if self.scores is None else SCORED


def text_hashes(texts: Sequence[str]) -> list[str]:
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of JSON Lines files, checked; StudyError names the file and field of a malformed one."""
    records, seen = [], set()
    for path in paths:
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path}, line {number}"
            if row.get("schema_version") != SCHEMA_VERSION:
                raise StudyError(
                    f"{where}: schema_version {row.get('schema_version')!r}, expected {SCHEMA_VERSION}; records of version 1 "
                    "are converted by `python results/migrate.py FOLDER`"
                )
            record = parse(Record, row, where)
            if _KEY(record) in seen:
                raise StudyError(f"{where}: a second record of case {record.case_id} by {record.editor}")
            seen.add(_KEY(record))
            records.append(record)
    return records


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table: a column for each other field, for each metric, and ``state``; ``generated_<measure>`` and
    ``sha256_<measure>`` hold lists, or None."""
    rows, metrics = [], dict.fromkeys(PAPER_METRICS)
    for record in records:
        row = record.model_dump(exclude=_MAPPINGS) | {"state": record.state} | (record.scores or {})
        for kind, by_measure in (("generated", record.texts), ("sha256", record.sha256)):
            row |= {f"{kind}_{name}": (by_measure or {}).get(name) for name in TEXTS}
        rows.append(row)
        metrics |= dict.fromkeys(record.scores or ())
    fields = [name for name in Record.model_fields if name not in _MAPPINGS]
    lists = [f"{kind}_{name}" for kind in ("generated", "sha256") for name in TEXTS]
    return pd.DataFrame(rows, columns=[*fields, "state", *metrics, *lists])
