"""What can be asked for: every option of every command and notebook, stated once.

The command line is made from these classes (:mod:`clme_lib.support.options`); notebooks take any of their fields by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..datasets.paper import PAPER_DATASET_NAMES
from ..metrics.free import STUDY_METRICS
from ..subjects.settings import Preset
from ..support.errors import StudyError
from ..support.reading import parse_yaml
from ..support.schema import Schema, parse
from ..support.seeds import DEFAULT_SEED
from .paper import PAPER_VARIANTS, UNEDITED

Config = TypeVar("Config", bound=Schema)


def make_config(schema: type[Config] | None = None, where: str = "run configuration", **fields: Any) -> Config:
    """A checked configuration, by default a :class:`RunConfig`; StudyError names the field and what was expected."""
    return parse(schema or RunConfig, fields, where)  # type: ignore[return-value]


def _split(value: Any) -> Any:
    """``"none,grace"`` as a list: papermill's -p and a shell pass lists as text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _name_in(registry: str) -> Callable[[str], str]:
    """From a name to the name of its entry; ``registry`` is ``module:function``, imported when it is used."""
    module, function = registry.split(":")
    return lambda name: getattr(import_module(f"clme_lib.{module}"), function)(name).name


def _each(what: str, registry: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """Names as their registry has them, each once, and at least one."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"at least one {what} is needed; `clme list` shows all")
        return tuple(dict.fromkeys(map(_name_in(registry), names)))

    return check


def _paper_dataset(name: str) -> str:
    if name not in PAPER_DATASET_NAMES:
        raise ValueError(f"{name!r} is not one of the paper's datasets: {', '.join(PAPER_DATASET_NAMES)}")
    return name


def _all(value: Any) -> Any:
    """A shell has no way to pass None."""
    return None if isinstance(value, str) and value in ("all", "None", "") else value


def _count_or_auto(value: Any) -> Any:
    if value != "auto" and not _is_count(value):
        raise ValueError(f"a whole number from 1 to {_LARGEST_BATCH} is needed, or auto")
    return value


def _is_count(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", str(value)) is not None and 1 <= int(value) <= _LARGEST_BATCH


def _share(value: Any) -> Any:
    """A number of GPUs: a whole number, or a part of one."""
    if value == "auto":
        return value
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 64 or (share > 1 and share != int(share)):
        raise ValueError("auto, a part of a GPU or a whole number of them is needed")
    return share


def _overrides(given: Any) -> Any:
    """``"grace.radius=2.5,memit.layers=[4, 5]"``, or a list of such, as a value by editor and hyperparameter."""
    if isinstance(given, dict):
        return given
    texts = [given] if isinstance(given, str) else given
    overrides: dict[str, dict[str, Any]] = {}
    for part in (part for text in texts for part in re.split(r",(?=\s*[\w-]+\.\w+\s*=)", text) if part.strip()):
        match = re.fullmatch(r"\s*([\w-]+)\.(\w+)\s*=(.+)", part, re.DOTALL)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not of the form editor.hyperparameter=value")
        try:
            overrides.setdefault(match[1], {})[match[2]] = parse_yaml(match[3], f"{match[1]}.{match[2]}")
        except StudyError as error:
            raise ValueError(str(error)) from error
    return overrides


def _given(value: Any) -> Any:
    if value == "":
        raise ValueError("a name is needed")
    return value


def _sizes(given: Any) -> Any:
    sizes = _split(given)
    if not all(map(_is_count, sizes)):
        raise ValueError(f"a batch has from 1 to {_LARGEST_BATCH} cases")
    return tuple(sorted({int(size) for size in sizes}))


def _editable(editors: tuple[str, ...]) -> tuple[str, ...]:
    if UNEDITED in editors:
        raise ValueError(f"there is nothing to time of {UNEDITED!r}")
    return editors


def _argument(description: str) -> Any:
    """A field that the command line takes by its position."""
    return Field(description=description, json_schema_extra={"positional": True})


def _editors(default: tuple[str, ...] | None, description: str = "comma-separated; see clme list") -> Any:
    return Field(default, description=description, json_schema_extra={"flags": ["--editor", "--editors"]})


_Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Datasets = Annotated[_Names, AfterValidator(_each("dataset", "datasets.registry:find_dataset"))]
Editors = Annotated[_Names, AfterValidator(_each("editor", "editors.registry:get_editor"))]
Metrics = Annotated[_Names, AfterValidator(_each("metric", "metrics.base:get_metric"))]
_Protocol = Annotated[str, AfterValidator(_name_in("study.protocols:get_protocol"))]
_PaperDataset = Annotated[str, AfterValidator(_paper_dataset)]
_CountOrAll = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_all)]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
_LARGEST_BATCH = 65_536
_Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Folder = Annotated[Path, BeforeValidator(_given)]
_Seed = Annotated[int, Field(gt=-(2**53), lt=2**53)]  # what every reader of JSON holds exactly
_SUBJECT = Field("smollm2-135m", min_length=1, description="registry name, Hugging Face id or folder")
_DATASET = Field(PAPER_DATASET_NAMES, description="comma-separated: names, or JSON files that describe a dataset")
_DEVICE = Field("auto", description="auto, cpu, cuda, cuda:N")
_DTYPE: Any = Field("auto", description="auto (float32), float32, bfloat16, float16")
_SEED = Field(DEFAULT_SEED, description="of every random draw")
_RUN = _argument("the run's folder")


class RunConfig(Schema):
    """What to run. Lists may be given as comma-separated text.

    Samples of one number are nested. ``within`` repeats a part of an earlier run: only cases are drawn that all of the editors have
    there. A batch that does not fit is halved. The cases that are for choosing hyperparameters are never drawn.
    """

    subject: str = _SUBJECT
    dataset: Datasets = _DATASET
    editors: Editors = _editors((UNEDITED, "ft-l", "grace"))
    cases: _CountOrAll = Field(8, description="per dataset, or all")
    out: _Folder = Field(Path("runs/run"), description="the run's folder; the same command resumes it")
    name: Annotated[_FileName | None, BeforeValidator(_all)] = Field(
        None, description="in its records; if not given, the folder's name"
    )
    sample: _Seed = Field(0, description="which random sample of cases")
    within: Path | None = Field(None, description="draw the cases from this earlier run's")
    source: str = Field("embedded", description="embedded, published, or a JSON file in the published layout")
    preset: Preset = Field("clean", description="clean, or compat: with the released program's defects")
    values: str = Field(
        "subject",
        pattern="^(subject|transferred)$",
        description="hyperparameters: subject, or transferred (the paper's)",
    )
    set: Annotated[dict[str, dict[str, Any]], BeforeValidator(_overrides)] = Field(
        {}, description="single hyperparameters, such as grace.radius=2.5,memit.layers=[4,5]"
    )
    protocol: _Protocol = Field("single", description="how cases are edited")
    held_out: int = Field(
        0,
        ge=0,
        description="many edits: cases that are not edited, on which each state of the model is evaluated as well",
    )
    metrics: Metrics = Field(STUDY_METRICS, description="comma-separated (default: the study's); see clme list")
    scored: bool = Field(
        True, description="keep the texts and score them later: clme score", json_schema_extra={"off": "--unscored"}
    )
    retry_failed: bool = Field(False, description="try failed cases again (a changed library does so anyway)")
    accept: Annotated[Literal["library"] | None, BeforeValidator(_all)] = Field(
        None, description="library: go on with a run that another version of the library began"
    )
    seed: _Seed = _SEED
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        8, description="cases edited and scored together, or auto: what memory allows"
    )

    on: Literal["here", "ray"] = Field("here", description="here, or ray: on this machine's workers or a cluster's")
    ray_address: str | None = Field(None, description="a cluster's (default: $RAY_ADDRESS, else this machine)")
    workers: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        "auto", description="on Ray, or auto: as many as fit"
    )
    cpus_per_worker: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="on Ray: threads of each")
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_share)] = Field(
        "auto", description="on Ray (auto: 1 where there are GPUs, else 0)"
    )
    dry_run: bool = Field(False, description="say what is left to do, on which workers and for how long, and end")

    @model_validator(mode="after")
    def _overrides_fit(self) -> RunConfig:
        from ..editors.registry import resolve_hparams

        for editor, overrides in self.set.items():
            resolve_hparams(editor, self.subject, values=self.values, preset=self.preset, **overrides)  # type: ignore[arg-type]
        return self


class ReportConfig(RunConfig):
    """What a notebook of results shows: a run, and what stands beside it."""

    beside: Path | None = Field(None, description="folder of another subject's run")


class ManyEditsConfig(RunConfig):
    """What to run of many edits in one model: each protocol with each sample, in a folder of its own."""

    subject: str = Field("smollm2-135m-code", min_length=1, description="registry name, Hugging Face id or folder")
    dataset: Datasets = Field(
        PAPER_DATASET_NAMES[:1], description="comma-separated: names, or JSON files that describe a dataset"
    )
    editors: Editors = _editors((UNEDITED, "in-context", "ft-l", "rome", "grace-tuned"))
    cases: _CountOrAll = Field(3, description="edits in one model")
    held_out: int = Field(3, ge=0, description="cases that are not edited, on which each state is evaluated as well")
    out: _Folder = Field(Path("runs/rq4"), description="folder of a run for each protocol and sample")
    protocols: Annotated[_Names, AfterValidator(_each("protocol", "study.protocols:get_protocol"))] = Field(
        ("sequential", "batch", "simie"), description="comma-separated"
    )
    samples: Annotated[tuple[_Seed, ...], BeforeValidator(_split), Field(min_length=1)] = Field(
        (0,), description="comma-separated: which random samples, each in its own order"
    )
    conflicts: Path | None = Field(None, description="table of clme measure conflicts, which the notebook shows")


class BenchConfig(Schema):
    """What to measure of efficiency. Lists may be given as comma-separated text."""

    subject: str = _SUBJECT
    random_weights: bool = Field(False, description="of a registered subject's exact shape")
    dataset: Datasets = _DATASET
    editors: Annotated[Editors, AfterValidator(_editable)] = _editors(PAPER_VARIANTS)
    cases: int = Field(10, ge=1, description="edited alone, per dataset and editor")
    batches: Annotated[tuple[int, ...], BeforeValidator(_sizes)] = Field(
        (1, 8), description="comma-separated sizes whose throughput is measured; '' for none"
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads; 0: as PyTorch chooses")
    seed: _Seed = _SEED
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE
    out: _Folder = Field(Path("runs/bench"), description="folder of measurements; the same command resumes them")
    show: Path | None = Field(None, description="folder of finished measurements to show instead")
    plain: Path | None = Field(None, description="table of benchmarks/whole_case.py, for what a plain procedure needs")


class MeasureConfig(Schema):
    """Which measurement of the appendices to make. What is not given is the measurement's own default."""

    measurement: str = _argument("its name; `clme measure list` shows all")
    subject: str = _SUBJECT
    editors: Editors | None = _editors(None, "comma-separated")
    dataset: Datasets | None = Field(None, description="comma-separated")
    cases: int | None = Field(None, ge=1, description="selection cases per dataset, of 30")
    out: Path | None = Field(None, description="CSV to write")
    device: _Device = _DEVICE


# The other verbs' (cli.py says what each is for).


class ScoreConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("folder of the scored run to write")
    metrics: Metrics | None = Field(
        None, description="comma-separated metrics to compute anew; if not given, all of the records not scored yet"
    )


class AdaptConfig(Schema):
    out: _Folder = Field(Path("runs/adapt"), description="the adapter's folder; the same command resumes it")
    device: _Device = _DEVICE


class CheckConfig(Schema):
    run: Path = _RUN
    published: Path = _argument("the published run's folder")


class PublishConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("results/runs/NAME")


class SubmitConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("results/submissions/NAME, the folder to write")
    authors: str = Field(min_length=1, description="whose results they are")
    about: str = Field(min_length=1, description="a sentence on the editor, with what is needed to find it")
    url: str | None = Field(None, pattern=r"^https://", description="of its paper or program")
    check_cases: Annotated[int, Field(ge=1)] = Field(2, description="per dataset and editor, edited again now")


class ExportConfig(Schema):
    edits: Path = _argument("file that save_edits wrote")
    to: Path = Field(description="new folder of the adapter or model")
    subject: str = _SUBJECT
    case_ids: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), description="comma-separated: of the edits in the file, those of these cases; if not given, all together"
    )
    merged: bool = Field(False, description="the whole model with the updates in its weights, not an adapter")
    allow_rounding: bool = Field(False, description="merge into 16-bit weights")
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE


