"""A run of a tiny subject in a process of its own, to be killed, starved of disk, or started twice, and what is left of it."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch

EDITORS = ("none", "ft-l", "grace")
# forked from a process that has imported everything and computed nothing: a start costs milliseconds
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["conftest", "clme_lib.study.runs", "sacrebleu", "rouge_score.rouge_scorer"])


def complete(source: Path, out: Path, largest_file: int | None = None, options: dict | None = None) -> None:
    """Start or go on with the run as ``clme run`` would; the exit status is 0, or 1 with the error in ``<out>.error``."""
    from conftest import make_subject

    from clme_lib.study import runs
    from clme_lib.study.config import make_config
    from clme_lib.support import interrupts

    torch.set_num_threads(1)
    os.environ["CLME_CACHE"] = str(out.parent / "cache")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # progress bars
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    subject = make_subject("llama")
    runs.load_subject = lambda *_: subject
    runs.subject_fingerprint = lambda _: subject.fingerprint
    fields = {
        "subject": "tiny-llama",
        "dataset": "cnle",
        "editors": EDITORS,
        "cases": 5,
        "batch_size": 1,
        "name": "run",
    }
    try:
        with interrupts.remembered():
            runs.run(make_config(source=str(source), out=out, **{**fields, **(options or {})}))
    except BaseException as error:
        out.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def start(source: Path, out: Path, **named) -> multiprocessing.Process:
    process = PROCESSES.Process(target=complete, args=(source, out), kwargs=named)
    process.start()
    return process


def finished(process: multiprocessing.Process) -> int:
    """The exit status of a process that ends within a minute."""
    process.join(60)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def recorded(folder: Path) -> list[tuple]:
    """Editor and case of every record that a run has, in whatever state it was left."""
    from clme_lib.support.journal import read_rows

    rows = [row for file in (folder / "records").glob("*.jsonl") for row in read_rows(file)]
    return [(row["editor"], row["case_id"]) for row in rows]


def texts(folder: Path) -> dict[tuple, str]:
    """The hashes of all texts, by editor and case; fails where a record is there twice or damaged."""
    from clme_lib.study import run_folder

    records = run_folder.load_run(folder)
    assert not records.duplicated(["editor", "case_id"]).any()
    hashes = records[[name for name in records if name.startswith("sha256_")]]
    keys = zip(records["editor"], records["case_id"])
    return dict(zip(keys, map(json.dumps, hashes.values.tolist())))


def append(path: Path, writer: int, count: int) -> None:
    """Append rows, each in a write of its own."""
    from clme_lib.support.journal import append_rows

    for number in range(count):
        append_rows(path, [{"writer": writer, "number": number, "text": "x" * 200}])
