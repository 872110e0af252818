"""Bad input gets an answer: the inputs stand in tests/inputs/*.yaml, one test reads them all.

A file of inputs holds groups::

    - run: "run --subject {world}/subject.yaml --source {here}/cnle.json"   # a command line, or
      call: clme.load_editor("grace", subject, values="x")                   # an expression of Python
      from: cnle.json                                                        # the valid file that an input spoils
      status: 1                                                              # 1: a mistake in a file; 2: in the command
      inputs:
      - {set: {0.case_id: abc}, says: case_id}                               # JSON of the file with a value changed,
      - {drop: [0.case_id], says: case_id}                                   # with a field removed,
      - {text: "[1,", says: JSON}                                            # a text in the file's place,
      - {python: "b'\\xff'", says: UTF-8}                                    # or the value of an expression (text or bytes)
      - {given: "-1", says: cases}                                           # what replaces {given} in run or call

``{world}`` is a folder where everything is valid, ``{here}`` holds the spoilt copy. Every answer has to be one message without a
traceback, of the expected status, that matches ``says`` and, where a file was spoilt, names it; and nothing may be left behind.
"""

import copy
import json
import re
import shlex
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import make_subject
from safetensors.torch import load, save
from scorers import BY_WORDS

import clme_lib as clme
from clme_lib import cli
from clme_lib.datasets import published
from clme_lib.datasets.cases import Case
from clme_lib.datasets.construction import relevance
from clme_lib.datasets.construction.endpoint import Endpoint
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.support.errors import StudyError

FOLDER = Path(__file__).parent / "inputs"
FUNCTION = "def {0}_{1}({0}):\n    result = [{0} for item in {0}]\n    return result"


def _groups() -> list[dict]:
    groups = []
    for file in sorted(FOLDER.glob("*.yaml")):
        for number, group in enumerate(yaml.safe_load(file.read_text(encoding="utf-8"))):
            groups.append({"status": 1, **group, "name": f"{file.stem}-{number}"})
    return groups


INPUTS = [
    pytest.param(group, spoilt, id=f"{group['name']}-{number}")
    for group in _groups()
    for number, spoilt in enumerate(group["inputs"])
]


@pytest.fixture(scope="module")
def _relevance_by_words():
    """No model is loaded to score pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relevance, "offline_scorer", lambda losses: BY_WORDS)
        yield


@pytest.fixture(scope="module")
def world(_relevance_by_words, tmp_path_factory) -> Path:
    """A model, its YAML, a dataset of each layout, a finished run, edits, a built dataset: all valid."""
    folder = tmp_path_factory.mktemp("world")
    tiny = make_subject("llama")
    tiny.model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    settings = {
        "subject": {"source": "hub", "id": str(folder / "model")},
        "editors": {"grace": {"layer": 2, "steps": 2}},
    }
    (folder / "subject.yaml").write_text(yaml.safe_dump(settings))
    cases = [{"case_id": n, "input": f"season {n}", "target": f"summer {n}", "rephrased": [f"time {n}"],
              "unrelated": [f"month {n} {k}" for k in range(5)]} for n in range(2)]  # fmt: skip
    seasons = {"name": "seasons", "template": {"before": "Say: ", "after": "\nAnswer:"}, "cases": cases}
    (folder / "seasons.json").write_text(json.dumps(seasons))
    texts = {CNLE: lambda n, k: f"task {n} {k}", CSNE: lambda n, k: FUNCTION.format(f"x{n}", f"y{k}")}
    for dataset, text in texts.items():
        made = [
            Case(n, dataset.name, dataset.prompt(text(n, 0)), "call(x)", (dataset.prompt(text(n, 1)),),
                 tuple(dataset.prompt(text(n, k)) for k in range(2, 7)))
            for n in range(3)
        ]  # fmt: skip
        published.write(folder / f"{dataset.name}.json", made)
    sources = {
        "conala.jsonl": [{"intent": f"sort list {n}", "snippet": f"list{n}.sort({n})", "rewritten_intent": f"order {n}"}
                         for n in range(24)],
        "functions.jsonl": [{"code": FUNCTION.format(f"x{n}", "y"), "docstring": f"Give item {n} back again."} for n in range(9)],
        "answers.jsonl": [{"key": "a", "answer": "5", "tokens": 3}],
    }  # fmt: skip
    for name, rows in sources.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "build", CNLE.name, "--source", f"{folder}/conala.jsonl", "--out", f"{folder}/built"]) == 0
    assert cli.main(["data", "labels", f"{folder}/built", f"{folder}/labels.csv"]) == 0
    labels = (folder / "labels.csv").read_text(encoding="utf-8").replace(",,", ",5,5")
    (folder / "labels.csv").write_text(labels, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment(world):
    """The cache of this module's runs, and the finished run that some inputs spoil."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLME_CACHE", str(world / "cache"))
        options = ["--subject", f"{world}/subject.yaml", "--dataset", f"{world}/seasons.json", "--device", "cpu"]
        assert cli.main(["run", *options, "--editor", "none,grace", "--out", f"{world}/run"]) == 0
        subject = clme.load_subject(f"{world}/subject.yaml", "cpu")
        cases = clme.load_cases("cnle", f"{world}/cnle.json")
        editor = clme.load_editor("grace", subject)
        clme.save_edits(world / "edits.safetensors", editor.edit(cases[:1]), subject)
        yield {"clme": clme, "subject": subject, "cases": cases, "editor": editor, "torch": torch, "Path": Path,
               "Endpoint": Endpoint}  # fmt: skip


