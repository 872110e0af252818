"""The validation report finds every kind of damage, and nothing in the embedded sets."""

import copy
import json

import pytest
import torch
from conftest import make_subject

from clme_lib import cli
from clme_lib.datasets import published
from clme_lib.datasets.construction.checking import check_cases, check_file
from clme_lib.datasets.registry import load_cases
from clme_lib.datasets.renaming import same_up_to_names
from clme_lib.evaluation.generation import Request, generate
from clme_lib.forward.tokens import token_budget, tokenize
from clme_lib.metrics.text import exact_match, rouge_l
from clme_lib.support.errors import StudyError


@pytest.fixture
def records():
    """Four sound CNLE records."""
    return [
        {
            "case_id": n,
            "edit_request": {
                "intent": f"sort list `{name}` in place",
                "snippet": f"{name}.sort(reverse=True)",
                "rewritten_intent": f"put `{name}` in order",
            },
            "neighborhoods": {"items": [{"intent": f"open file `{name}` number {k}"} for k in range(5)], "answers": {}},
        }
        for n, name in enumerate(("alpha", "beta", "gamma", "delta"))
    ]


def report_of(records, tmp_path, name="EditConala.json"):
    (tmp_path / name).write_text(json.dumps(records))
    return check_file(tmp_path / name)


def test_sound_records_pass(records, tmp_path, capsys):
    report = report_of(records, tmp_path)
    assert report.passed and not report.findings and report.cases == 4
    number = {row.text: (row.number, row.median) for row in report.lengths}
    assert number["edit inputs"] == (4, 7) and number["neighbours"][0] == 20 and number["targets"] == (4, 8)
    assert cli.main(["data", "check", str(tmp_path / "EditConala.json")]) == 0
    assert "4 readable cases of cnle" in capsys.readouterr().out


def damage(name):
    def change(records):
        record, next_record = records[1], records[2]
        request, items = record["edit_request"], record["neighborhoods"]["items"]
        match name:
            case "twice":
                record["case_id"] = next_record["case_id"]
            case "same input":
                request["intent"] = next_record["edit_request"]["intent"]
            case "not rephrased":
                request["rewritten_intent"] = request["intent"]
            case "own neighbour":
                items[3]["intent"] = request["rewritten_intent"]
            case "targeted neighbour":
                items[3]["intent"] = next_record["edit_request"]["intent"]
            case "repeated neighbour":
                items[3] = items[4]
            case "close neighbour":
                items[3]["intent"] = "Sort list `beta` in place!"
            case "short":
                request["snippet"] = "foo()"
            case "no letters":
                request["snippet"] = "[] + [] + {}"
            case "end of text":
                request["snippet"] = "ids = encode(text + '</s>')"
            case "white space":
                request["snippet"] += "\n"
            case "not Python":
                request["snippet"] = "print 'a', b, c"
            case "missing field":
                del request["snippet"]
            case "four neighbours":
                items.pop()
            case "some answers":
                record["neighborhoods"]["answers"] = {"CodeLlama-7b-hf": ["a"] * 5}
            case "null":
                request["intent"] = None
            case "few neighbours":
                for n in range(4):  # five records, five different neighbours
                    same = {
                        "intent": f"read `{n}` once",
                        "snippet": f"read({n}, [0, 1])",
                        "rewritten_intent": f"`{n}`, read",
                    }
                    records.append({"case_id": 10 + n, "edit_request": same, "neighborhoods": {"items": items}})
                del records[2:4], records[0]

    return change


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("twice", "error", "case_id occurs twice"),
        ("same input", "error", "edit input occurs in several cases"),
        ("not rephrased", "error", "rephrased input repeats the edit input"),
        ("own neighbour", "error", "the case's own edit or rephrased input"),
        ("targeted neighbour", "error", "a neighbour is another case's edit input"),
        ("repeated neighbour", "error", "a neighbour occurs twice"),
        ("close neighbour", "warning", "closer than 0.97"),
        ("short", "warning", "too short for BLEU"),
        ("no letters", "warning", "no Latin letter or digit"),
        ("end of text", "warning", "an end-of-text string (<|im_end|>, <|endoftext|>, </s>)"),
        ("white space", "warning", "begins or ends with white space"),
        ("not Python", "warning", "snippet is not Python 3"),
        ("missing field", "error", "field 'snippet' is missing"),
        ("four neighbours", "error", "items has 4 entries, expected 5"),
        ("null", "error", "field 'intent' is NoneType, expected str"),
        ("some answers", "warning", "answers of CodeLlama-7b-hf are missing"),
        ("few neighbours", "warning", "few different neighbours: 1 (5 for 5 cases)"),
    ],
)
def test_damage_is_found(records, tmp_path, capsys, kind, level, message):
    damage(kind)(records)
    report = report_of(records, tmp_path)
    findings = [finding for finding in report.findings if message in str(finding)]
    assert [finding.level for finding in findings] == [level]
    assert report.passed == (level == "warning")
    if kind not in ("missing field", "four neighbours", "null", "some answers", "few neighbours"):
        assert findings[0].cases[0] in (1, 2)
    assert cli.main(["data", "check", str(tmp_path / "EditConala.json")]) == (level == "error")
    assert message in capsys.readouterr().out


