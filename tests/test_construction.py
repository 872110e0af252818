"""CNLE and CSNE from their sources: stages that resume, an endpoint that misbehaves, hostile input, and what is written."""

import ast
import gzip
import http.server
import importlib.util
import json
import multiprocessing
import re
import threading
import time
import types
from bisect import bisect
from pathlib import Path

import pandas as pd
import pytest
import torch
from scorers import BY_WORDS
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from clme_lib import cli
from clme_lib.datasets.construction import (
    agreement,
    endpoint,
    language_models,
    pipeline,
    relevance,
    rephrasing,
    sources,
)
from clme_lib.datasets.construction.stages import Stages, Step, kept
from clme_lib.datasets.neighbours import nearest, tfidf
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.datasets.published import read
from clme_lib.datasets.registry import load_cases
from clme_lib.datasets.renaming import rename, same_bytecode
from clme_lib.evaluation.likelihood import mean_losses
from clme_lib.evaluation.loading import load_subject
from clme_lib.support.errors import StudyError
from clme_lib.support.journal import read_rows
from clme_lib.support.locks import only_writer

ROOT = Path(__file__).parent.parent
NAMES = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "zeta", "lambda_", "iota", "rho")


@pytest.fixture
def conala(tmp_path):
    """Twenty-four mined rows, and four that cannot be used."""
    rows = [
        {
            "intent": f"sort list `{name}` {way}",
            "snippet": f"{name}.sort(reverse={flag})",
            "rewritten_intent": f"put `{name}` {way}",
        }
        for name in NAMES
        for way, flag in (("upwards", False), ("downwards", True))
    ]
    rows += [
        {"intent": None, "snippet": "x"},
        {"intent": "  ", "snippet": "x"},
        {"intent": "x"},
        {"intent": "y", "snippet": "z" * 200_000},
    ]
    file = tmp_path / "conala.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Model(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: ``server.answers(question, count)`` gives text, or a status to fail with."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = asked["messages"][1]["content"]
        with self.server.lock:
            self.server.asked.append(question)
            count = len(self.server.asked)
        answer = self.server.answers(question, count)
        status = answer if isinstance(answer, int) else 200
        body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": str(answer)}, "finish_reason": "stop"}], "id": "1",
                "object": "chat.completion", "created": 0, "model": asked["model"],
                "usage": {"total_tokens": 10, "prompt_tokens": 9, "completion_tokens": 1}}  # fmt: skip
        content = json.dumps(body if status == 200 else {"error": {"message": "told to"}}).encode()
        content = answer if isinstance(answer, bytes) else content
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.send_header("Content-Type", "text/html" if content.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    running.asked, running.lock, running.answers = [], threading.Lock(), sensible
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def sensible(question, count):
    if question.startswith("Intent:"):
        return "3" if "theta" in question else "very relevant"
    return "Please " + question


def build(conala, folder, server, *extra):
    return cli.main(["data", "build", "cnle", "--source", str(conala), "--out", str(folder), "--targets", "8", "--model", "fake",
                     "--endpoint", server.url, *extra])  # fmt: skip


def test_cnle_is_built_by_a_model(conala, tmp_path, server, capsys):
    assert build(conala, tmp_path / "out", server) == 0
    shown = capsys.readouterr().out
    levels = pipeline.level_counts(tmp_path / "out").set_index("level")["pairs"].to_dict()
    assert levels["very relevant"] == 22 and levels["neutral"] == 2 and "very relevant" in shown
    cases = read(tmp_path / "out" / "EditConala.json", CNLE)
    assert len(cases) == 8 and len(server.asked) == 24 + 8
    split = kept(read_rows(tmp_path / "out" / "04-split.jsonl"))
    by_id = {row["id"]: row for row in read_rows(tmp_path / "out" / "01-collect.jsonl")}
    targeted = {by_id[row["id"]]["intent"] for row in split if row["targeted"]}
    assert {case.text for case in cases} == targeted
    for case in cases:
        assert case.rephrased[0] == f"Intent: Please {case.text}\nCode:"
        assert not {text.removeprefix("Intent: ").removesuffix("\nCode:") for text in case.unrelated} & targeted
        # the same name, the other way, is nearest unless it is targeted itself
        name = re.search("`(.*)`", case.text)[1]
        if sum(name in text for text in targeted) == 1 and name != "theta":
            assert f"`{name}`" in case.unrelated[0]
    counts = pipeline.stage_counts(tmp_path / "out").set_index(["stage", "what"])["count"].to_dict()
    assert counts["collect", "dropped: no intent"] == 2 and counts["collect", "dropped: no snippet"] == 1
    assert counts["collect", "dropped: too long"] == 1 and counts["select", "dropped: not very relevant"] == 2
    assert pipeline.built_cases(tmp_path / "out") == cases
    with pytest.raises(StudyError, match="no dataset; build it first: clme data build"):
        pipeline.built_cases(tmp_path)
    before = (tmp_path / "out" / "EditConala.json").read_bytes()
    assert build(conala, tmp_path / "out", server) == 0 and len(server.asked) == 32, "nothing is asked again"
    assert (tmp_path / "out" / "EditConala.json").read_bytes() == before


def test_an_endpoint_that_limits_fails_and_babbles(conala, tmp_path, server, capsys):
    seen = set()

    def moody(question, count):
        if question not in seen:
            seen.add(question)
            return 429 if count % 2 else 503
        return "I would rather not say" if "kappa" in question else sensible(question, count)

    server.answers = moody
    assert build(conala, tmp_path / "out", server) == 0
    counts = pipeline.stage_counts(tmp_path / "out").set_index(["stage", "what"])["count"].to_dict()
    assert counts["score", "dropped: unusable answer"] == 2
    capsys.readouterr()


def test_nothing_is_paid_twice(conala, tmp_path, server, capsys):
    assert build(conala, tmp_path / "out", server, "--budget", "60", "--concurrency", "2") == 1
    assert "the budget of 60 tokens is spent" in capsys.readouterr().err
    first = len(server.asked)
    assert 6 <= first <= 8 and not (tmp_path / "out" / "EditConala.json").exists()
    server.answers = lambda question, count: 400
    assert build(conala, tmp_path / "out", server) == 1
    assert "BadRequestError" in (error := capsys.readouterr().err) and "run the same command again" in error
    server.answers, server.asked = sensible, []
    assert build(conala, tmp_path / "out", server) == 0
    assert len(server.asked) == 24 + 8 - first
    assert not [line for line in read_rows(tmp_path / "out" / "answers.jsonl") if line["tokens"] != 10]


def test_answers_are_kept_as_they_come_and_given_in_order(tmp_path, server):
    server.answers = lambda question, count: time.sleep(0.5 if question == "q0" else 0) or f"to {question}"
    asking = endpoint.Endpoint("fake", server.url, tmp_path / "answers.jsonl", concurrency=3)
    questions = ["q0", "q1", "q2", "q3", "q4", "q1"]
    assert list(asking.ask("", questions)) == [f"to {question}" for question in questions]
    assert sorted(server.asked) == questions[:5], "the same question is asked once"
    assert [row["answer"] for row in read_rows(tmp_path / "answers.jsonl")][-1] == "to q0"


@pytest.mark.parametrize("reply", [b"<html>proxy</html>", b"{}", b'{"choices": []}', b"[1]", b"not json at all", b""])
def test_a_reply_that_is_none_is_no_answer(tmp_path, server, reply):
    server.answers = lambda question, count: reply if question == "q1" else "5"
    asking = endpoint.Endpoint("fake", server.url, tmp_path / "answers.jsonl", concurrency=1, retries=0)
    with pytest.raises(StudyError, match="the answers so far are kept"):
        list(asking.ask("", ["q0", "q1", "q2"]))
    assert [row["answer"] for row in read_rows(tmp_path / "answers.jsonl")] == ["5"], "what is no answer is asked again"
    nothing = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}'
    server.answers = lambda question, count: nothing if question == "q1" else "5"
    assert list(asking.ask("", ["q0", "q1", "q2"])) == ["5", "", "5"]


