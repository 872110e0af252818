"""What can be asked for: every option of a run and of a benchmark, stated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from ..datasets.cases import DATASETS
from ..editors.registry import list_editors
from ..subjects.settings import Preset
from ..support.schema import Schema, parse
from ..support.seeds import DEFAULT_SEED
from .paper import STUDY_EDITORS


def _that_edit() -> list[str]:
    return [name for name in list_editors() if name != "none"]


class BenchConfig(Schema):
    """What to measure. Lists may be given as comma-separated text.

    ``cases`` are edited alone, per data set and editor; ``batches`` are the sizes whose throughput is measured (none: no
    throughput); ``threads`` is PyTorch's number of CPU threads (0: as it is). ``show`` names a folder of finished measurements to
    return instead of measuring; ``plain`` names the table of ``benchmarks/whole_case.py``, which RQ2's projection is set beside.
    """

    subject: str = "smollm2-135m"
    random_weights: bool = False
    dataset: named(DATASETS, "data set") = DATASETS  # type: ignore[valid-type]
    editors: named(_that_edit, "editor") = STUDY_EDITORS  # type: ignore[valid-type]
    cases: int = Field(default=10, ge=1)
    batches: tuple[int, ...] = (1, 8)
    device: str = "auto"
    dtype: str = "auto"
    threads: int = Field(default=0, ge=0)
    seed: int = DEFAULT_SEED
    out: Path = Path("runs/bench")
    show: Path | None = None
    plain: Path | None = None

    @field_validator("batches", mode="before")
    @classmethod
    def _sizes(cls, given: Any) -> Any:
        parts = [part for part in given.split(",") if part.strip()] if isinstance(given, str) else given
        if any(int(part) < 1 for part in parts):
            raise ValueError("a batch has at least one case")
        return tuple(sorted({int(part) for part in parts}))


def make_bench_config(**values: Any) -> BenchConfig:
    """A checked configuration; StudyError names the field and what was expected."""
    return parse(BenchConfig, values, "benchmark configuration")


def _split(value: Any) -> Any:
    """``"none,grace"`` as a list: papermill's -p and a shell pass lists as text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def named(known: Sequence[str] | Callable[[], Sequence[str]], what: str) -> Any:
    """The type of a configuration's list of names: each among ``known`` (asked for when checked), kept once, and at least one."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        choices = known() if callable(known) else known
        if not names:
            raise ValueError(f"no {what} given; known: {', '.join(choices)}")
        if unknown := [name for name in names if name not in choices]:
            raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(choices)}")
        return tuple(dict.fromkeys(names))

    return Annotated[Names, AfterValidator(check)]


def _batch_size(value: Any) -> Any:
    if value != "auto" and not (str(value).isdigit() and int(value) >= 1):
        raise ValueError("a whole number of at least 1 is needed, or auto")
    return value


class RunConfig(Schema):
    """What to run. Lists may be given as comma-separated text.

    ``cases`` is per data set (None: all) and ``sample`` says which ones: samples of one number are nested, of another
    number they are other random cases. ``within`` draws them from the cases of an earlier run, to repeat a part of
    it; only cases are drawn that all of the editors have there. ``batch_size`` cases are edited and scored together; with ``auto`` the
    number grows as long as memory is left. A batch that does not fit is halved. ``scored=False`` leaves the scores to ``clme score``. The embedded sets' selection cases are never drawn. ``seed`` is that of every random draw of the study.
    """

    subject: str = "smollm2-135m"
    dataset: named(DATASETS, "data set") = DATASETS  # type: ignore[valid-type]
    editors: named(list_editors, "editor") = ("none", "ft-l", "grace")  # type: ignore[valid-type]
    cases: int | None = Field(default=8, ge=1)
    seed: int = DEFAULT_SEED
    source: str = "embedded"
    preset: Preset = "clean"
    values: str = Field(default="subject", pattern="^(subject|transferred)$")
    device: str = "auto"
    dtype: str = "auto"
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_batch_size)] = 8
    sample: int = 0
    within: Path | None = None
    scored: bool = True
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    out: Path = Path("runs/run")


def make_config(**values: Any) -> RunConfig:
    """A checked configuration; StudyError names the field and what was expected."""
    return parse(RunConfig, values, "run configuration")