def test_a_target_with_the_end_of_text_is_written_up_to_it(monkeypatch):
    subject = make_subject("llama")
    end = subject.tokenizer.eos_token
    prompt, target = "Intent: stop\nCode:", f"ids = [x for x in y if x != {end} and x]"
    ids = list(tokenize(subject.tokenizer, prompt, target).target_ids)
    assert subject.tokenizer.eos_token_id in ids[:-1], "the target is learnt with the token that ends a text"
    steps = iter(ids)
    # a model that knows the target by heart
    monkeypatch.setattr(
        subject.model.lm_head, "forward", lambda hidden: torch.eye(len(subject.tokenizer))[[next(steps)] * len(hidden)]
    )
    (made,) = generate(subject, [Request(prompt, token_budget(subject.tokenizer, prompt, target, "clean"))])
    assert made.text.strip() == target[: target.index(end) + len(end)]
    assert exact_match([made.text.strip()], [target]) == 0 < rouge_l([made.text], [target])


def test_a_model_name_cannot_command_a_terminal(records, tmp_path):
    records[0]["neighborhoods"]["answers"] = {"\x1b[2Jmodel": ["a"] * 5}
    assert "\\x1b[2Jmodel" in (shown := str(report_of(records, tmp_path))) and "\x1b" not in shown


def test_the_embedded_sets_have_no_errors(monkeypatch):
    for dataset in ("cnle", "csne"):
        findings = check_cases(load_cases(dataset))
        assert not [finding for finding in findings if finding.level == "error"], findings
        assert not [finding for finding in findings if "up to names" in finding.problem]


def test_a_wrong_renaming_is_found(tmp_path):
    cases = load_cases("csne")[:2]
    file = tmp_path / "EditCodeSearchNet.json"
    published.write(file, cases)
    records = json.loads(file.read_text())
    assert check_file(file).findings == ()
    broken = copy.deepcopy(records)
    broken[0]["edit_request"]["code_rewrite"] += "\n    pass"
    file.write_text(json.dumps(broken))
    (finding,) = check_file(file).findings
    assert finding.cases == (records[0]["case_id"],) and "up to names" in finding.problem


def test_names_are_compared_one_to_one():
    assert same_up_to_names("def f(a, b):\n    return a + b", "def g(x, y):\n    return x + y")
    assert not same_up_to_names("def f(a, b):\n    return a + b", "def f(x, y):\n    return x + x")
    assert not same_up_to_names("a.b", "a.c") and not same_up_to_names("a", "a b")


def test_unreadable_files_are_refused(tmp_path):
    for name, text, message in (
        ("EditConala.json", '[{"case', "cannot be read as UTF-8 JSON"),
        ("EditConala.json", "{}", "expected a JSON list"),
        ("mine.json", "[{}]", "name the dataset with --dataset"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(StudyError, match=message):
            check_file(tmp_path / name)