def reply(content, **usage):
    """A reply with this content and these token counts."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": content}}]
    return json.dumps({"choices": choices, "usage": usage}).encode()


@pytest.mark.parametrize("content", [["5"], {"level": 5}, 5, True, 0.5])
def test_an_answer_of_another_type_is_not_kept(tmp_path, server, content):
    server.answers = lambda question, count: reply(content, total_tokens=10)
    cache = tmp_path / "answers.jsonl"
    with pytest.raises(StudyError, match=f"the answer is {type(content).__name__}, expected text.*{cache}"):
        list(endpoint.Endpoint("fake", server.url, cache, retries=0).ask("", ["q"]))
    assert read_rows(cache) == [], "it would be given for ever"
    server.answers = sensible
    assert list(endpoint.Endpoint("fake", server.url, cache, retries=0).ask("", ["q"])) == ["Please q"]


@pytest.mark.parametrize("tokens", [-1000, 0, 10**30, "many", True, None, 2.5, [1]])
def test_impossible_token_counts_lift_no_budget(tmp_path, server, tokens):
    server.answers = lambda question, count: reply("5", total_tokens=tokens)
    asking = endpoint.Endpoint("fake", server.url, tmp_path / "answers.jsonl", budget=60, concurrency=1, retries=0)
    with pytest.raises(StudyError, match="the budget of 60 tokens is spent"):
        list(asking.ask("an instruction", [f"question {n}" for n in range(9)]))
    # 25 bytes are counted for each
    assert [row["tokens"] for row in read_rows(asking.cache)] == [25] * 3 and asking.spent == 75


def test_an_answer_that_is_no_line_of_text_drops_its_row(tmp_path, server):
    odd = {"alpha": "\ud800", "beta": "a\u2028b", "gamma": "a\x1b[2Jb"}
    row = {"id": 0, "intent": "sort them"}
    for name, text in odd.items():
        server.answers = lambda question, count, text=text: reply(text, total_tokens=5)
        asking = endpoint.Endpoint("fake", server.url, tmp_path / f"{name}.jsonl", retries=0)
        (made,) = rephrasing.model_intents(asking).make([row])
        assert made == {"id": 0, "dropped": "unusable answer"}
        assert read_rows(asking.cache)[0]["answer"].encode(), "the cache can be read"


def test_a_silent_endpoint_times_out(tmp_path, server, monkeypatch):
    server.answers = lambda question, count: time.sleep(0.5) or "5"
    asking = endpoint.Endpoint("fake", server.url, tmp_path / "answers.jsonl", retries=0, timeout=0.1)
    with pytest.raises(StudyError, match="APITimeoutError.*the answers so far are kept"):
        list(asking.ask("", ["q"]))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(StudyError, match="OPENAI_API_KEY is not set"):
        endpoint.Endpoint("gpt", None, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("5", "very relevant"),
        ("Level: 4.", "relevant"),
        ("relevant, not very relevant", "relevant"),
        ("It is not very relevant", None),
        ("**Irrelevant**", "irrelevant"),
        ("very relevant (5)", "very relevant"),
        ("between 3 and 4", None),
        ("0.5", None),
        ("15", None),
        ("", None),
    ],
)
def test_levels_are_read_from_answers(answer, level):
    assert relevance.parse_level(answer) == level


@pytest.fixture(scope="module")
def losses():
    """Those of the offline scorer's subject."""
    subject = load_subject(relevance.SCORER, "cpu")
    return lambda texts: mean_losses(subject, texts)