@pytest.fixture
def _within_seconds():
    """An input that is accepted, or that hangs, must not hold up the others."""

    def stop(*_):
        raise TimeoutError("not answered within ten seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_within_seconds")
@pytest.mark.parametrize("group, spoilt", INPUTS)
def test_a_bad_input_is_answered(group, spoilt, world, environment, tmp_path, capsys, monkeypatch):
    file = _spoil(group, spoilt, world, tmp_path)
    known_files = set(tmp_path.rglob("*"))
    given = spoilt.get("given", "")
    places = {"world": str(world), "here": str(tmp_path)}
    places["given"] = _filled(str(given), places)
    monkeypatch.chdir(tmp_path)
    if "run" in group:
        words = [_filled(word, places) for word in shlex.split(group["run"])]
        words += [_filled(word, places) for word in spoilt.get("more", [])]
        capsys.readouterr()
        try:
            status = cli.main(words)
        except SystemExit as stop:
            status = stop.code
        message = capsys.readouterr().err
        assert status == spoilt.get("status", group["status"]), message
        assert "Traceback" not in message
    else:
        with pytest.raises(StudyError) as raised:
            eval(_filled(group["call"], places), {**environment, "world": world, "here": tmp_path})
        message = str(raised.value)
    assert re.search(str(spoilt["says"]), message), message
    if file is not None:
        assert file.name in message, f"{file.name} is not named: {message}"
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"} - {
        path.relative_to(tmp_path) for path in known_files
    }
    assert not left, f"left behind: {left}"


def _filled(text: str, places: dict[str, str]) -> str:
    return re.sub(r"\{(world|here|given)\}", lambda name: places[name[1]], text)


def _spoil(group: dict, spoilt: dict, world: Path, here: Path) -> Path | None:
    """Put the spoilt file of an input into place; returns it."""
    if "from" not in group:
        return None
    source = world / group["from"]
    name = spoilt.get("file", group["from"])
    target = here / name
    if source.is_dir():
        raise AssertionError(f"{source}: name a file")
    _link_siblings(world, here, Path(group["from"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if "text" in spoilt:
        target.write_text(spoilt["text"], encoding="utf-8")
    elif "python" in spoilt:
        made = eval(
            spoilt["python"],
            {
                "json": json,
                "text": lambda: source.read_text(encoding="utf-8"),
                "bytes_": source.read_bytes,
                "weights": lambda change: save(
                    {
                        name: tensor.clone(memory_format=torch.contiguous_format)
                        for name, tensor in change(load(source.read_bytes())).items()
                    },
                    metadata={"format": "pt"},
                ),
            },
        )
        target.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass"))
    else:
        content = source.read_text(encoding="utf-8")
        lines = (
            [json.loads(line) for line in content.splitlines()]
            if source.suffix == ".jsonl"
            else json.loads(content)
            if source.suffix == ".json"
            else yaml.safe_load(content)
        )
        changed = _changed(lines, spoilt)
        if source.suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in changed)
        else:
            text = json.dumps(changed) if source.suffix == ".json" else yaml.safe_dump(changed)
        target.write_text(text, encoding="utf-8")
    return target


def _link_siblings(world: Path, here: Path, spoilt: Path) -> None:
    """What lies in the same folder as the spoilt file is there as well: a run's other files, a model's."""
    if len(spoilt.parts) < 2:
        return
    top = spoilt.parts[0]
    for path in (world / top).rglob("*"):
        if path.is_file():
            target = here / path.relative_to(world)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def _changed(content, spoilt: dict):
    content = copy.deepcopy(content)
    for place, value in spoilt.get("set", {}).items():
        holder, last = _walk(content, place)
        if isinstance(holder, list) and last == len(holder):
            holder.append(value)
        else:
            holder[last] = value
    for place in spoilt.get("drop", []):
        holder, last = _walk(content, place)
        del holder[last]
    return content


def _walk(content, place):
    parts = [int(part) if part.isdigit() else part for part in str(place).split(".")]
    for part in parts[:-1]:
        content = content[part]
    return content, parts[-1]


def test_the_book_says_how_many_there_are():
    file = FOLDER.parents[1] / "results" / "benchmarks" / "faults.csv"
    tried = pd.read_csv(file).set_index("What")
    assert tried.loc["bad inputs", "Tried"] == len(INPUTS) >= 300, (
        "run benchmarks/faults.py --out results/benchmarks/faults.csv"
    )
    assert (
        tried.loc[["SIGKILL", "SIGINT", "SIGTERM"], ["Lost", "Doubled or damaged", "Other texts"]].eq(0).all(axis=None)
    )
