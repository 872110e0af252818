"""Every option of every command and notebook, defined once.

The command line is generated from these classes (:mod:`clme_lib.support.options`); notebooks take any of their fields by name.
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
    """A validated configuration, by default a :class:`RunConfig`; StudyError names the field and what was expected."""
    return parse(schema or RunConfig, fields, where)  # type: ignore[return-value]


def _split(value: Any) -> Any:
    """``"none,grace"`` as a list: papermill's -p and a shell pass lists as text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _once(values: tuple) -> tuple:
    """Values in their order, each once."""
    return tuple(dict.fromkeys(values))


def _name_in(registry: str) -> Callable[[str], str]:
    """A function that looks a name up and returns its entry's name; ``registry`` is ``module:function``, imported on use."""
    module, function = registry.split(":")
    return lambda name: getattr(import_module(f"clme_lib.{module}"), function)(name).name


def _each(what: str, registry: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A check that there is at least one name; it returns the registry's names, each once."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"at least one {what} is needed; `clme list` shows all")
        return _once(tuple(map(_name_in(registry), names)))

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
        raise ValueError(f"expected a whole number from 1 to {_LARGEST_BATCH}, or auto")
    return value


def _is_count(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", str(value)) is not None and 1 <= int(value) <= _LARGEST_BATCH


def _share(value: Any) -> Any:
    """A number of GPUs: a whole number, or a fraction of one."""
    if value == "auto":
        return value
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 64 or (share > 1 and share != int(share)):
        raise ValueError("expected auto, a fraction of a GPU, or a whole number of GPUs")
    return share


def _overrides(given: Any) -> Any:
    """``"grace.radius=2.5,memit.layers=[4, 5]"``, or a list of such texts, as ``{editor: {hyperparameter: value}}``."""
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
        raise ValueError(f"a batch holds 1 to {_LARGEST_BATCH} cases")
    return tuple(sorted({int(size) for size in sizes}))


def _editable(editors: tuple[str, ...]) -> tuple[str, ...]:
    if UNEDITED in editors:
        raise ValueError(f"{UNEDITED!r} makes no edit that could be timed; leave it out")
    return editors


def _argument(description: str) -> Any:
    """A field that is a positional argument on the command line."""
    return Field(description=description, json_schema_extra={"positional": True})


def _editors(default: tuple[str, ...] | None, description: str = "comma-separated editors; see clme list") -> Any:
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
_Seed = Annotated[int, Field(gt=-(2**53), lt=2**53)]  # integers that every JSON reader represents exactly
_SUBJECT = Field("smollm2-135m", min_length=1, description="registered name, Hugging Face id or folder")
_DATASET = Field(PAPER_DATASET_NAMES, description="comma-separated names, or JSON files that describe a dataset")
_DEVICE = Field("auto", description="auto, cpu, cuda, cuda:N")
_DTYPE: Any = Field("auto", description="auto (float32), float32, bfloat16, float16")
_SEED = Field(DEFAULT_SEED, description="seed of every random draw")
_RUN = _argument("the run's folder")


class RunConfig(Schema):
    """What to run. Lists may be given as comma-separated text.

    Samples with the same ``sample`` number are nested. ``within`` repeats part of an earlier run: only cases that it has for all of the
    editors are drawn. A batch that does not fit into memory is halved. Selection cases are never drawn.
    """

    subject: str = _SUBJECT
    dataset: Datasets = _DATASET
    editors: Editors = _editors((UNEDITED, "ft-l", "grace"))
    cases: _CountOrAll = Field(8, description="number of cases per dataset, or all")
    out: _Folder = Field(Path("runs/run"), description="the run's folder; the same command resumes it")
    name: Annotated[_FileName | None, BeforeValidator(_all)] = Field(
        None, description="name of the run in its records (default: the folder's name)"
    )
    sample: _Seed = Field(0, description="number of the random sample of cases")
    within: Path | None = Field(None, description="folder of an earlier run to draw the cases from")
    source: str = Field("embedded", description="embedded, published, or a JSON file in the published layout")
    preset: Preset = Field("clean", description="clean, or compat (with the released program's defects)")
    values: str = Field(
        "subject",
        pattern="^(subject|transferred)$",
        description="hyperparameters: the subject's own (subject) or the paper's (transferred)",
    )
    set: Annotated[dict[str, dict[str, Any]], BeforeValidator(_overrides)] = Field(
        {}, description="single hyperparameters to change, such as grace.radius=2.5,memit.layers=[4,5]"
    )
    protocol: _Protocol = Field("single", description="how cases are edited; see clme list")
    held_out: int = Field(0, ge=0, description="many edits: unedited cases on which each state is evaluated as well")
    metrics: Metrics = Field(STUDY_METRICS, description="comma-separated metrics (default: the study's); see clme list")
    scored: bool = Field(
        True, description="keep the texts, to be scored later by clme score", json_schema_extra={"off": "--unscored"}
    )
    retry_failed: bool = Field(False, description="try failed cases again (always done if the library has changed)")
    accept: Annotated[Literal["library"] | None, BeforeValidator(_all)] = Field(
        None, description="library: resume a run that another version of the library began"
    )
    seed: _Seed = _SEED
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        8, description="cases edited and scored together, or auto (as many as memory allows)"
    )

    on: Literal["here", "ray"] = Field("here", description="here (this process), or ray (workers, local or remote)")
    ray_address: str | None = Field(None, description="address of a cluster (default: $RAY_ADDRESS, else this machine)")
    workers: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        "auto", description="number of Ray workers, or auto (as many as fit)"
    )
    cpus_per_worker: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="threads of each Ray worker")
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_share)] = Field(
        "auto", description="GPUs of each Ray worker; auto: 1 if there are GPUs, else 0"
    )
    dry_run: bool = Field(False, description="only print what is left to do, on which workers and for how long")

    @model_validator(mode="after")
    def _overrides_fit(self) -> RunConfig:
        from ..editors.registry import resolve_hparams

        for editor, overrides in self.set.items():
            resolve_hparams(editor, self.subject, values=self.values, preset=self.preset, **overrides)  # type: ignore[arg-type]
        return self