@pytest.mark.slow
def test_the_offline_scorer_prefers_true_pairs(losses):
    rows = [{"id": n, "intent": case.text, "snippet": case.target} for n, case in enumerate(load_cases("cnle")[::140])]
    shuffled = [{**row, "snippet": following["snippet"]} for row, following in zip(rows, rows[1:] + rows[:1])]
    scorer = relevance.offline_scorer(losses)
    true, false = (list(scorer.make(part)) for part in (rows, shuffled))
    assert [row["level"] for row in true] == [
        relevance.LEVELS[bisect(relevance.THRESHOLDS, row["help"])] for row in true
    ]
    assert sum(a["help"] > b["help"] for a, b in zip(true, false)) >= 0.9 * len(rows)
    long = {"id": 9, "intent": "x " * 1_000, "snippet": "x"}
    assert list(scorer.make([long])) == [{"id": 9, "dropped": "too long to be scored"}]


def test_an_intents_help_is_a_difference_of_losses():
    asked = []

    def losses(texts):
        asked.append(texts)
        return [float(len(prompt)) for prompt, _ in texts]

    pairs = [("sort `a`", " a.sort() "), ("reverse `a`", "a.reverse()")]
    helps = relevance.intents_help(pairs, losses)
    own, other = asked
    assert own == [("Intent: sort `a`\nCode:", "a.sort()"), ("Intent: reverse `a`\nCode:", "a.reverse()")]
    assert [text for _, text in other] == ["a.sort()", "a.reverse()"] and {p for p, _ in own}.isdisjoint(
        p for p, _ in other
    )
    assert helps == [len(after_other[0]) - len(after_own[0]) for after_own, after_other in zip(own, other)]
    assert relevance.intents_help(pairs[1:], losses) == helps[1:]


