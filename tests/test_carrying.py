"""What is carried to a machine without network suffices there, without the packages that only reading and scoring take."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import make_subject

from clme_lib.cli import main
from clme_lib.datasets import embedded_cnle, embedded_csne
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.evaluation.records import UNSCORED
from clme_lib.study import run_folder
from clme_lib.subjects import embedded as embedded_subject

ROOT = Path(__file__).resolve().parent.parent
NOT_NEEDED = ("sklearn", "scikit_learn", "matplotlib", "seaborn", "nltk", "rouge_score", "openai", "ray", "jupy", "papermill", "nbformat",
              "ipykernel", "IPython", "ipython", "sphinx", "myst")  # fmt: skip


@pytest.fixture
def carried(tmp_path):
    """A cache that ``clme prepare`` filled, copied to another place, with empty folders for the models' weights."""
    embedded_csne.load(CSNE)  # mining takes a minute, so it is not repeated
    filled = tmp_path / "filled"
    (filled / "datasets").mkdir(parents=True)
    shutil.copy(embedded_csne.cached(), filled / "datasets")
    for adapter in (None, "smollm2-135m-code"):
        weights = filled / "subjects" / embedded_subject.location(adapter).name
        weights.mkdir(parents=True)
        (weights / embedded_subject.MANIFEST).write_text('{"files": {}}')
    own = {**os.environ, "CLME_CACHE": str(filled)}
    subprocess.run([sys.executable, "-m", "clme_lib.cli", "prepare"], env=own, check=True, capture_output=True)
    shutil.copytree(filled, tmp_path / "carried")
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


def test_a_carried_cache_suffices(carried, monkeypatch):
    expected = {"cnle": embedded_cnle.load(CNLE), "csne": embedded_csne.load(CSNE)}
    monkeypatch.setenv("CLME_CACHE", str(carried))
    assert embedded_cnle.cached().is_relative_to(carried) and embedded_csne.cached().is_relative_to(carried)
    for module, name in ((embedded_cnle, "nearest"), (embedded_csne, "build")):
        monkeypatch.setattr(module, name, None)  # nothing is made anew
    assert {"cnle": embedded_cnle.load(CNLE), "csne": embedded_csne.load(CSNE)} == expected
    assert embedded_subject.ensure().parent == carried / "subjects"


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


@pytest.mark.slow
def test_a_bare_machine_runs_and_measures(carried, bare_packages, tmp_path, capsys):
    folder, llama = tmp_path / "tiny", make_subject("llama", blocks=6)
    llama.model.config.max_position_embeddings = 2048  # CSNE has prompts of 650 of its small tokens
    llama.model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    code = f"""
import importlib.util
assert not any(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib", "seaborn", "nltk", "rouge_score", "papermill"))
from clme_lib.cli import main
common = ["--subject", {str(folder)!r}, "--device", "cpu", "--cases", "2"]
assert main(["run", *common, "--editor", "none,memit,grace", "--unscored", "--out", {str(tmp_path / "run")!r}]) == 0
assert main(["bench", *common, "--editor", "grace", "--batches", "2", "--out", {str(tmp_path / "bench")!r}]) == 0
"""
    own = {
        "PYTHONPATH": f"{bare_packages}{os.pathsep}{ROOT}",
        "CLME_CACHE": str(carried),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-S", "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(run_folder.load_run(tmp_path / "run")["state"]) == {UNSCORED}
    assert main(["score", str(tmp_path / "run"), str(tmp_path / "scored")]) == 0
    scored = run_folder.load_run(tmp_path / "scored")
    assert len(scored) == 12 and scored["error"].isna().all() and scored["fluency"].notna().all()
    capsys.readouterr()
