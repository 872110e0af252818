"""Records: one row per case and editor of a run. Every table, figure and number of the book is a function of records.

A record never contains prompts or targets; the case id identifies them, and ``case_sha256`` proves that they are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, Field, model_validator

from ..datasets.base import get_dataset
from ..datasets.cases import Case
from ..metrics.base import FREE_TEXTS, TEXTS, Evaluated, get_metric, list_metrics
from ..metrics.paper import PAPER_METRICS
from ..subjects.settings import Preset
from ..support.errors import StudyError
from ..support.journal import read_rows
from ..support.schema import Schema, parse

SCHEMA_VERSION = 2
UNKNOWN = "unknown"  # provenance of a record that cannot be proved
SCORED, UNSCORED, FAILED = "scored", "not scored yet", "failed"
_MAPPINGS = {"scores", "texts", "sha256"}  # fields with a value for each metric or measure
_KEY = attrgetter("run", "subject", "dataset", "editor", "preset", "protocol", "position", "case_id")


def _of_each_measure(by_measure: dict[str, Any] | None) -> dict[str, Any] | None:
    if by_measure is not None and set(by_measure) - set(FREE_TEXTS) != set(TEXTS):
        raise ValueError(
            f"expected an entry for each of {', '.join(TEXTS)}, and otherwise only {', '.join(FREE_TEXTS)}"
        )
    return by_measure


def _in_range(scores: dict[str, float | None] | None) -> dict[str, float | None] | None:
    for name, score in (scores or {}).items():
        if score is None or name not in list_metrics():  # a metric that is not installed here
            continue
        metric = get_metric(name)
        of_one_text = metric.measure not in ("generalization", FREE_TEXTS[1])  # Others are means over several.
        binary = metric.binary and of_one_text
        if not 0 <= score <= metric.highest or (binary and score not in (0, 1)):
            allowed = "0 or 1" if binary else f"from 0 to {metric.highest:g}"
            raise ValueError(f"{name} is {score}, but must be {allowed}")
    return scores


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Measured = Annotated[float | None, Field(ge=0)]


class Record(Schema):
    """The result of one case with one editor."""

    schema_version: Literal[2] = Field(2, description="2")
    run: _Name = Field(description="name of the run")
    subject: str = Field(description="the model under edit")
    dataset: _Name = Field(description="dataset")
    source: str = Field(description="source of its cases: embedded, published, or a file")
    editor: _Name = Field(description="editor; none is the unedited subject")
    preset: Preset = Field(description="clean, or compat (with the released program's defects)")
    protocol: _Name = Field(description="how cases were edited: single, or many in one model")
    position: int = Field(ge=1, description="how many edits the model held when the case was evaluated")
    fold: int = Field(ge=0, le=1, description="the case's half of the dataset; trained editors learnt from the other")
    case_id: int = Field(ge=0, lt=2**53, description="the case's id in the dataset")  # exact in every JSON reader
    case_sha256: _Hash = Field(description="SHA-256 of the case's texts, which are not in the record")
    start: str = Field(UNKNOWN, description="id, in run.json, of the start that made the record")
    library: str = Field(UNKNOWN, description="SHA-256 of the library's files when the record was made")
    commit: str = Field(UNKNOWN, description="commit of these files; +changes: with uncommitted changes")
    scores: Annotated[dict[str, float | None] | None, AfterValidator(_in_range)] = Field(
        None,
        description="by metric, from 0 to 1 (fluency in bits, overrun in tokens); null if the case has nothing that the metric could measure; all "
        "null if the texts have not been scored yet",
    )
    edit_seconds: _Measured = Field(None, description="seconds of the batch with this edit, divided by its size")
    edit_batch: int | None = Field(None, ge=1, description="number of cases in that batch")
    steps: int | None = Field(None, ge=0, description="optimisation steps that the edit took")
    loss: float | None = Field(None, description="last loss, in nats per token of the target")
    peak_memory_mib: _Measured = Field(None, description="peak memory of that batch (on a CPU, of the process)")
    initial_sha256: str = Field("", description="SHA-256 of the optimisation's initial value")
    distances: list[_Measured] | None = Field(
        None,
        description="distances from a codebook's key to the queries of the edit prompt, the rephrased prompt and each neighbour; null if it was not "
        "consulted",
    )
    fired: list[bool] | None = Field(None, description="whether the codebook fired at these prompts, in the same order")
    texts: Annotated[dict[str, list[str]] | None, AfterValidator(_of_each_measure)] = Field(
        None, description="generated texts, by measure; null if they may not be published"
    )
    sha256: Annotated[dict[str, list[_Hash]] | None, AfterValidator(_of_each_measure)] = Field(
        None, description="SHA-256 of each of these texts"
    )
    answers: list[str] | None = Field(
        None,
        description="the unedited subject's answers to the neighbours; null if they were not kept or may not be published",
    )
    free_tokens: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="numbers of tokens of the free texts (edit prompt, then rephrased); fewer than 64 if a text ended earlier",
    )
    target_tokens: int | None = Field(None, ge=1, description="number of tokens of the target")
    held_out: bool = Field(False, description="whether the model that holds many edits holds none of this case")
    target_loss: float | None = Field(
        None, description="of cases that are held out: -log p(target | prompt), in nats per token of the target"
    )
    edits_mib: _Measured = Field(
        None, description="of a model that holds many edits: size of the tensors of all its edits together, in MiB"
    )
    error: str | None = Field(None, description="why the case could not be edited; such a record has no scores")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Record:
        if self.error is not None:
            if self.scores or self.texts:
                raise ValueError("error: a case that failed has neither scores nor texts")
            return self
        if self.sha256 is None:
            raise ValueError("sha256: the hashes of the texts are missing")
        for measure, texts in (self.texts or {}).items():
            if text_hashes(texts) != self.sha256[measure]:
                raise ValueError(f"texts.{measure}: the texts do not have the recorded SHA-256")
        counted = {"distances": TEXTS[:-1], "fired": TEXTS[:-1], "answers": ("specificity",), "free_tokens": FREE_TEXTS}
        for name, measures in counted.items():
            per_text = getattr(self, name)
            expected = sum(len(self.sha256.get(measure, ())) for measure in measures)
            if per_text is not None and len(per_text) != expected:
                raise ValueError(f"{name}: {len(per_text)} values for {expected} texts")
        return self

    @property
    def state(self) -> str:
        """``scored``, ``not scored yet``, or ``failed`` with a reason in ``error``."""
        if self.error is not None:
            return FAILED
        return UNSCORED if self.scores is None else SCORED


def evaluated(record: Record, case: Case, answers: Sequence[str]) -> Evaluated:
    """The metrics' input from a record whose texts were kept."""
    return Evaluated(
        case,
        record.texts or {},
        answers,
        get_dataset(case.dataset).code,
        record.free_tokens or (),
        record.target_tokens or 0,
        record.fired or (),
    )


