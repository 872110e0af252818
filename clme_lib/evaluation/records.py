"""Records: one row per (run, case). Every table, figure and number of the book is a function of them.

Prompts and targets are never in a record; the case id finds them and ``case_sha256`` proves they are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from ..support.errors import StudyError
from ..support.journal import read_rows
from ..support.schema import Schema, parse

SCHEMA_VERSION = 1
MEASURES = ("effectiveness", "generalization", "specificity")
METRICS = ("em", "bleu", "rouge_l")
SCORES = (*(f"{measure}_{metric}" for measure in MEASURES for metric in METRICS), "fluency")
TEXTS = (*MEASURES, "fluency")


class Record(Schema):
    """One case under one editor.

    Scores are in [0, 1] (fluency in bits); seconds and memory describe the batch the edit was made in, seconds divided by
    its size. ``distances`` are a codebook's query distances: edit prompt, rephrased prompt, then the neighbours (None where it was not
    consulted).
    ``answers`` are the unedited subject's, in records that were left to be scored later (:mod:`clme_lib.study.scoring`), which say so as their error.
    ``generated_*`` hold the texts, or None where they are not ours to publish; ``sha256_*`` their hashes always.
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    subject: str
    dataset: str
    source: str
    editor: str
    preset: str
    fold: int
    case_id: int
    case_sha256: str
    effectiveness_em: float | None = None
    effectiveness_bleu: float | None = None
    effectiveness_rouge_l: float | None = None
    generalization_em: float | None = None
    generalization_bleu: float | None = None
    generalization_rouge_l: float | None = None
    specificity_em: float | None = None
    specificity_bleu: float | None = None
    specificity_rouge_l: float | None = None
    specificity_rate: float | None = None
    fluency: float | None = None
    edit_seconds: float | None = None
    edit_batch: int | None = None
    steps: int | None = None
    loss: float | None = None
    peak_memory_mib: float | None = None
    initial_sha256: str = ""
    distances: list[float | None] | None = None
    fired: list[bool] | None = None
    generated_effectiveness: list[str] | None = None
    generated_generalization: list[str] | None = None
    generated_specificity: list[str] | None = None
    generated_fluency: list[str] | None = None
    sha256_effectiveness: list[str] | None = None
    sha256_generalization: list[str] | None = None
    sha256_specificity: list[str] | None = None
    sha256_fluency: list[str] | None = None
    answers: list[str] | None = None
    error: str | None = None

    def row(self) -> dict:
        """The record as it is written: ``answers`` only where there are any."""
        return self.model_dump(exclude={"answers"} if self.answers is None else None)


UNSCORED = "not scored yet: clme score"


def text_hashes(texts: Sequence[str]) -> list[str]:
    """SHA-256 of each text."""
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def without_texts(record: dict) -> dict:
    """The record with its generated texts removed and their hashes kept."""
    return {**record, **{f"generated_{name}": None for name in TEXTS}}


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of JSON Lines files, checked; StudyError names the file and field of a malformed one."""
    records, seen = [], set()
    for path in paths:
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path}, line {number}"
            if row.get("schema_version") != SCHEMA_VERSION:
                raise StudyError(f"{where}: schema_version {row.get('schema_version')!r}, expected {SCHEMA_VERSION}")
            record = parse(Record, row, where)
            key = (record.run, record.subject, record.dataset, record.editor, record.preset, record.case_id)
            if key in seen:
                raise StudyError(f"{where}: a second record of case {record.case_id} by {record.editor}")
            seen.add(key)
            records.append(record)
    return records


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table, one row each."""
    return pd.DataFrame([record.model_dump() for record in records], columns=list(Record.model_fields))