class NotebookConfig(Schema):
    source: Path = _argument("notebooks/NAME.py")
    target: Path = _argument("executed .ipynb to write")
    parameters: tuple[tuple[str, str], ...] = Field((), json_schema_extra={"flags": ["-p"], "pairs": True})


class DataBuildConfig(Schema):
    dataset: _PaperDataset = _argument("which of the paper's")
    out: _Folder = Field(description="folder of the stages and of the dataset")
    source: str = Field("embedded", description="embedded, hub (CoNaLa, CodeSearchNet), or a file or folder")
    targets: _CountOrAll = Field(None, description="edit inputs at most")
    seed: int = Field(DEFAULT_SEED, description="of the split")
    encoder: str | None = Field(None, description="Hugging Face encoder of the neighbours; if not given, TF-IDF")
    model: str | None = Field(None, description="CNLE: language model that scores and rewrites; if not given, offline")
    endpoint: str | None = Field(None, description="CNLE: base of an OpenAI-compatible endpoint")
    concurrency: int = Field(8, ge=1, description="CNLE: questions under way at once")
    budget: int | None = Field(None, ge=1, description="CNLE: tokens that may be spent")
    names: str | None = Field(None, description="CSNE: masked language model that renames; if not given, the corpus")
    tokenizer: str | None = Field(None, description="CSNE: counts the 256 tokens; if not given, the embedded subject's")
    answers: str | None = Field(None, description="subject whose answers to the neighbours are written as well")
    device: str = Field("cpu", description="of encoder and masked language model")


class DataLabelsConfig(Schema):
    build: Path = _argument("folder of a built CNLE")
    file: Path = _argument("CSV; written when it does not exist, else read")
    margin: float = Field(0.05, description="of a share, at 95% confidence")


class DataFineTuneConfig(Schema):
    build: Path = _argument("folder of a built CSNE: its non-targeted functions are learnt from")
    out: _Folder = Field(description="folder of the fine-tuned encoder")
    encoder: str = Field("microsoft/codebert-base", description="Hugging Face encoder or folder")
    epochs: int = Field(3, ge=1, description="passes over the functions")
    batch: int = Field(32, ge=1, description="functions in a step")
    lr: float = Field(2e-5, gt=0, description="learning rate")
    device: str = Field("cpu", description="cpu, cuda, cuda:N")


class DataCheckConfig(Schema):
    path: Path = _argument("JSON file")
    dataset: _PaperDataset | None = Field(None, description="which of the paper's; if not given, from the file's name")
