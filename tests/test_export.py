"""What is exported does the same without this library: peft and transformers load it, and write the same text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from clme_lib import cli
from clme_lib.editors.registry import load_editor
from clme_lib.edits.base import Edit
from clme_lib.edits.files import save_edits
from clme_lib.evaluation.generation import Request, generate
from clme_lib.evaluation.loading import load_subject
from clme_lib.study.export import export_edits
from clme_lib.subjects import embedded
from clme_lib.support.errors import StudyError

LEARNT = {
    "rome": {"layer": 1, "steps": 20},
    "pmet": {"layers": [1, 2], "steps": 20, "covariance_weight": 10.0},
    "ft-l": {"layer": 2, "steps": 20, "bound": 0.5, "lr": 0.1},
}
TOKENS = 12
PAGE = Path(__file__).resolve().parent.parent / "book" / "new_experiments.md"


@pytest.fixture
def base(subject, tmp_path):
    """The subject in a folder, as transformers keeps models, and loaded from there."""
    subject.model.save_pretrained(tmp_path / "base")
    subject.tokenizer.save_pretrained(tmp_path / "base")
    return load_subject(str(tmp_path / "base"), "cpu")


def written(model, tokenizer, prompt) -> str:
    """By transformers alone."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def learnt(base, cases, name, tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    editor = load_editor(name, base, **LEARNT[name])
    if name == "pmet":
        editor.stand_in(cases)
    return editor.edit(cases[:2])


@pytest.mark.parametrize("name", LEARNT)
def test_an_export_writes_what_the_edited_subject_writes(base, cases, name, tmp_path, monkeypatch):
    edits = learnt(base, cases, name, tmp_path, monkeypatch)
    together = base.edited(Edit.compose(edits))
    save_edits(tmp_path / "edits.safetensors", edits, base)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    options = ["--device", "cpu"]  # the subject is the one that the file names
    assert (
        cli.main(
            ["export", str(tmp_path / "edits.safetensors"), "--to", str(tmp_path / "merged"), "--merged", *options]
        )
        == 0
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    models = [plain]
    if name == "ft-l":
        with pytest.raises(StudyError, match="ft-l updates whole matrices, which a low-rank adapter cannot hold"):
            export_edits(edits, base, tmp_path / "adapter")
        assert not list(tmp_path.glob("adapter*"))
    else:
        assert (
            cli.main(["export", str(tmp_path / "edits.safetensors"), "--to", str(tmp_path / "adapter"), *options]) == 0
        )
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 2 and config["base_model_name_or_path"] == str(tmp_path / "base")
        models.append(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        )
    prompts = [prompt for case in cases[:2] for prompt in (case.prompt, *case.unrelated)]
    expected = [text.text for text in generate(together, [Request(prompt, TOKENS) for prompt in prompts])]
    unedited = [text.text for text in generate(base, [Request(prompt, TOKENS) for prompt in prompts])]
    assert expected != unedited
    for model in models:
        assert [written(model.eval(), tokenizer, prompt) for prompt in prompts] == expected
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.model.state_dict().items())


def test_ranks_that_differ_are_filled_up(base, cases, tmp_path, monkeypatch):
    low = learnt(base, cases, "rome", tmp_path, monkeypatch)
    both = [*low, *learnt(base, cases, "pmet", tmp_path, monkeypatch)]
    export_edits(both, base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    for layer, delta in Edit.compose(both).deltas().items():
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        torch.testing.assert_close(merged[key], base.model.state_dict()[key] + delta, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_exported_is_refused(base, cases, tmp_path, monkeypatch, capsys):
    codebooks = load_editor("grace", base, layer=2, steps=2).edit(cases[:2])
    with pytest.raises(
        StudyError, match="grace look up a codebook at every prompt, which weights cannot do: run the model"
    ):
        export_edits(codebooks, base, tmp_path / "out")
    with pytest.raises(StudyError, match="change nothing"):
        export_edits(load_editor("none", base).edit(cases[:1]), base, tmp_path / "out")
    edits = learnt(base, cases, "rome", tmp_path, monkeypatch)
    save_edits(tmp_path / "edits.safetensors", edits, base)
    options = ["export", str(tmp_path / "edits.safetensors"), "--subject", str(tmp_path / "base"), "--device", "cpu"]
    assert cli.main([*options, "--to", str(tmp_path / "out"), "--case-ids", "0,77"]) == 1
    assert "no edit of case 77; the file has edits of cases 0, 1" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert cli.main([*options, "--to", str(tmp_path / "out")]) == 1
    assert "already exists; choose another folder" in capsys.readouterr().err
    half = load_subject(str(tmp_path / "base"), "cpu", "bfloat16")
    with pytest.raises(StudyError, match="the weights are bfloat16, where rounding would lose most of an update"):
        export_edits(edits, half, tmp_path / "half", merged=True)
    said = export_edits(edits, half, tmp_path / "half", merged=True, allow_rounding=True)
    assert re.search(
        r"\d+ of \d+ entries in 1 matrices changed, by [01]\.\d{4} of the update's norm, in bfloat16$", said
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_an_edit_of_the_embedded_subject_is_exported(smollm2, cases, tmp_path):
    edits = load_editor("rome", smollm2, steps=6).edit(cases[:1])
    export_edits(edits, smollm2, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(embedded.location())
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    (expected,) = generate(smollm2.edited(edits[0]), [Request(cases[0].prompt, TOKENS)])
    (unedited,) = generate(smollm2, [Request(cases[0].prompt, TOKENS)])
    assert written(model, smollm2.tokenizer, cases[0].prompt) == expected.text != unedited.text


@pytest.mark.slow
def test_the_page_exports_an_edit_and_uses_it_without_this_library(tmp_path, monkeypatch, capsys):
    section = PAGE.read_text(encoding="utf-8").partition("(sec-elsewhere)=")[2].partition("\n## Edit")[0]
    makes, uses = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"^    clme (.*)", section, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(makes, str(PAGE), "exec"), made := {})
    assert cli.main(command.split()) == 0
    assert "1 edit in an adapter: adapter; rank 1 in 1 layers" in capsys.readouterr().out
    # the page's prompt, in the first case's words, so that the edit shows
    (case,) = made["clme"].load_cases("cnle")[:1]
    alone, count = re.subn(r'"Intent: .*?Code:"', lambda _: repr(case.prompt), uses)
    assert count == 1
    script = f"import sys\nsys.modules['clme_lib'] = None\n{alone}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    edited = made["subject"].edited(made["edits"][0])
    for subject, same in ((edited, True), (made["subject"], False)):
        (expected,) = generate(subject, [Request(case.prompt, 16)])
        assert (repr(expected.text)[1:-1] in done.stdout) is same
