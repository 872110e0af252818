"""Subjects that were trained further: training resumes to the same bytes, and merging gives what peft computes, or is refused."""

import json
import shutil

import pytest
import torch
from conftest import ROWS, make_subject
from peft import PeftModel
from transformers import AutoModelForCausalLM

from clme_lib.datasets.code_text import Text
from clme_lib.datasets.paper import CNLE
from clme_lib.study import adapt as adapting
from clme_lib.study.adapt import AdapterHyperparameters, adapt, losses_by_kind
from clme_lib.subjects import adapters
from clme_lib.support.errors import StudyError

HPARAMS = AdapterHyperparameters(rank=4, alpha=8, lr=0.02, batch_tokens=64)
TEXTS = [
    Text("sums", "snippet", CNLE.prompt(f"{intent} {n}"), f"{target}[{n}]")
    for n in range(8)
    for intent, target, _ in ROWS
]
TEXTS += [Text("sums", "function", "", f"def double_{n}(x):\n    return 2 * x") for n in range(8)]
HELD_OUT = [Text("other", "snippet", CNLE.prompt(f"{intent} 9"), f"{target}[9]") for intent, target, _ in ROWS]
HELD_OUT += [Text("other", "function", "", "def double_9(x):\n    return 2 * x")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("subjects") / "base"
    subject = make_subject("llama")
    subject.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter's folder and its provenance."""
    out = tmp_path_factory.mktemp("adapters") / "tiny-code"
    return out, adapt(make_subject("llama"), base, TEXTS, HELD_OUT, out, HPARAMS)


def test_what_was_held_out_is_less_surprising_afterwards(trained):
    out, provenance = trained
    for kind in ("function", "snippet"):
        assert provenance.losses_after[kind] < 0.9 * provenance.losses_before[kind]
    assert sorted(file.name for file in out.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS, adapters.PROVENANCE]


def test_a_loss_is_of_the_target_and_the_end_of_text(llama):
    text = TEXTS[0]
    ids = [llama.tokenizer(part)["input_ids"] for part in (text.prompt, f"{text.prompt} {text.target}")]
    labels = [*ids[1][len(ids[0]) :], llama.tokenizer.eos_token_id]
    logits = llama.model(torch.tensor([ids[1]])).logits[0, len(ids[0]) - 1 :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    # beside longer rows, so that it is padded
    shorter = Text("other", "description", text.prompt, text.target)
    assert losses_by_kind(llama, [shorter, *HELD_OUT])["description"] == pytest.approx(expected, rel=1e-4)


def test_a_training_that_was_killed_ends_with_the_same_bytes(base, trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(adapting, "_STEPS_APART", 3)
    keep, kept = adapting._keep, []

    def killed_after_two(*arguments):
        keep(*arguments)
        kept.append(arguments[3])
        if len(kept) == 2:
            raise Killed

    monkeypatch.setattr(adapting, "_keep", killed_after_two)
    with pytest.raises(Killed):
        adapt(make_subject("llama"), base, TEXTS, HELD_OUT, tmp_path / "out", HPARAMS)
    assert not (tmp_path / "out" / adapters.WEIGHTS).exists()
    other = HPARAMS.model_copy(update={"lr": 0.01})
    with pytest.raises(StudyError, match="hparams"):
        adapt(make_subject("llama"), base, TEXTS, HELD_OUT, tmp_path / "out", other)
    resumed = adapt(make_subject("llama"), base, TEXTS, HELD_OUT, tmp_path / "out", HPARAMS)
    assert kept[:3] == [3, 6, 9]
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (trained[0] / name).read_bytes()
    assert resumed.merged_sha256 == trained[1].merged_sha256


def test_merging_gives_what_peft_computes(base, trained, tmp_path):
    out, provenance = trained
    assert adapters.write_merged(base, out, tmp_path / "merged") == provenance.merged_sha256
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(ids).logits for model in (merged, plain, plain.get_base_model())]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == sorted(file.name for file in base.iterdir())


def test_an_adapter_that_was_changed_is_refused(base, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "FOLDER", tmp_path)
    shutil.copytree(trained[0], tmp_path / "tiny-code")
    adapters.merge(base, "tiny-code", tmp_path / "merged")
    config = tmp_path / "tiny-code" / adapters.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 5.0}))
    with pytest.raises(StudyError, match=rf"tiny-code.*{trained[1].merged_sha256}.*clme adapt"):
        adapters.merge(base, "tiny-code", tmp_path / "again")
    provenance = tmp_path / "tiny-code" / adapters.PROVENANCE
    provenance.write_text(provenance.read_text().replace('"steps"', '"stepps"'))
    with pytest.raises(StudyError, match=f"{adapters.PROVENANCE}.*steps"):
        adapters.provenance("tiny-code")