class ReportConfig(RunConfig):
    """What a results notebook shows: a run, and optionally a second one to compare it with."""

    beside: Path | None = Field(None, description="folder of another subject's run, to compare with")


class ManyEditsConfig(RunConfig):
    """Which runs of many edits in one model to make: one per protocol and sample, each in its own folder."""

    subject: str = Field("smollm2-135m-code", min_length=1, description="registered name, Hugging Face id or folder")
    dataset: Datasets = Field(
        PAPER_DATASET_NAMES[:1], description="comma-separated names, or JSON files that describe a dataset"
    )
    editors: Editors = _editors((UNEDITED, "in-context", "ft-l", "rome", "grace-tuned"))
    cases: _CountOrAll = Field(3, description="number of edits in one model")
    held_out: int = Field(3, ge=0, description="unedited cases on which each state is evaluated as well")
    out: _Folder = Field(Path("runs/rq4"), description="folder of the runs, one per protocol and sample")
    protocols: Annotated[_Names, AfterValidator(_each("protocol", "study.protocols:get_protocol"))] = Field(
        ("sequential", "batch", "simie"), description="comma-separated protocols; see clme list"
    )
    samples: Annotated[tuple[_Seed, ...], BeforeValidator(_split), AfterValidator(_once), Field(min_length=1)] = Field(
        (0,), description="comma-separated numbers of random samples, each with its own order"
    )
    interference: Path | None = Field(None, description="table to show, as clme measure interference writes it")
    conflicts: Path | None = Field(None, description="table to show, as clme measure conflicts writes it")


