"""The project as its users meet it: versions, notebooks, the command line, imports."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import papermill
import pytest
import yaml

from clme_lib.cli import main
from clme_lib.study import measurements
from clme_lib.study.config import BenchConfig, ManyEditsConfig, ReportConfig
from clme_lib.study.notebook import execute
from clme_lib.support.errors import StudyError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
RQ1 = ROOT / "notebooks" / "rq1_proficiency.py"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_source_of_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinned = pins()
    for name in direct:
        assert re.fullmatch(r"[\w.-]+", name), f"{name}: versions belong in constraints.txt"
        assert normal(name) in pinned, f"{name} is not pinned"
        assert importlib.metadata.version(name).split("+")[0] == pinned[normal(name)]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[book,dev]"]
    assert "python=3.11" in environment and project["requires-python"] == ">=3.11,<3.14"


def test_binder_installs_the_same_and_prepares_what_a_notebook_needs():
    """What repo2docker reads: paths of the environment are from its folder."""
    binder = ROOT / ".binder"
    conda, of_binder = (yaml.safe_load((folder / "environment.yml").read_text()) for folder in (ROOT, binder))
    *others, pip = (entry["pip"] if isinstance(entry, dict) else entry for entry in of_binder["dependencies"])
    assert others == [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    assert pip == [
        "--extra-index-url https://download.pytorch.org/whl/cpu",
        "--constraint ../constraints.txt",
        "--editable ..[book]",
    ]
    assert (binder / "../constraints.txt").is_file() and (binder / "../pyproject.toml").is_file()
    script = (binder / "postBuild").read_text()
    assert os.access(binder / "postBuild", os.X_OK) and script.startswith("#!/usr/bin/env bash\n")
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set "))]
    assert commands == ["jupytext --quiet --sync notebooks/*.py", "clme prepare"]
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "--help"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_well_formed(path):
    notebook = jupytext.read(path)
    assert jupytext.writes(notebook, fmt="py:percent") == jupytext.writes(
        jupytext.reads(jupytext.writes(notebook, fmt="py:percent"), fmt="py:percent"), fmt="py:percent"
    )
    assert notebook.metadata.kernelspec.name == "python3"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = .+  # .+", line), f"parameter without type or comment: {line}"
    if not path.stem.startswith("rq"):
        return  # the other notebooks run nothing, so they have no configuration
    schema = {"rq2_efficiency": BenchConfig, "rq4_many_edits": ManyEditsConfig}.get(path.stem, ReportConfig)
    defaults = schema.model_validate({})
    for line in tagged[0].source.splitlines():
        name, value = re.match(r"(\w+): \w+ = (.+?)  # ", line).groups()
        assert name in schema.model_fields
        if path.stem != "rq3_a_grace" or name != "editors":  # RQ3 has its own editors
            given = schema.model_validate({name: ast.literal_eval(value)} if value != '""' else {})
            if name not in ("name", "out"):
                assert getattr(given, name) == getattr(defaults, name), name


def test_runner_refuses_unknown_parameters(tmp_path):
    with pytest.raises(StudyError, match=r"unknown parameter 'editor' \(did you mean 'editors'\?\); known: .*editors"):
        execute(RQ1, tmp_path / "out.ipynb", {"editor": "grace"})
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.slow
def test_a_failing_cell_leaves_no_finished_notebook(tmp_path):
    with pytest.raises(StudyError, match="a cell failed.*unknown editor 'rome2'"):
        execute(RQ1, tmp_path / "out.ipynb", {"editors": "rome2"})
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.slow
def test_papermill_as_the_readme_says(tmp_path):
    """The literal call works on the paired .ipynb, and a misspelt parameter stops it with the known ones."""
    ipynb = tmp_path / "rq1_proficiency.ipynb"
    jupytext.write(jupytext.read(RQ1), ipynb)
    known = papermill.inspect_notebook(str(ipynb))
    assert known["cases"]["help"] == "number of cases per dataset" and known["cases"]["inferred_type_name"] == "int"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ipynb),
        str(tmp_path / "out.ipynb"),
        "-p",
        "editor",
        "grace",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'editors'" in done.stderr


@pytest.mark.slow
def test_published_run_renders_twice_the_same(tmp_path):
    """The RQ1 notebook on the published records: no model is needed, and two executions give equal bytes."""
    folder = ROOT / "results" / "runs" / "smollm2-135m"
    outputs = []
    for name in ("a", "b"):
        out = tmp_path / name / "rq1.ipynb"
        parameters = {"out": str(folder), "name": folder.name, "cases": 100, "dataset": "cnle", "editors": "none,grace"}
        execute(RQ1, out, parameters)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert b"tab-rq1-proficiency" in outputs[0]


def test_command_line(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("smollm2-135m", "codellama-7b", "cnle", "csne", "grace", "ft-l"))
    assert main(["run", "--subject", "nonsense", "--out", "unused", "--cases", "1", "--dataset", "cnle"]) == 1
    assert "unknown subject 'nonsense'" in capsys.readouterr().err
    assert main(["run", "--out", "unused", "--editor", "gracy"]) == 2
    assert "unknown editor 'gracy'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("command", ["measure selection --editor rome", "measure weight-updates", "bench", "run"])
def test_measuring_commands_want_cases(command, capsys, tmp_path):
    assert main([*command.split(), "--cases", "0", "--out", str(tmp_path / "table.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"clme: clme {command.split()[0]}: cases: ") and "greater than or equal to 1" in said


@pytest.mark.parametrize("command", ["data build units --out x", "data check x.json --dataset units"])
def test_only_the_papers_datasets_are_built_and_checked(command, capsys):
    assert main(command.split()) == 2
    assert (
        "dataset: " in (said := capsys.readouterr().err)
        and "'units' is not one of the paper's datasets: cnle, csne" in said
    )


def test_a_measurement_says_which_options_it_takes(capsys, tmp_path, monkeypatch):
    """Before any model is loaded."""
    monkeypatch.setattr(measurements, "load_subject", None)
    for command, message in (
        ("measure nothing", "unknown measurement 'nothing'; known: selection, presets, end-of-target"),
        ("measure selection", "measure selection: needs --editor"),
        ("measure presets --editor rome,memit", "measure presets: does not take --editor, or takes only one value"),
        ("measure radius --dataset cnle", "measure radius: does not take --dataset"),
        ("measure conflicts --cases 31", "cases=31: cnle has 30 selection cases; choose from 1 to 30"),
        ("measure radius --cases 31", "cases=31: cnle has 30 selection cases; choose from 1 to 30"),
    ):
        assert main([*command.split(), "--out", str(tmp_path / "table.csv")]) == 1
        assert message in capsys.readouterr().err
    assert main(["measure", "list"]) == 0 and "encoders" in capsys.readouterr().out
    assert main(["measure", "radius"]) == 1 and "measure radius: needs --out" in capsys.readouterr().err


@pytest.mark.parametrize("old", ["select", "presets", "diagnose", "pmet-parts", "radius", "encoders", "statistics"])
def test_a_command_that_was_renamed_says_so(old, capsys):
    assert main([old, "--out", "table.csv"]) == 2
    assert re.search(rf"`clme {old}` is now called `clme measure [a-z-]+`", capsys.readouterr().err)


def test_importing_is_light():
    code = "import clme_lib, sys; assert 'torch' not in sys.modules and 'requests' not in sys.modules; clme_lib.cases"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'clme_lib' has no attribute 'cases'" in done.stderr


def test_no_unsafe_loading():
    for path in (ROOT / "clme_lib").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"torch\.load\(|pickle\.load|trust_remote_code\W+True", text), path


def test_a_variable_says_what_it_holds():
    folders = ("clme_lib", "book", "benchmarks", "notebooks", "tests", "results")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {getattr(node, field, None) for node in nodes for field in ("id", "arg", "attr", "name")}
        assert not names & {"found", "mine", "one", "wanted"}, path


def test_an_attribute_that_is_set_is_read():
    read, written = set(), {}
    for path in (ROOT / "clme_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.ctx, ast.Store):
                    written.setdefault(node.attr, path)
                else:
                    read.add(node.attr)
    assert not {name: path for name, path in written.items() if name not in read}