def text_hashes(texts: Sequence[str]) -> list[str]:
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]


def finite(value: float | None) -> float | None:
    """The value, or None if JSON cannot represent it."""
    return value if value is not None and math.isfinite(value) else None


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of JSON Lines files named ``<dataset>.<editor>.jsonl``, with types, ranges, hashes of texts and file
    names checked. A failed case that was tried again has its later record. StudyError names file, line and field of a wrong record."""
    records: dict[tuple, Record] = {}
    for path in paths:
        place = path.name.removesuffix(".jsonl")
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path}, line {number}"
            if row.get("schema_version") != SCHEMA_VERSION:
                raise StudyError(
                    f"{where}: schema_version {row.get('schema_version')!r}, expected {SCHEMA_VERSION}; records of version 1 "
                    "are converted by `python results/migrate.py FOLDER`"
                )
            record = parse(Record, row, where, strict=True)
            if f"{record.dataset}.{record.editor}" != place:
                raise StudyError(
                    f"{where}: a record of {record.editor} on {record.dataset} does not belong in this file"
                )
            earlier = records.pop(_KEY(record), None)
            if earlier is not None and earlier.state != FAILED:
                raise StudyError(f"{where}: a second record of case {record.case_id} by {record.editor}")
            records[_KEY(record)] = record
    return list(records.values())


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table: a column for each other field, for each metric, and ``state``; ``generated_<measure>`` and
    ``sha256_<measure>`` hold lists, or None."""
    rows, metrics = [], dict.fromkeys(PAPER_METRICS)
    for record in records:
        row = record.model_dump(exclude=_MAPPINGS) | {"state": record.state} | (record.scores or {})
        for kind, by_measure in (("generated", record.texts), ("sha256", record.sha256)):
            row |= {f"{kind}_{name}": (by_measure or {}).get(name) for name in (*TEXTS, *FREE_TEXTS)}
        rows.append(row)
        metrics |= dict.fromkeys(record.scores or ())
    fields = [name for name in Record.model_fields if name not in _MAPPINGS]
    lists = [f"{kind}_{name}" for kind in ("generated", "sha256") for name in (*TEXTS, *FREE_TEXTS)]
    table = pd.DataFrame(rows, columns=[*fields, "state", *metrics, *lists])
    return table.astype({"held_out": bool})  # so that it selects rows even where there are none
