"""Nothing is lost: kills at any moment, a full disk, two writers, failed cases, runs that something else made."""

import random
import signal
import time

import interrupted
import pytest
from conftest import run_config, write_source
from interrupted import EDITORS, PROCESSES, finished, recorded, start, texts

from clme_lib import cli
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.grace import GRACE
from clme_lib.evaluation.records import FAILED, SCORED
from clme_lib.study import provenance, run_folder, runs
from clme_lib.support import interrupts
from clme_lib.support.errors import CaseError, StudyError
from clme_lib.support.journal import Journal, append_rows, read_rows

CASES = 5
WHOLE = CASES * len(EDITORS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The dataset of a run, and the run when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_source(folder)
    before = time.monotonic()
    assert finished(start(source, folder / "run")) == 0
    seconds = time.monotonic() - before
    made_alone = texts(folder / "run")
    assert len(made_alone) == WHOLE
    return source, folder / "run", made_alone, seconds


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "times"), [(signal.SIGKILL, 2), (signal.SIGINT, 1), (signal.SIGTERM, 1)])
def test_a_run_that_is_killed_again_and_again_is_the_run(whole, tmp_path, sent, times):
    """Killed at random moments of its life: what was recorded stays, and in the end every case is there once, with the same texts."""
    source, _, undisturbed, seconds = whole
    out, moments = tmp_path / "run", random.Random(sent)
    kept: set = set()
    for _ in range(times):
        process = start(source, out)
        process.join(moments.uniform(0.1, 0.9) * seconds)
        if process.is_alive():
            interrupted.os.kill(process.pid, sent)
        assert finished(process) in (-sent, 0, 1)
        assert kept <= set(recorded(out))
        kept = set(recorded(out))
    assert finished(start(source, out)) == 0
    assert texts(out) == undisturbed


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_costs_nothing(whole, tmp_path):
    source, run, undisturbed, _ = whole
    out = tmp_path / "run"
    longest = max(len(line) for file in (run / "records").iterdir() for line in file.read_bytes().splitlines())
    assert finished(start(source, out, largest_file=longest + 2_000)) == 1
    message = (tmp_path / "run.error").read_text()
    assert "StudyError" in message and "could not append" in message and "Is the disk full?" in message
    partial = run_folder.load_run(out)
    assert len(partial) < WHOLE and set(partial["state"]) == {SCORED}, "a full disk is no case's fault"
    assert finished(start(source, out)) == 0
    assert texts(out) == undisturbed


@pytest.mark.slow
def test_of_two_writers_the_second_is_refused_and_a_dead_one_holds_nothing(whole, tmp_path):
    source, _, undisturbed, _ = whole
    out = tmp_path / "run"
    first = start(source, out)
    while not list(out.glob("records/*.jsonl")) and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(StudyError, match=rf"run: process {first.pid} is writing to this folder; wait for it"):
        with runs.only_writer(out):
            pass
    assert (
        finished(start(source, out)) == 1 and f"process {first.pid} is writing" in (tmp_path / "run.error").read_text()
    )
    first.kill()
    finished(first)
    assert finished(start(source, out)) == 0
    assert texts(out) == undisturbed


@pytest.mark.slow
def test_many_processes_append_to_one_file(tmp_path):
    file = tmp_path / "shared.jsonl"
    file.write_bytes(b'{"torn": ')
    writers = [PROCESSES.Process(target=interrupted.append, args=(file, n, 50)) for n in range(8)]
    for process in writers:
        process.start()
    assert [finished(process) for process in writers] == [0] * 8
    rows = read_rows(file)
    assert len(rows) == 400 and len({(row["writer"], row["number"]) for row in rows}) == 400
    journal = Journal(file, lambda row: (row["writer"], row["number"]))
    append_rows(file, [{"writer": 9, "number": 0}])
    journal.refresh()
    assert len(journal.rows) == 401


def test_ctrl_c_is_not_lost_inside_a_library(tmp_path):
    with pytest.raises(KeyboardInterrupt), interrupts.remembered():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # and this, as a library might, swallows it
        append_rows(tmp_path / "rows.jsonl", [{"kept": True}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"kept": True}]
    interrupts.check()  # nothing is left over for the next command


@pytest.fixture
def config(tiny, source, tmp_path):
    return lambda **changes: run_config(source, **{"out": tmp_path / "run", "batch_size": 8, **changes})


@pytest.fixture
def failing(monkeypatch):
    """Case 1 cannot be edited while this is true."""
    edit_batch, state = GRACE._edit_batch, {"fails": True, "error": CaseError("case 1: its loss is not finite")}

    def edit(self, cases, tokenized):
        if state["fails"] and any(case.case_id == 1 for case in cases):
            raise state["error"]
        return edit_batch(self, cases, tokenized)

    monkeypatch.setattr(GRACE, "_edit_batch", edit)
    return state


