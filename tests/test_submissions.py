"""Results that others send in, and the leaderboard that shows them beside ours."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from clme_lib import cli
from clme_lib.evaluation.records import SCORED
from clme_lib.study import leaderboard, provenance, run_folder, runs, submissions
from clme_lib.study.config import SubmitConfig, make_config
from clme_lib.study.tables import interval
from clme_lib.support.errors import StudyError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """A finished run of embedded cases by a committed library."""
    monkeypatch.setattr(provenance, "commit", lambda: "c" * 40)
    monkeypatch.setattr(submissions, "LEAST_CASES", 3)
    fields = {
        "subject": "tiny-llama",
        "dataset": "cnle",
        "editors": "none,grace",
        "set": "grace.steps=2",
        "batch_size": 4,
    }
    runs.run(make_config(**fields, cases=3, out=tmp_path / "run"))
    return tmp_path / "run"


def submit(run: Path, target: Path, **changes) -> submissions.Submission:
    fields = {"run": run, "target": target, "authors": "A. Author", "about": "an editor", "check_cases": 1}
    return submissions.submit(make_config(SubmitConfig, **{**fields, **changes}))


def test_a_submission_is_checked_edited_again_and_readable(run, tmp_path):
    target = tmp_path / "results" / "submissions" / "mine"
    submission = submit(run, target, url="https://example.org")
    assert submission == submissions.load_submission(target)
    assert submission.checked.greedy == submission.checked.greedy_same > 0 and submission.checked.cases == 2
    assert set(submission.packages) == {"none", "grace"} and submission.packages["grace"].startswith("clme ")
    assert sorted(path.name for path in target.parent.iterdir()) == ["mine"], "nothing else is left behind"
    rows = [row for row, _ in leaderboard.board(tmp_path / "results")]
    assert [(row["editor"], row["authors"], row["n"]) for row in rows] == [
        ("unedited", "A. Author", 3),
        ("GRACE", "A. Author", 3),
    ]
    hostile = {**json.loads((target / "submission.json").read_text()), "authors": "<img src=x onerror=alert(1)>"}
    (target / "submission.json").write_text(json.dumps(hostile))
    plain = leaderboard.write(tmp_path / "results", tmp_path / "site")
    assert "<img" not in plain and "img src&#61;x" in plain
    with pytest.raises(StudyError, match="already exists"):
        submit(run, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"commit": "unknown", "library": "0" * 64}, "the record does not say what made it"),
        (lambda record: record | {"start": "nobody"}, "the record does not say what made it"),
        (lambda record: record | {"commit": "c" * 40 + "+changes"}, "uncommitted changes"),
        (lambda record: record | {"case_sha256": "0" * 64}, "has changed since it was recorded"),
        (lambda record: None if record["editor"] == "none" else record, "has no unedited record to compare with"),
    ],
)
def test_what_cannot_be_trusted_is_refused_and_nothing_is_written(run, tmp_path, change, message):
    for file in run_folder.record_files(run):
        records = [change(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(record) + "\n" for record in records if record))
        if not any(records):
            file.unlink()
    with pytest.raises(StudyError, match=message.replace("(", r"\(")):
        submit(run, tmp_path / "submissions" / "mine")
    assert not list((tmp_path / "submissions").iterdir())


def test_texts_that_do_not_come_out_again_are_refused(run, tmp_path):
    file = run / "records" / "cnle.grace.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    from clme_lib.evaluation.records import text_hashes

    for record in records:
        for measure in ("effectiveness", "generalization", "specificity"):
            record["texts"][measure] = [text + " better" for text in record["texts"][measure]]
            record["sha256"][measure] = text_hashes(record["texts"][measure])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(StudyError, match="was not reproduced"):
        submit(run, tmp_path / "submissions" / "mine")
    assert not list((tmp_path / "submissions").iterdir())


def test_a_few_cases_and_own_files_are_refused(run, tiny, source, tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "LEAST_CASES", 4)
    with pytest.raises(StudyError, match="3 cases of cnle by .*; at least 4 are needed"):
        submit(run, tmp_path / "submissions" / "mine")
    own = {"subject": "tiny-llama", "dataset": "cnle", "editors": "none", "cases": 2, "source": str(source)}
    runs.run(make_config(**own, out=tmp_path / "own"))
    with pytest.raises(StudyError, match="which others do not have"):
        submit(tmp_path / "own", tmp_path / "submissions" / "mine")


def test_the_command_says_what_to_do_next(run, tmp_path, capsys):
    target = tmp_path / "submissions" / "mine"
    arguments = ["submit", str(run), str(target), "--authors", "A", "--about", "b", "--check-cases", "1"]
    assert cli.main(arguments) == 0
    assert "cases were reproduced" in (out := capsys.readouterr().out) and "pull request" in out
    (target / "submission.json").unlink()
    with pytest.raises(StudyError, match="submission.json is missing"):
        submissions.load_submission(target)


def test_a_submission_changed_by_hand_is_noticed(run, tmp_path):
    target = tmp_path / "submissions" / "mine"
    submit(run, target)
    file = target / "submission.json"
    content = json.loads(file.read_text())
    for change, message in (
        ({"packages": {"none": "x"}}, "grace must be both"),
        ({"checked": {**content["checked"], "greedy_same": 0}}, "too few"),
        ({"url": "javascript:alert(1)"}, "url"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(StudyError, match=message):
            submissions.load_submission(target)


@pytest.mark.parametrize("folder", sorted((RESULTS / "submissions").glob("*/")), ids=lambda folder: folder.name)
def test_every_submission_of_the_repository_is_what_it_says(folder):
    submission = submissions.load_submission(folder)
    assert submission.checked.cases >= 1 and (run_folder.load_run(folder)["state"] == SCORED).all()


def contents(file: Path):
    text = file.read_text()
    assert text.startswith("clme.loaded(") and text.endswith(");\n")
    return json.loads(f"[{text.removeprefix('clme.loaded(').removesuffix(');' + chr(10))}]")


@pytest.mark.slow
def test_the_leaderboard_shows_what_the_records_say(tmp_path):
    results = tmp_path / "results"
    for name in ("smollm2-135m-code", "smollm2-135m-compat"):
        shutil.copytree(RESULTS / "runs" / name, results / "runs" / name)
    plain = leaderboard.write(results, tmp_path / "site")
    name, shown = contents(tmp_path / "site" / "board.js")
    assert name == "board"
    records = pd.concat([run_folder.load_run(folder) for folder in leaderboard.run_folders(results)])
    groups = records.groupby(["subject", "dataset", "editor", "preset"]).ngroups
    assert len(shown["rows"]) == groups == plain.count("\n") - 1
    key = {"editor": "A-GRACE", "preset": "clean", "dataset": "CNLE"}
    (row,) = [row for row in shown["rows"] if key.items() <= row.items()]
    of_editor = (records["editor"] == "a-grace") & (records["preset"] == "clean") & (records["dataset"] == "cnle")
    own = records[of_editor]
    expected = interval(own["generalization_em"].astype(float), binary=True)
    assert row["scores"]["generalization_em"] == pytest.approx(
        [expected.mean, expected.low, expected.high, expected.n], abs=1e-6
    )
    name, cases = contents(tmp_path / "site" / f"{row['cases']}.js")
    assert name == row["cases"] and len(cases) == row["n"]
    by_case = own.set_index("case_id")
    for case in cases:
        record = by_case.loc[case["id"]]
        assert case["texts"]["effectiveness"] == record["generated_effectiveness"]
        assert case["scores"]["fluency"] == pytest.approx(record["fluency"]) and case["start"] == record["start"]
    _, prompts = contents(tmp_path / "site" / "prompts" / "cnle.js")
    assert all(prompts[str(case["id"])]["sha256"] == case["sha256"] for case in cases)


def test_the_leaderboard_leaves_out_cases_that_were_held_out(tmp_path):
    results = tmp_path / "results"
    folder = Path("many", "smollm2-135m-code", "sequential-0")
    shutil.copytree(RESULTS / folder, results / folder)
    file = results / folder / "records" / "cnle.ft-l.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    published = Counter(row["held_out"] for row in rows)
    assert published[True] and published[False]
    edited = next(row for row in rows if row["position"] == 3 and not row["held_out"])
    edited["held_out"] = True
    counts = Counter(row["position"] for row in rows if not row["held_out"])
    assert counts[3] == 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {
        row["edits"]: row["n"]
        for row, _ in leaderboard.board(results)
        if (row["editor"], row["dataset"]) == ("FT-L", "CNLE")
    }
    assert shown == counts


def test_the_leaderboard_has_no_text_that_is_not_ours_to_publish(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS / "runs" / "smollm2-135m-compat", results / "runs" / "smollm2-135m-compat")
    leaderboard.write(results, tmp_path / "site")
    _, shown = contents(tmp_path / "site" / "board.js")
    of_csne = [row for row in shown["rows"] if row["dataset"] == "CSNE"]
    assert of_csne
    for row in of_csne:
        _, cases = contents(tmp_path / "site" / f"{row['cases']}.js")
        assert all(case["texts"] is None for case in cases)
    assert contents(tmp_path / "site" / "prompts" / "csne.js")[1] == {}
    leaderboard.write(results, tmp_path / "local", local=True)
    _, mined = contents(tmp_path / "local" / "prompts" / "csne.js")
    assert all(
        mined[str(case["id"])]["sha256"] == case["sha256"] and mined[str(case["id"])]["target"] for case in cases
    )
    assert not any(case["texts"] for case in contents(tmp_path / "local" / f"{row['cases']}.js")[1])
    numbers = [
        value for row in shown["rows"] for score in row["scores"].values() for value in score if value is not None
    ]
    assert not any(map(math.isnan, numbers))
