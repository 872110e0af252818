"""The examples of CONTRIBUTING, as the package of somebody else: found by entry points, run by the command line."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import make_subject

from clme_lib.study.run_folder import load_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


# a second editor, whose operations are counted
COUNTED = """
from clme_lib.editors.operations import Phase
from clme_examples.one_step import OneStep


class Counted(OneStep):
    name = "counted"

    def operations(self, prompt, target, steps):
        return [Phase("step", 1e9, 1e6)]
"""
# what the tables and figures make of two editors more than the paper has
TABLES = """
import sys
from clme_lib.study import rq1, rq4
from clme_lib.study.config import BenchConfig, ManyEditsConfig, make_config
from clme_lib.study.rq2 import measure, tables
from clme_lib.study.run_folder import load_run
from clme_lib.study.tables import editor_colour

records = load_run("grid")
shown = rq1.proficiency_table(records, label="tab").data
assert list(shown["Editor"]) == ["unedited", "GRACE", "counted", "One step"], list(shown["Editor"])
figure = rq1.proficiency_figure(records)
assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GRACE", "counted", "One step"]
grey = editor_colour("nobody knows it")
assert len({editor_colour(name) for name in ("grace", "counted", "one-step")} | {grey}) == 4
measured = measure.load_measurements("bench")
costs = tables.cost_table(measured, label="tab").data
assert set(costs["Editor"]) == {"GRACE", "counted", "One step"}
floors = tables.floor_table(measured, label="tab").data
assert set(floors["Editor"]) == {"GRACE", "counted"}, "nobody has counted the other's operations"
# many edits in one model, by the added editor, dataset and protocol
asked = make_config(ManyEditsConfig, subject="my-model.yaml", dataset="units", editors="none,one-step,grace", protocols="sequential,pairs", cases=2,
                    held_out=1, set="grace.steps=3", metrics="effectiveness_em,generalization_em,specificity_rate", device="cpu", out="many")
many = rq4.run_many(asked)
for of_grid in (rq4.retention_table(many, label="tab").data, rq4.ability_table(many, label="tab").data):
    assert set(of_grid["Editor"]) == {"unedited", "GRACE", "One step"} and of_grid["Protocol"].nunique() == 2
assert len(rq4.findings(many)) == 6 and len(rq4.retention_figure(many).axes) == 4 * 3
# what was measured of the paper's variants is projected, whatever else is there
rows = []
for dataset in ("cnle", "csne"):
    for editor in (*tables.PAPER_VARIANTS, "counted", "one-step"):
        rows.append({**measured[measured["kind"] == "throughput"].iloc[0].to_dict(), "dataset": dataset, "editor": editor,
                     "subject": "smollm2-135m", "batch": 1, "edit_seconds": 1.0, "evaluate_seconds": 1.0})
import pandas as pd
projected = tables.projection_table(pd.DataFrame(rows), label="tab").data.set_index("Subject")
assert float(projected.loc["smollm2-135m", "one case at a time (h)"]) == round(9 * 2 * (21_055 + 16_000) / 3600)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with the installed package, a tiny model, the subject's YAML and the dataset's JSON."""
    folder = tmp_path_factory.mktemp("elsewhere")
    package = folder / "site" / "clme_examples"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name, code in zip(("one_step", "first_word", "units", "pairs"), blocks("python"), strict=True):
        (package / f"{name}.py").write_text(code)
    (package / "counted.py").write_text(COUNTED)
    (package / "again.py").write_text(COUNTED.replace("Counted", "LoRA").replace('"counted"', '"lora"'))
    info = folder / "site" / "clme_examples-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clme-examples\nVersion: 1.0\n")
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    groups["clme_lib.editors"]["counted"] = "clme_examples.counted:Counted"
    groups["clme_lib.editors"]["broken"] = "clme_examples.nothing:Nothing"
    groups["clme_lib.editors"]["lora"] = "clme_examples.again:LoRA"
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    llama = make_subject("llama")
    llama.model.save_pretrained(folder / "model")
    llama.tokenizer.save_pretrained(folder / "model")
    (folder / "my-model.yaml").write_text(blocks("yaml")[0].replace("owner/model", str(folder / "model")))
    (folder / "seasons.json").write_text(blocks("json")[0])
    return folder


# one process runs all commands (the package is new to it, and starting one takes seconds), and then the tables
PROGRAM = """
import contextlib, io, json, sys
from clme_lib import cli

commands, tables = json.loads(sys.argv[1])
answers = {}
for name, arguments in commands.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        answers[name] = {"status": cli.main(arguments)}
    answers[name] |= {"out": out.getvalue(), "err": err.getvalue()}