def failed(records) -> list[int]:
    return list(records[records["state"] == FAILED]["case_id"])


@pytest.mark.slow
def test_a_failed_case_is_tried_again_when_that_is_asked_for_or_the_library_changed(
    config, failing, monkeypatch, capsys
):
    everything = {"cases": 5}
    assert failed(runs.run(config(**everything))) == [1]
    with pytest.raises(StudyError, match="case 1 by grace failed"):
        from clme_lib.study.copies import publish

        publish(config().out, config().out.with_name("published"))
    failing["fails"] = False
    assert failed(runs.run(config(**everything))) == [1], "not without a reason"
    records = runs.run(config(**everything, retry_failed=True))
    assert not failed(records) and len(records) == 10
    assert len(read_rows(config().out / "records" / "cnle.grace.jsonl")) == 6, "what was recorded stays recorded"
    failing["fails"] = True
    other = {**everything, "out": config().out.with_name("other")}
    assert failed(runs.run(config(**other))) == [1]
    failing["fails"] = False
    monkeypatch.setattr(provenance, "library_sha256", lambda: "changed")
    with pytest.raises(StudyError, match="library=.*library='changed' was requested.*--accept library"):
        runs.run(config(**other))
    assert not failed(runs.run(config(**other, accept="library")))


@pytest.mark.slow
def test_the_command_fails_while_a_case_does(config, failing, tmp_path, source, capsys):
    arguments = ["run", "--subject", "tiny-llama", "--dataset", "cnle", "--editor", "grace", "--cases", "5", "--source", str(source),
                 "--out", str(tmp_path / "run")]  # fmt: skip
    assert cli.main(arguments) == 1
    message = capsys.readouterr().err
    assert (
        "failed: cnle case 1 by grace: CaseError: case 1" in message
        and "1 of 5 cases failed; pass --retry-failed" in message
    )
    failing["fails"] = False
    assert cli.main([*arguments, "--retry-failed"]) == 0


@pytest.mark.parametrize(
    "error", [StudyError("cache/x.safetensors: damaged; remove it"), OSError(28, "No space left", "file")]
)
def test_a_fault_of_the_environment_ends_the_run_and_is_no_record(config, failing, error):
    failing["error"] = error
    with pytest.raises(type(error)):
        runs.run(config(cases=5))
    file = config().out / "records" / "cnle.grace.jsonl"
    assert all(row["error"] is None for row in read_rows(file))
    failing["fails"] = False
    assert not failed(runs.run(config(cases=5)))


def test_records_without_what_made_them_are_not_resumed(config):
    runs.run(config())
    (config().out / "run.json").unlink()
    with pytest.raises(StudyError, match="has records, but no run.json that says what made them"):
        runs.run(config())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "seed=42, but seed=1 was requested"),
        ({"dtype": "bfloat16"}, "dtype='auto', but dtype='bfloat16' was requested"),
        ({"set": "grace.radius=2.5"}, "grace={}, but set grace={'radius': 2.5} was requested"),
        ({"values": "transferred"}, "values='subject', but values='transferred' was requested"),
        ({"preset": "compat"}, "preset='clean', but preset='compat' was requested"),
    ],
)
def test_what_can_change_a_score_cannot_change_between_two_starts(config, changed, says):
    runs.run(config())
    before = {file: file.read_bytes() for file in config().out.rglob("*.json*")}
    with pytest.raises(StudyError, match=says):
        runs.run(config(**changed))
    assert before == {file: file.read_bytes() for file in config().out.rglob("*.json*")}


def test_another_model_or_a_yaml_that_changed_is_another_run(config, monkeypatch):
    runs.run(config())
    with monkeypatch.context() as patch:
        patch.setattr(runs, "subject_fingerprint", lambda name: "another")
        with pytest.raises(StudyError, match="model='random-seed-0', but model='another' was requested"):
            runs.run(config())
    resolve = run_folder.resolve_hparams
    monkeypatch.setattr(
        run_folder,
        "resolve_hparams",
        lambda name, *a, **k: resolve(name, *a, **k, **({"steps": 7} if name == "grace" else {})),
    )
    with pytest.raises(StudyError, match=r"grace.steps=30, but grace.steps=7 was requested"):
        runs.run(config())


def test_more_cases_than_there_are_is_an_answer_with_their_number(config, source):
    assert len(load_cases("cnle", str(source))) == 5
    with pytest.raises(StudyError, match="cases=6: cnle has only 5 cases to draw from"):
        runs.run(config(cases=6))
    assert not config().out.exists()
