"""On a GPU (make gpu-tests): the same edits and texts as on the CPU, and on the real subject the plain loop's."""

import os

import plain
import pytest
import torch
from conftest import ARCHITECTURES, DEVICE, make_subject

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.evaluate import score
from clme_lib.support.seeds import DEFAULT_SEED

pytestmark = pytest.mark.gpu
SETTINGS = {
    "ft-l": {"layer": 2, "steps": 3, "lr": 2e-3, "bound": 1e-3},
    "rome": {"layer": 1, "steps": 6},
    "grace": {"layer": 2, "steps": 10},
    "a-grace-wo-cl": {"layer": 2, "steps": 10},
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path, request):
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def test_the_device_is_the_one_asked_for(llama):
    assert llama.device.type == torch.device(DEVICE).type == torch.device(os.environ["CLME_TEST_DEVICE"]).type


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SETTINGS)
def test_edits_are_those_of_the_cpu(architecture, name, cases, monkeypatch):
    there = make_subject(architecture)
    monkeypatch.setattr("conftest.DEVICE", "cpu")
    here = make_subject(architecture)
    made = [load_editor(name, subject, **SETTINGS[name]).edit(cases) for subject in (here, there)]
    for edit, other in zip(*made):
        assert torch.tensor(edit.log.losses) == pytest.approx(torch.tensor(other.log.losses), rel=1e-3)
        for place, tensor in edit.tensors().items():
            its = other.tensors()[place].cpu()
            if name == "ft-l":  # a sign search: entries, not norms, agree
                assert torch.isclose(tensor, its, rtol=1e-2, atol=1e-5).float().mean() > 0.99
            else:
                assert torch.linalg.vector_norm(tensor - its) <= 1e-2 * torch.linalg.vector_norm(tensor)
    options = dict(seed=DEFAULT_SEED, preset="clean", run="", source="", folds_of={}, scored=False)
    texts = [score(subject, cases, edits, **options) for subject, edits in zip((here, there), made)]
    for measure in ("effectiveness", "generalization", "specificity"):
        pairs = [[getattr(record, f"generated_{measure}") for record in both] for both in zip(*texts)]
        same = [text == other for text, other in pairs]
        assert sum(same) >= len(same) - 1, measure


@pytest.mark.subject
def test_the_fast_path_is_the_plain_loop_on_the_real_subject(smollm2):
    for dataset in ("cnle", "csne"):
        for case in sample_cases(load_cases(dataset), 2, seed=0):
            editor = load_editor("grace", smollm2, steps=8)
            (edit,) = editor.edit([case])
            _, _, losses = plain.grace(smollm2, case, editor.hparams)
            assert edit.log.losses == pytest.approx(losses, rel=2e-3)
