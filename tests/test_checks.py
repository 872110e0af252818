"""The checks of embedded CNLE: of each, the target passes and wrong snippets fail. And the metrics that run what was written."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from wrong_snippets import TARGETS, wrong_snippets

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.embedded_cnle import read_rows
from clme_lib.datasets.paper import CNLE
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.metrics.base import FREE_TEXTS, Evaluated, list_metrics, scores_of
from clme_lib.metrics.executes import EXECUTION_METRICS
from clme_lib.metrics.free import STUDY_METRICS
from clme_lib.support.sandbox import PASSES, Check, Sandbox, outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
CHECKS = {row["case_id"]: Check(row["setup"], row["test"]) for row in read_rows("cnle-checks")}
WRONG = 3
AWAITS = {642}  # A snippet that awaits needs a loop to run in, and sockets for that.


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def test_there_are_enough_checks():
    assert len(CHECKS) == len(read_rows("cnle-checks")) >= 300 and set(CHECKS) <= set(TARGETS)
    results = Path(__file__).parent.parent / "results" / "runs"
    published = {
        json.loads(line)["case_id"]
        for file in results.glob("*/records/cnle.*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    assert published and published | CNLE.selection == (published | CNLE.selection) & {*CHECKS, *AWAITS}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_targets_pass_and_wrong_snippets_fail(sandbox, part):
    problems = []
    for case_id in sorted(CHECKS)[part::8]:
        check, target = CHECKS[case_id], TARGETS[case_id]["snippet"]
        if (kind := sandbox.run(check, target)) != PASSES:
            problems.append(f"case {case_id}: its target is {kind}")
        failing = 0
        for snippet in wrong_snippets(case_id):
            fails = sandbox.run(check, snippet) != PASSES
            failing += fails
            if not snippet and not fails:
                problems.append(f"case {case_id}: nothing passes")
            if failing == WRONG:
                break
        if failing < WRONG:
            problems.append(f"case {case_id}: {failing} wrong snippets fail, {WRONG} have to")
    assert not problems, "\n".join(problems)


def test_a_case_carries_its_check_which_decides_no_text():
    by_id = {case.case_id: case for case in load_cases("cnle")}
    assert {case_id for case_id, case in by_id.items() if case.check} == set(CHECKS)
    case = next(case for case in by_id.values() if case.check)
    assert case.check == CHECKS[case.case_id]
    from dataclasses import replace

    assert replace(case, check=None).sha256 == case.sha256 and replace(case, check=None) == case


@pytest.mark.parametrize(
    "text, passes, kind",
    [
        (" xs.sort()", 1, None),
        (" xs.sort()\nxs.clear()", 1, None),  # What follows the first statement is not run.
        (" xs[:] = sorted(xs)", 1, None),
        (" sorted(xs)", 0, "wrong"),
        (" xs.sort(", 0, "syntax"),
        (" ys.sort()", 0, "name"),
        ("\nxs.sort()", 0, "wrong"),
    ],
)
def test_what_is_written_is_run(text, passes, kind):
    case = sample_cases(load_cases("cnle"), 1, 0)[0]
    from dataclasses import replace

    case = replace(case, check=Check("xs = [2, 1]", "assert xs == [1, 2]"))
    texts = {"effectiveness": [""], "generalization": [], FREE_TEXTS[0]: [text], FREE_TEXTS[1]: [text, " xs.sort()"]}
    scores = scores_of(Evaluated(case, texts, [], CNLE.code), EXECUTION_METRICS)
    assert scores["free_effectiveness_executes"] == passes
    assert scores["free_generalization_executes"] == (1 + passes) / 2
    failures = {name: value for name, value in scores.items() if name.startswith("fails_")}
    assert failures == {name: float(name == f"fails_{kind}") for name in failures}
    without = scores_of(Evaluated(replace(case, check=None), texts, [], CNLE.code), EXECUTION_METRICS)
    assert set(without.values()) == {None}


def test_a_dataset_in_a_file_may_have_checks(llama, tmp_path):
    content = {"name": "sums", "template": {"before": "Intent: ", "after": "\nCode:"}, "code": ["target"], "cases": [
        {"case_id": 0, "input": "add", "target": "a + 1", "check": {"setup": "a = 2", "test": "assert result == 3"}},
        {"case_id": 1, "input": "sub", "target": "a - 1"},
    ]}  # fmt: skip
    (tmp_path / "sums.json").write_text(json.dumps(content))
    cases = load_cases(str(tmp_path / "sums.json"))
    assert [case.check for case in cases] == [Check("a = 2", "assert result == 3"), None]
    edits = load_editor("none", llama).edit(cases)
    scores = evaluate(llama, cases, edits, metrics=EXECUTION_METRICS)["free_effectiveness_executes"]
    assert scores[0] == 0.0 and pd.isna(scores[1]), "a random model writes nothing that runs"


def test_running_code_has_to_be_asked_for():
    assert set(EXECUTION_METRICS) <= set(list_metrics()) and not set(EXECUTION_METRICS) & set(STUDY_METRICS)


def test_an_outcome_is_kept():
    check = Check("import time", "assert result > 0")
    assert outcome(check, "time.time()") == PASSES
    before = outcome.cache_info().hits
    assert outcome(check, "time.time()") == PASSES and outcome.cache_info().hits == before + 1