class BenchConfig(Schema):
    """Which costs of editing to measure. Lists may be given as comma-separated text."""

    subject: str = _SUBJECT
    random_weights: bool = Field(False, description="random weights in the exact shape of a registered subject")
    dataset: Datasets = _DATASET
    editors: Annotated[Editors, AfterValidator(_editable)] = _editors(PAPER_VARIANTS)
    cases: int = Field(10, ge=1, description="cases edited one at a time, per dataset and editor")
    batches: Annotated[tuple[int, ...], BeforeValidator(_sizes)] = Field(
        (1, 8), description="comma-separated batch sizes to measure throughput with; '' for none"
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads; 0 leaves the choice to PyTorch")
    seed: _Seed = _SEED
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE
    out: _Folder = Field(Path("runs/bench"), description="folder of measurements; the same command resumes them")
    show: Path | None = Field(None, description="folder of finished measurements to show instead")
    whole_cases: Path | None = Field(
        None,
        description="folder of batches to compare with the floor of whole cases, if they were measured on their own",
    )
    plain: Path | None = Field(None, description="table of a plain procedure's times, by benchmarks/whole_case.py")


class MeasureConfig(Schema):
    """Which of the appendices' measurements to make. Options that are not given have the measurement's defaults."""

    measurement: str = _argument("name of the measurement; `clme measure list` shows all")
    subject: str = _SUBJECT
    editors: Editors | None = _editors(None, "comma-separated editors")
    dataset: Datasets | None = Field(None, description="comma-separated datasets")
    cases: int | None = Field(None, ge=1, description="number of selection cases per dataset, at most 30")
    out: Path | None = Field(None, description="CSV file to write")
    device: _Device = _DEVICE


# The configurations of the other verbs (cli.py says what each verb does).


class ScoreConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("folder of the scored run to write")
    metrics: Metrics | None = Field(
        None, description="comma-separated metrics to recompute (default: the study's, in records without scores)"
    )


class AdaptConfig(Schema):
    out: _Folder = Field(Path("runs/adapt"), description="the adapter's folder; the same command resumes it")
    device: _Device = _DEVICE


class CheckConfig(Schema):
    run: Path = _RUN
    published: Path = _argument("folder of the published run")


class PublishConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("results/runs/NAME")


class SubmitConfig(Schema):
    run: Path = _RUN
    target: Path = _argument("results/submissions/NAME, the folder to write")
    authors: str = Field(min_length=1, description="names of the authors of the results")
    about: str = Field(min_length=1, description="a sentence about the editor that says where to find it")
    url: str | None = Field(None, pattern=r"^https://", description="https:// address of the editor's paper or program")
    check_cases: Annotated[int, Field(ge=1)] = Field(2, description="cases per dataset and editor to edit again")


class ExportConfig(Schema):
    edits: Path = _argument("file that save_edits wrote")
    to: Path = Field(description="new folder to write the adapter or model to")
    subject: str | None = Field(
        None, min_length=1, description="registered name, Hugging Face id or folder (default: what the file names)"
    )
    case_ids: Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_once)] = Field(
        (), description="comma-separated ids of the cases whose edits to export; if not given, all edits together"
    )
    merged: bool = Field(False, description="write the whole model, updates included, instead of an adapter")
    allow_rounding: bool = Field(False, description="merge into 16-bit weights, which loses most of an update")
    device: _Device = _DEVICE
    dtype: _Dtype = _DTYPE


class NotebookConfig(Schema):
    source: Path = _argument("notebooks/NAME.py")
    target: Path = _argument("executed .ipynb to write")
    parameters: tuple[tuple[str, str], ...] = Field(
        (), description="a notebook parameter; may be repeated", json_schema_extra={"flags": ["-p"], "pairs": True}
    )


class DataBuildConfig(Schema):
    dataset: _PaperDataset = _argument("cnle or csne")
    out: _Folder = Field(description="folder for the stages and the dataset")
    source: str = Field("embedded", description="embedded, hub (CoNaLa or CodeSearchNet), or a file or folder")
    targets: _CountOrAll = Field(None, description="maximum number of edit inputs")
    seed: int = Field(DEFAULT_SEED, description="seed of the split")
    encoder: str | None = Field(None, description="Hugging Face encoder that finds the neighbours (default: TF-IDF)")
    model: str | None = Field(None, description="CNLE: language model that scores and rewrites; offline if not given")
    endpoint: str | None = Field(None, description="CNLE: base URL of an OpenAI-compatible endpoint")
    concurrency: int = Field(8, ge=1, description="CNLE: maximum number of parallel requests")
    budget: int | None = Field(None, ge=1, description="CNLE: maximum number of tokens to spend")
    names: str | None = Field(None, description="CSNE: masked language model that renames (default: corpus statistics)")
    tokenizer: str | None = Field(
        None, description="CSNE: tokenizer that counts the 256 tokens; if not given, the embedded subject's"
    )
    answers: str | None = Field(None, description="subject whose answers to the neighbours are also written")
    device: str = Field("cpu", description="device of the encoder and the masked language model")


class DataLabelsConfig(Schema):
    build: Path = _argument("folder of a built CNLE")
    file: Path = _argument("CSV file; written if it does not exist, else read")
    margin: float = Field(0.05, description="margin of error of a share, at 95% confidence")


class DataFineTuneConfig(Schema):
    build: Path = _argument("folder of a built CSNE, whose non-targeted functions are the training data")
    out: _Folder = Field(description="folder of the fine-tuned encoder")
    encoder: str = Field("microsoft/codebert-base", description="Hugging Face encoder or folder")
    epochs: int = Field(3, ge=1, description="passes over the functions")
    batch: int = Field(32, ge=1, description="functions per step")
    lr: float = Field(2e-5, gt=0, description="learning rate")
    device: str = Field("cpu", description="cpu, cuda, cuda:N")


class DataCheckConfig(Schema):
    path: Path = _argument("JSON file")
    dataset: _PaperDataset | None = Field(None, description="cnle or csne; if not given, the file's name decides")