exec(compile(tables, "tables", "exec"))
print(json.dumps(answers))
"""
UNITS = ["--subject", "my-model.yaml", "--dataset", "units", "--device", "cpu"]
ALL_FIVE = ["run", *UNITS, "--editor", "none,one-step,grace", "--protocol", "pairs", "--cases", "all", "--out", "run",
            "--metrics", "effectiveness_em,effectiveness_first_word", "--set"]  # fmt: skip
SEASONS = [
    "run",
    "--subject",
    "my-model.yaml",
    "--dataset",
    "seasons.json",
    "--editor",
    "none,grace",
    "--device",
    "cpu",
]
COMMANDS = {
    "list": ["list"],
    "broken": ["run", "--editor", "broken", "--out", "broken"],
    "ambiguous": ["run", "--editor", "lora", "--out", "ambiguous"],
    "all five": [*ALL_FIVE, "grace.steps=3"],
    "again": [*ALL_FIVE, "grace.steps=3"],
    "other": [*ALL_FIVE, "grace.steps=4"],
    "seasons": [*SEASONS, "--out", "seasons"],
    "score": ["score", "seasons", "scored", "--metrics", "effectiveness_first_word"],
    "grid": ["run", *UNITS, "--editor", "none,grace,one-step,counted", "--cases", "2", "--out", "grid"],
    "bench": [
        "bench",
        *UNITS,
        "--editor",
        "grace,one-step,counted",
        "--cases",
        "1",
        "--batches",
        "1",
        "--out",
        "bench",
    ],
}


@pytest.fixture(scope="module")
def answers(elsewhere):
    """Status, output and errors of every command, by its name."""
    own = {**os.environ, "PYTHONPATH": f"{elsewhere / 'site'}{os.pathsep}{ROOT}", "MPLBACKEND": "agg",
           "CLME_CACHE": str(elsewhere / "cache")}  # fmt: skip
    program = [sys.executable, "-c", PROGRAM, json.dumps([COMMANDS, TABLES])]
    done = subprocess.run(program, cwd=elsewhere, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_others_add_is_listed_and_a_broken_package_spoils_nothing_else(answers):
    listed, refused = answers["list"], answers["broken"]
    assert listed["status"] == 0 and not listed["err"]
    for name in ("one-step", "effectiveness_first_word", "units", "pairs", "grace", "fluency", "cnle", "single"):
        assert re.search(rf"^  {name} ", listed["out"], re.M), name
    assert refused["status"] == 2
    assert "package 'clme-examples' does not load (clme_examples.nothing:Nothing)" in refused["err"]
    ambiguous = answers["ambiguous"]
    assert ambiguous["status"] == 2, "the run would be of the library's editor, and may be meant to be of the package's"
    message = "two definitions of editor 'lora', in clme_lib.editors.lora and clme_examples.again: rename one"
    assert message in ambiguous["err"] and re.search("^  lora ", listed["out"], re.M)


def test_all_five_run_together(elsewhere, answers):
    """The added editor and GRACE, two edits in one model, on the added dataset, with the added metric, by the YAML's values."""
    assert answers["all five"]["status"] == 0, answers["all five"]["err"]
    file = elsewhere / "run" / "records" / "units.grace.jsonl"
    records = load_run(elsewhere / "run")
    assert set(records["state"]) == {"scored"}
    assert set(records["protocol"]) == {"pairs"} and set(records["dataset"]) == {"units"}
    for _, of_editor in records.groupby("editor"):
        assert of_editor["position"].value_counts().to_dict() == {1: 2, 2: 4}
    assert records["effectiveness_first_word"].isin([0.0, 1.0]).all()
    assert set(records[records["editor"] == "grace"]["steps"]) == {3}
    assert set(records[records["editor"] == "one-step"]["steps"]) == {1}
    (start,) = json.loads((elsewhere / "run" / "run.json").read_text())["starts"]
    hparams = {name: made["values"] for name, made in start["hyperparameters"].items()}
    assert hparams["one-step"] == {"layer": 1, "lr": 0.1} and hparams["grace"]["layer"] == 2
    assert set(records["start"]) == {start["id"]} and set(records["library"]) == {start["library"]}
    assert answers["again"]["status"] == 0 and len(file.read_text().splitlines()) == 6, "nothing is edited twice"
    assert answers["other"]["status"] == 1
    assert "set grace={'steps': 3}, but set grace={'steps': 4} was requested" in answers["other"]["err"]


def test_a_dataset_needs_no_code(elsewhere, answers):
    assert answers["seasons"]["status"] == 0, answers["seasons"]["err"]
    records = load_run(elsewhere / "seasons")
    assert len(records) == 4 and set(records["dataset"]) == {"seasons"} and set(records["source"]) == {"seasons.json"}
    assert answers["score"]["status"] == 0, answers["score"]["err"]
    scored = load_run(elsewhere / "scored")
    assert scored["effectiveness_first_word"].notna().all() and (scored["fluency"] == records["fluency"]).all()


def test_two_more_editors_blank_no_table(answers):
    """The grid, RQ1's table and figure, RQ2's measurements, projection and floor (TABLES, whose assertions the fixture runs)."""
    assert answers["grid"]["status"] == 0, answers["grid"]["err"]
    assert answers["bench"]["status"] == 0, answers["bench"]["err"]