def test_the_thresholds_are_those_of_the_labels(benchmark_of_relevance, losses):
    """The labelled pairs give the thresholds and the published table, and the subject still gives the pairs what they got."""
    folder = ROOT / "results" / "benchmarks"
    pairs = pd.read_csv(folder / "relevance.pairs.csv")
    rows = [json.loads(line) for line in benchmark_of_relevance.PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 100 and {row["level"] for row in rows} == set(benchmark_of_relevance.LEVELS)
    assert [(row["id"], row["level"], row["second"]) for row in rows] == list(
        pairs[["id", "level", "second"]].itertuples(index=False, name=None)
    )
    fitted = benchmark_of_relevance.thresholds(pairs["help"].to_numpy(), pairs["level"].to_numpy())
    assert fitted == pytest.approx(relevance.THRESHOLDS, abs=0.006)
    pd.testing.assert_frame_equal(benchmark_of_relevance.agreement(pairs), pd.read_csv(folder / "relevance.csv"))
    helps = relevance.intents_help([(row["intent"], row["snippet"]) for row in rows[:3]], losses)
    assert helps == pytest.approx(pairs["help"][:3].tolist(), abs=0.02)


@pytest.fixture
def benchmark_of_relevance():
    spec = importlib.util.spec_from_file_location("relevance_benchmark", ROOT / "benchmarks" / "relevance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offline(source, folder):
    return pipeline.build_cnle(folder, str(source), BY_WORDS, rephrasing.GIVEN_INTENTS, targets=4, seed=1)


def slow_build(source, folder):
    """CNLE built offline by a scorer that takes its time."""

    def score(rows):
        for row in BY_WORDS.make(rows):
            time.sleep(0.15)
            yield row

    slow = Step(BY_WORDS.settings, score)
    pipeline.build_cnle(folder, str(source), slow, rephrasing.GIVEN_INTENTS, targets=4, seed=1)


@pytest.mark.slow
def test_a_killed_construction_goes_on(conala, tmp_path):
    (tmp_path / "killed").mkdir()
    process = multiprocessing.get_context("spawn").Process(target=slow_build, args=(conala, tmp_path / "killed"))
    process.start()
    file = tmp_path / "killed" / "02-score.jsonl"
    until = time.monotonic() + 120  # on a machine with other work the first import alone may take one minute
    while time.monotonic() < until and not (file.is_file() and file.stat().st_size):
        time.sleep(0.05)
    process.kill()
    process.join()
    made = len(read_rows(file))
    assert 0 < made < 24 and not json.loads(file.with_suffix(".json").read_text())["finished"]
    file.write_bytes(file.read_bytes() + b'{"id": 7, "lev')  # torn
    scored = []

    def score(rows):
        scored.extend(rows)
        return BY_WORDS.make(rows)

    counting = Step(BY_WORDS.settings, score)
    for folder in ("killed", "whole"):
        pipeline.build_cnle(tmp_path / folder, str(conala), counting, rephrasing.GIVEN_INTENTS, targets=4, seed=1)
    assert len(scored) == (24 - made) + 24
    for name in ("02-score.jsonl", "03-select.jsonl", "EditConala.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_subjects_answers_are_asked_once_and_written(conala, tmp_path):
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return [f"after {prompt}" for prompt in prompts]

    for _ in range(2):
        pipeline.build_cnle(
            tmp_path, str(conala), BY_WORDS, rephrasing.GIVEN_INTENTS, targets=4, seed=1, answers=("tiny", answer)
        )  # fmt: skip
    cases = read(tmp_path / "EditConala.json", CNLE)
    assert asked == [prompt for case in cases for prompt in case.unrelated]
    for case, record in zip(cases, json.loads((tmp_path / "EditConala.json").read_text())):
        assert record["neighborhoods"]["answers"] == {"tiny": [f"after {prompt}" for prompt in case.unrelated]}


def test_changed_settings_and_inputs_are_refused(conala, tmp_path):
    def make(seed):
        return pipeline.build_cnle(
            tmp_path / "out", str(conala), BY_WORDS, rephrasing.GIVEN_INTENTS, targets=4, seed=seed
        )

    make(1)
    with pytest.raises(
        StudyError,
        match=r"04-split.jsonl: made with different settings \(seed 1, now 2\); remove 04-split.\* and the later stages",
    ):
        make(2)
    for file in (tmp_path / "out").glob("0[4-9]*"):
        file.unlink()
    assert make(2).passed
    conala.write_text(conala.read_text() + json.dumps({"intent": "new one", "snippet": "new()"}) + "\n")
    with pytest.raises(StudyError, match="01-collect.jsonl: made with different settings"):
        make(2)
    with pytest.raises(
        StudyError, match="02-score.jsonl: was changed after it was made; restore it, or remove 02-score"
    ):
        file = tmp_path / "out" / "02-score.jsonl"
        conala.write_text("".join(conala.read_text().splitlines(keepends=True)[:-1]))
        file.write_text(file.read_text().replace("very relevant", "irrelevant", 1))
        make(2)


VOCABULARIES = (("items", "limit", "result", "item"), ("rows", "bound", "found", "row"))
FUNCTIONS = [
    f'''def {verb}_{name}({many}, {most}):
    """{verb.capitalize()} the {name} of all of them.

    More about it.
    """
    {made} = []  # collected
    for {single} in {many}:
        if {single}.{name} < {most}:
            {made}.append({single}.{verb}())
    return {made}'''
    for k, name in enumerate(NAMES)
    for n, verb in enumerate(("sum", "keep", "drop"))
    for many, most, made, single in [VOCABULARIES[(k + n) % 2]]
]


@pytest.fixture
def code_search_net(tmp_path):
    folder = tmp_path / "csn"
    folder.mkdir()
    for part, functions in (("train", FUNCTIONS[:20]), ("valid", FUNCTIONS[20:28]), ("test", FUNCTIONS[28:])):
        with gzip.open(folder / f"python_{part}_0.jsonl.gz", "wt") as stream:
            for code in functions:
                row = {
                    "code": code,
                    "docstring": ast.get_docstring(ast.parse(code).body[0]),
                    "partition": part,
                    "repo": "a/b",
                }
                stream.write(json.dumps(row) + "\n")
    return folder


def test_csne_is_built_offline(code_search_net, tmp_path, capsys):
    assert cli.main(["data", "build", "csne", "--source", str(code_search_net), "--out", str(tmp_path / "out")]) == 0
    assert "EditCodeSearchNet.json: 8 records" in capsys.readouterr().out
    cases = read(tmp_path / "out" / "EditCodeSearchNet.json", CSNE)
    bare = {
        sources.bare_function(code): ast.get_docstring(ast.parse(code).body[0]).split("\n")[0] for code in FUNCTIONS
    }
    tested = list(bare)[28:]
    assert {case.text for case in cases} == set(tested)
    for case in cases:
        assert '"""' not in case.text and "#" not in case.text and case.target == bare[case.text]
        assert not {text.removeprefix("Code: ").removesuffix("\nDescription:") for text in case.unrelated} & set(tested)
        variant = case.rephrased[0].removeprefix("Code: ").removesuffix("\nDescription:")
        assert variant != case.text
        results = []
        for code in (case.text, variant):  # both do the same
            space: dict = {}
            exec(code, space)
            function = next(value for value in space.values() if isinstance(value, types.FunctionType))
            things = [
                types.SimpleNamespace(
                    **dict.fromkeys(NAMES, n), sum=lambda n=n: n, keep=lambda n=n: -n, drop=lambda n=n: n * n
                )
                for n in range(5)
            ]
            results.append(function(things, 3))
        assert results[0] == results[1] and len(results[0]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"intent": "x"\n', "line 1: cannot be read as UTF-8 JSON"),
        ("a.jsonl", b'{"intent": "caf\xe9", "snippet": "x"}\n', "not UTF-8 after line 0"),
        ("a.jsonl.gz", gzip.compress(b'{"intent": "x", "snippet": "y"}\n' * 5000)[:-40], "is the download complete"),
        ("a.jsonl.gz", b"no gzip", "is the download complete"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.json", b"[1]", "row 0: expected an object, found int"),
        ("a.txt", b"", "is not hub, embedded, a JSON"),
    ],
)
def test_damaged_sources_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=message) as caught:
        list(sources.collect_pairs(str(tmp_path / name)))
    assert name in str(caught.value)


def test_odd_rows_are_dropped_with_a_reason(tmp_path):
    rows = [
        {"code": "def f(a):\r\n    return a\r\n", "docstring": "Give it back again."},
        {"code": "def f(a):\n    return a", "docstring": None},
        {"code": None, "docstring": "Give it back again."},
        {"code": "def f(a):\n    print a", "docstring": "Print a thing once."},
        {"code": "x = 1", "docstring": "No function at all."},
        {"code": "def f(a):\n    return a\n\ndef g(b):\n    return b", "docstring": "Two functions at once."},
        {"code": "def f(a):\n" + "    a += 1\n" * 500_000, "docstring": "Five million characters of code."},
        {"code": "def f(a):\n    return a", "docstring": "Short."},
        # as CodeSearchNet has methods: the first line's indentation is gone
        {
            "code": 'def f(self, a):\n        """Doc string."""\n        # why\n        if a:\n            return a',
            "docstring": "Take the first one.",
        },
        {"code": '@wraps\ndef f(a):\n    """Doc string."""\n    return "#", a', "docstring": "Keep the hash sign."},
        {
            "func_code_string": "def f(a):\n    return a",
            "func_documentation_string": "The hub has other names.",
            "split_name": "test",
        },
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    started = time.monotonic()
    made = list(sources.collect_functions(str(file)))
    assert time.monotonic() - started < 5
    assert [row.get("dropped") for row in made] == [
        None, "no docstring", "no code", "not one Python 3 function", "not one Python 3 function", "not one Python 3 function", "too long",
        "no describing sentence", None, None, None,
    ]  # fmt: skip
    assert made[0]["code"] == "def f(a):\n    return a" and made[10]["partition"] == "test"
    assert made[8]["code"] == "def f(self, a):\n    if a:\n        return a"
    assert made[9]["code"] == 'def f(a):\n    return "#", a'


def test_parquet_is_read(tmp_path):
    pd.DataFrame({"intent": ["a b"], "snippet": ["c()"]}).to_parquet(tmp_path / "mined.parquet")
    (row,) = sources.collect_pairs(str(tmp_path))
    assert row == {"id": 0, "intent": "a b", "snippet": "c()", "rewritten_intent": ""}


def test_a_function_without_variant_says_why():
    def why(code, mapping):
        return rephrasing.renamed({"id": 1, "code": code}, lambda name, taken: mapping.get(name)).get("dropped")

    assert why("def f(self):\n    return self.x()", {}) == "no name to change"
    assert why("def f(value):\n    return value", {}) == "no substitute for its names"
    assert why("def f(value):\n    return 'é'", {"value": "other"}) == "not ASCII"
    assert why("def f(value, other):\n    return value - other", {"value": "other"}) == "variant not verified"
    assert why("def f(value):\n    return value", {"value": "other"}) is None


def test_bytecode_is_compared_up_to_names():
    code = "def f(data, other: int):\n    return [data[other.index(n)] for n in data]"
    for mapping in ({"data": "value"}, {"data": "zzz", "other": "aaa"}):
        variant = code.replace("data", mapping["data"]).replace("other", mapping.get("other", "other"))
        assert same_bytecode(code, variant, mapping)
        assert not same_bytecode(code, variant.replace("index", "count"), mapping)
    assert not same_bytecode("def f(a, b):\n    return a - b", "def f(x, y):\n    return y - x", {"a": "x", "b": "y"})
    assert same_bytecode("def f(a):\n    return 'a'", "def f(b):\n    return 'a'", {"a": "b"})
    assert not same_bytecode("def f(a):\n    return 'a'", "def f(b):\n    return 'b'", {"a": "b"})


def test_neighbours_do_not_depend_on_how_many_are_asked_for_or_held(monkeypatch):
    cases = load_cases("cnle")
    texts = [case.text for case in cases[:60]], [case.text for case in cases[60:]]
    allowed = lambda target, entry: (target + entry) % 3 > 0  # noqa: E731
    groups = [n % 7 for n in range(60)], [n % 7 for n in range(len(cases) - 60)]
    options = {"allowed": allowed, "groups": groups}
    expected = nearest(*texts, **options)
    vectors = tfidf([*texts[0], *texts[1]])
    similarity = (vectors[:60] @ vectors[60:].T).toarray().round(9)
    for target, entries in enumerate(nearest(*texts, allowed=allowed)):
        order = sorted(range(similarity.shape[1]), key=lambda n: (-similarity[target, n], n))
        assert entries == [n for n in order if allowed(target, n) and similarity[target, n] <= 0.97][:5]
    # equal texts tie: the earlier comes first, also when the index is asked for fewer than tie
    tied = [*texts[1][:9], *[texts[1][9]] * 9]
    firsts = nearest([texts[1][9]], tied, allowed=lambda target, entry: True, ceiling=1.0)
    for asked, held in ((7, 1), (3, 2**24)):
        monkeypatch.setattr("clme_lib.datasets.neighbours._FIRST_ASKED", asked)
        monkeypatch.setattr("clme_lib.datasets.neighbours._HELD", held)
        assert nearest(*texts, **options) == expected
        assert (
            nearest([texts[1][9]], tied, allowed=lambda target, entry: True, ceiling=1.0) == firsts == [[*range(9, 14)]]
        )
    # only the last of the pool is allowed: the search goes on until it has looked at all
    assert nearest(texts[0][:2], texts[1], allowed=lambda target, entry: entry > len(texts[1]) - 3) == [
        sorted(entries, key=lambda n: (-similarity[t, n], n))
        for t, entries in enumerate([[len(texts[1]) - 2, len(texts[1]) - 1]] * 2)
    ]


@pytest.fixture
def tiny_bert(tmp_path):
    """A random BERT, its tokenizer, and a card that says CLS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(FUNCTIONS)))),
        *"xyzw",
        "rows",
        "total",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip
    config = BertConfig(
        vocab_size=len(fast), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    for name, kind in (("encoder", BertModel), ("masked", BertForMaskedLM)):
        kind(config).save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return tmp_path


def test_an_encoder_pools_as_its_card_says(tiny_bert):
    encoder = language_models.TextEncoder(str(tiny_bert / "encoder"))
    texts = ["sum the items", "drop", "keep all of the items here"]
    vectors = encoder(texts)
    assert encoder.pooling == "cls" and encoder.settings["pooling"] == "cls"
    for text, vector in zip(texts, vectors):
        with torch.no_grad():
            hidden = encoder.model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert torch.tensor(vector) == pytest.approx((hidden[0] / hidden[0].norm()).numpy(), abs=1e-5)
    assert language_models.card_pooling(str(tiny_bert / "masked")) == "mean"
    with pytest.raises(StudyError, match="could not be loaded as an encoder"):
        language_models.TextEncoder(str(tiny_bert))


def test_an_encoder_that_cannot_encode_is_refused(tiny_bert):
    def spoilt(name, change):
        file = tiny_bert / "encoder" / name
        before = file.read_bytes()
        content = json.loads(before) if name.endswith("json") else None
        file.write_bytes(change(before) if content is None else json.dumps(change(content)).encode())
        try:
            with pytest.raises(StudyError) as raised:
                language_models.TextEncoder(str(tiny_bert / "encoder"))
        finally:
            file.write_bytes(before)
        return str(raised.value)

    assert "could not be loaded" in spoilt("model.safetensors", lambda content: b"version https://git-lfs")
    assert "could not be loaded" in spoilt("config.json", lambda content: [])
    assert "no pad token" in spoilt("tokenizer_config.json", lambda content: {**content, "pad_token": None})
    assert "expected an object" in spoilt("1_Pooling/config.json", lambda content: [])
    encoder = language_models.TextEncoder(str(tiny_bert / "encoder"))
    encoder.tokenizer.add_tokens(["more", "than", "it", "embeds"])
    encoder.tokenizer.save_pretrained(tiny_bert / "encoder")
    with pytest.raises(StudyError, match="use a tokenizer and a model that belong together"):
        language_models.TextEncoder(str(tiny_bert / "encoder"))


def test_fine_tuning_brings_descriptions_to_their_functions(tiny_bert, code_search_net, tmp_path, capsys):
    assert cli.main(["data", "build", "csne", "--source", str(code_search_net), "--out", str(tmp_path / "out")]) == 0
    arguments = ["data", "fine-tune", str(tmp_path / "out"), "--encoder", str(tiny_bert / "encoder"), "--out", str(tmp_path / "tuned"),
                 "--epochs", "12", "--lr", "3e-3", "--batch", "14"]  # fmt: skip
    assert cli.main(arguments) == 0
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())
    assert last < 0.8 * first
    tuned = language_models.TextEncoder(str(tmp_path / "tuned"))
    assert tuned.pooling == "cls" and not list((tmp_path / "tuned").glob("*.bin"))


def test_a_masked_model_renames(tiny_bert):
    names = language_models.MaskedNames(str(tiny_bert / "masked"))
    rows = [{"id": n, "code": sources.bare_function(code)} for n, code in enumerate(FUNCTIONS[:3])]
    for row, made in zip(rows, names.step.make(rows)):
        assert made["id"] == row["id"] and set(made["names"]) <= {*VOCABULARIES[0], *VOCABULARIES[1]} and made["names"]
        taken = set(re.findall(r"\w+", row["code"]))
        assert not set(made["names"].values()) & taken
    assert rename("def f(a):\n    b = a\n    return a + f.a", {"a": "M"}) == "def f(M):\n    b = M\n    return M + f.a"


def test_labels_are_drawn_and_compared(conala, tmp_path, capsys):
    pipeline.build_cnle(tmp_path / "out", str(conala), BY_WORDS, rephrasing.GIVEN_INTENTS, targets=4, seed=1)
    arguments = ["data", "labels", str(tmp_path / "out"), str(tmp_path / "labels.csv"), "--margin", "0.1"]
    assert cli.main(arguments) == 0
    table = pd.read_csv(tmp_path / "labels.csv")
    assert len(table) == agreement.sample_size(24, 0.1) == 20 and "level" not in table.columns
    assert cli.main(arguments) == 1 and "row 2, labeller 1: '' is not a level" in capsys.readouterr().err
    levels = {row["id"]: row["level"] for row in read_rows(tmp_path / "out" / "02-score.jsonl")}
    table["labeller 1"] = [levels[pair] for pair in table["id"]]
    table["labeller 2"] = [5 - n % 2 for n in range(20)]
    table.to_csv(tmp_path / "labels.csv", index=False)
    assert cli.main(arguments) == 0
    kappas = agreement.agreement(tmp_path / "labels.csv", {str(pair): level for pair, level in levels.items()})
    assert list(zip(kappas["first"], kappas["second"])) == [
        ("labeller 1", "labeller 2"),
        ("labeller 1", "scorer"),
        ("labeller 2", "scorer"),
    ]
    assert kappas["agree"][1] == 1 and kappas["agree"][2] == kappas["agree"][0] < 1
    assert agreement.sample_size(594_000, 0.05) == 384
    with pytest.raises(StudyError, match="already exists and may have been filled in"):
        agreement.draw([], tmp_path / "labels.csv", 0.1, 0)
    formulas = [{"id": 0, "intent": "=1+1", "snippet": "@cached\n-x"}, {"id": 1, "intent": "a = 1", "snippet": "x"}]
    agreement.draw(formulas, tmp_path / "formulas.csv", 0.1, 0)
    drawn = pd.read_csv(tmp_path / "formulas.csv").sort_values("id")
    assert list(drawn["intent"]) == ["'=1+1", "a = 1"] and list(drawn["snippet"]) == ["'@cached\n-x", "x"]


def test_what_has_not_been_built_is_named(tmp_path, capsys):
    for arguments in (
        ["labels", str(tmp_path), str(tmp_path / "labels.csv")],
        ["fine-tune", str(tmp_path), "--out", str(tmp_path / "tuned")],
    ):
        assert cli.main(["data", *arguments]) == 1
        assert "build the dataset first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_too_many_targets_are_answered_with_a_number(conala, tmp_path, capsys):
    arguments = ["data", "build", "cnle", "--source", str(conala), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--targets", "100"]) == 1
    error = capsys.readouterr().err
    assert (
        "100 of the rows were requested as targets; of the 24 that are left, 24 can be targeted, which leaves 0"
        in error
    )
    assert "collect: 28 rows, 2 dropped: no intent, 1 dropped: no snippet" in error and "select: 24 rows" in error
    assert cli.main([*arguments, "--targets", re.search("give --targets ([0-9]+) or fewer", error)[1]]) == 0
    assert len(pipeline.built_cases(tmp_path / "out")) == 19
    capsys.readouterr()
    conala.write_text("".join(json.dumps({"intent": f"do {n}", "snippet": f"do({n})"}) + "\n" for n in range(9)))
    assert cli.main([*arguments[:-1], str(tmp_path / "other")]) == 1
    assert "use a larger source, or name a --model: no row has a second wording" in capsys.readouterr().err


def test_two_builds_of_one_folder_do_not_mix(conala, tmp_path, capsys):
    with only_writer(tmp_path / "out"):
        assert cli.main(["data", "build", "cnle", "--source", str(conala), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path}/out: process " in (error := capsys.readouterr().err) and "writing to this folder" in error


def test_a_source_that_is_mended_is_read_again(conala, tmp_path):
    whole = conala.read_text()
    conala.write_text(whole + "{\n")
    with pytest.raises(StudyError, match="line 29"):
        offline(conala, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    conala.write_text(whole)
    offline(conala, tmp_path / "out")


@pytest.mark.parametrize(
    "line", ["3", "{}", '{"id": "a"}', '{"id": [1]}', '{"id": 1, "level": 5}', '{"id": 0, "level": "x"}']
)
def test_rows_of_an_unfinished_stage_that_are_not_its_own_are_refused(conala, tmp_path, line):
    offline(conala, tmp_path)
    for file in tmp_path.glob("0[3-9]*"):
        file.unlink()
    manifest = json.loads((tmp_path / "02-score.json").read_text())
    (tmp_path / "02-score.json").write_text(json.dumps({**manifest, "finished": False}))
    rows = (tmp_path / "02-score.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "02-score.jsonl").write_text(rows[0] + line + "\n")
    with pytest.raises(StudyError, match="02-score.jsonl, line 2: "):
        offline(conala, tmp_path)
    (tmp_path / "02-score.jsonl").write_text(rows[0])
    offline(conala, tmp_path)


def test_texts_without_latin_words_have_neighbours():
    chinese = ["排序 列表", "排序 字典", "打开 文件", "?!"]
    assert nearest(chinese[:1], chinese[1:], allowed=lambda target, entry: True) == [[0, 1, 2]]
    assert nearest(["?"], ["!", "."], allowed=lambda target, entry: True) == [[0, 1]]


def test_odd_fields_of_functions_are_left_out(tmp_path):
    file = tmp_path / "rows.json"
    row = {
        "code": "def f(a):\r    return a",
        "docstring": "Give it back again.",
        "partition": ["test"],
        "repo": {"a": 1},
    }
    file.write_text(json.dumps([row]))
    (made,) = sources.collect_functions(str(file))
    assert made == {
        "id": 0,
        "code": "def f(a):\n    return a",
        "doc": "Give it back again.",
        "partition": None,
        "package": "",
    }


def test_stages_say_what_is_wrong_with_their_files(tmp_path):
    step = Step({}, lambda _: [{"id": 1}])
    Stages(tmp_path).run("a", step, [])
    (tmp_path / "01-a.json").write_text("{")
    with pytest.raises(StudyError, match="01-a.json: cannot be read as UTF-8 JSON.*remove it and 01-a.jsonl"):
        Stages(tmp_path).run("a", step, [])
    (tmp_path / "01-a.json").unlink()
    with pytest.raises(StudyError, match="has no 01-a.json next to it"):
        Stages(tmp_path).run("a", step, [])


def test_a_stage_whose_rows_depend_on_each_other_is_made_from_all_of_them(tmp_path):
    def number(rows):
        for n, row in enumerate(rows):
            yield {"id": row["id"], "place": n}
            if n == 2 and stop:
                raise KeyboardInterrupt

    todo = [{"id": letter} for letter in "abcdef"]
    for one_by_one, places in ((False, [0, 1, 2, 3, 4, 5]), (True, [0, 1, 2, 0, 1, 2])):
        folder, step = tmp_path / str(one_by_one), Step({}, number, one_by_one)
        stop = True
        with pytest.raises(KeyboardInterrupt):
            Stages(folder).run("a", step, todo)
        stop = False
        assert [row["place"] for row in Stages(folder).run("a", step, todo)] == places
