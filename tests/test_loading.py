"""Subjects that look right and are not, caches that are not what they say, and prompts that are too long."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file

from clme_lib import cli
from clme_lib.datasets import registry
from clme_lib.datasets.cases import Case
from clme_lib.datasets.construction import language_models
from clme_lib.evaluation import loading, unedited
from clme_lib.evaluation.generation import Request, generate
from clme_lib.evaluation.loading import check_behaviour, check_lengths, load_subject
from clme_lib.forward.prompt_keys import stored_queries
from clme_lib.study import doctor
from clme_lib.subjects import embedded
from clme_lib.subjects.settings import list_subjects, load_settings
from clme_lib.support.artifact import Artifact
from clme_lib.support.errors import StudyError

SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, bos_token_id=None, pad_token_id=None)  # fmt: skip
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=8.0)
# the window is longer than a prompt of the comparison and shorter than another
MISTRAL = dict(sliding_window=150, head_dim=8)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def save(folder, kind, **more):
    """A folder with a tiny random model of a kind and the tests' tokenizer."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("StableLm", {"partial_rotary_factor": 0.25, "use_parallel_residual": False}),
        ("Mistral", MISTRAL),
        ("Granite", {"attention_multiplier": 0.3}),
    ],
)
def test_these_models_compute_as_the_study_does(tmp_path, kind, more, dtype):
    assert load_subject(save(tmp_path / "model", kind, **more), "cpu", dtype).dtype_name == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Granite", MULTIPLIERS, "Granite.*not reproduce: the inputs of the edited matrices differ by"),
        ("Granite", {"logits_scaling": 8.0}, "Granite.*not reproduce: the losses of targets differ by .* nats"),
        ("Granite", {"residual_multiplier": 0.22}, "Granite.*not reproduce: the residual streams after the blocks"),
        ("Granite", {"embedding_multiplier": 12.0}, "Granite.*not reproduce: the inputs of the edited matrices"),
        ("Olmo2", {}, "Olmo2.*not reproduce: the residual streams after the blocks differ by"),
        ("Olmo3", {"sliding_window": 400}, "Olmo3.*cannot run"),
        ("Gemma2", {"head_dim": 8}, "Gemma2.*attention implementation"),
        ("Gemma3Text", {"head_dim": 8}, "Gemma3.*cannot run"),
        ("Exaone4", {"sliding_window": 400}, "Exaone4.*laid out like|Exaone4.*not reproduce|Exaone4.*cannot run"),
        ("Glm4", {"head_dim": 8}, "Glm4.*not reproduce"),
        ("StableLm", {"use_parallel_residual": True}, "StableLm.*laid out like"),
        ("Cohere", {}, "Cohere.*laid out like"),
        ("Mixtral", {"num_local_experts": 2}, "Mixtral.*laid out like"),
        ("Qwen2Moe", {**EXPERTS, "mlp_only_layers": [0, 1]}, "Qwen2Moe.*laid out like"),
        ("Mistral", {"sliding_window": 8, "head_dim": 8}, "reads 8 tokens .*sliding_window.*too few"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "reads 8 tokens"),
    ],
)
def test_models_that_compute_otherwise_are_refused(tmp_path, kind, more, message, dtype):
    with pytest.raises(StudyError, match=message):
        load_subject(save(tmp_path / "model", kind, **more), "cpu", dtype)


def test_a_subject_is_compared_once(tmp_path, monkeypatch):
    folder, compared = save(tmp_path / "model", "Llama"), []
    monkeypatch.setattr(loading, "check_behaviour", compared.append)
    load_subject(folder, "cpu"), load_subject(folder, "cpu")
    assert len(compared) == 1
    load_subject(folder, "cpu", "bfloat16")
    assert len(compared) == 2
    _configure(tmp_path / "model", rms_norm_eps=1e-4)
    load_subject(folder, "cpu")
    assert len(compared) == 3


def test_a_long_path_is_a_subject_like_any_other(tmp_path):
    folder = tmp_path / ("ü" * 120) / ("x y" * 40)
    folder.mkdir(parents=True)
    subject = load_subject(save(folder, "Llama"), "cpu")
    assert unedited.answers_for(subject, ["Code:"]) == unedited.answers_for(subject, ["Code:"])
    assert stored_queries(subject, ["Code:"], 2, "mean").shape == (1, 48)


def test_no_number_is_no_agreement(llama, monkeypatch):
    monkeypatch.setattr(loading, "_differences", lambda *_: {"the losses": (float("nan"), False)})
    with pytest.raises(StudyError, match="the losses differ by nan nats"):
        check_behaviour(llama)


def test_texts_inside_a_sliding_window_are_the_models_own(tmp_path):
    """Together the rows are wider than the window; each alone is not."""
    subject = load_subject(save(tmp_path / "model", "Mistral", **MISTRAL), "cpu")
    assert subject.positions == 150
    prompts = {"Code:": 100, "Intent: " + "sort the list and " * 8 + "\nCode:": 30}
    texts = generate(subject, [Request(prompt, budget) for prompt, budget in prompts.items()])
    for text, (prompt, budget) in zip(texts, prompts.items()):
        ids = torch.tensor([subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        own = subject.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget)
        assert list(text.ids) == own[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("part", ["prompt", "target", "rephrased", "unrelated"])
def test_what_is_longer_than_the_model_is_refused_before_anything_runs(llama, cases, part):
    check_lengths(llama, cases, "a.json")
    long = "word " * 60_000 + "\nCode:"
    texts = {"prompt": long, "target": long, "rephrased": (long,), "unrelated": (long,)}
    first = cases[0]
    texts = {name: texts[name] if name == part else getattr(first, name) for name in texts}
    case = Case(7, first.dataset, *texts.values())
    with pytest.raises(StudyError, match="case 7 of cnle: .* tokens and needs .* reads 512"):
        check_lengths(llama, [*cases, case], "a.json")


def test_a_token_the_model_does_not_know_is_refused(llama, cases, monkeypatch):
    monkeypatch.setattr(llama.decoder.embed_tokens, "num_embeddings", 100)
    with pytest.raises(StudyError, match="case 0 of cnle: .* has a token that tiny-llama does not know"):
        check_lengths(llama, cases, "a.json")


def _configure(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _spoil_tokenizer(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": True}))


@pytest.mark.parametrize(
    "change",
    [lambda folder: _configure(folder, rms_norm_eps=0.05), _spoil_tokenizer],
    ids=["configuration", "tokenizer"],
)
def test_another_configuration_is_another_subject(tmp_path, change, monkeypatch):
    """Its cached answers, queries and statistics are not the first one's."""
    folder = save(tmp_path / "model", "Llama")
    before = load_subject(folder, "cpu")
    unedited.answers_for(before, ["Code:"])
    change(tmp_path / "model")
    after = load_subject(folder, "cpu")
    assert after.fingerprint != before.fingerprint
    generated = []
    monkeypatch.setattr(unedited, "generate", lambda _, asked: generated.extend(asked) or generate(after, asked))
    unedited.answers_for(after, ["Code:"])
    assert len(generated) == 1


@pytest.fixture
def answers(llama):
    """The file of a subject's cached answers, and a way to ask for them anew in a process that has not read it."""
    prompts = ["Code:", "Intent: sort\nCode:"]
    texts = unedited.answers_for(llama, prompts)
    (file,) = (loading.cache_dir() / "unedited").glob("*.jsonl")

    def again():
        unedited._journal.cache_clear()
        return unedited.answers_for(llama, prompts)

    return file, texts, again


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: {**row, "text": "forged"},
        lambda row: {**row, "ids": [1]},
        lambda row: {"key": row["key"], "text": "forged", "ids": [1]},
        lambda row: {},
    ],
)
def test_a_changed_answer_is_made_anew(answers, spoil):
    file, texts, again = answers
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(spoil(row)) + "\n" for row in rows))
    assert again() == texts


@pytest.mark.parametrize("damage", ["[]\n", "3\n", "x\n"])
def test_a_damaged_file_of_answers_is_refused_with_the_remedy(answers, damage):
    file, _, again = answers
    file.write_text(damage)
    with pytest.raises(StudyError, match=rf"{file.name}, line 1: .*"):
        again()


def test_answers_of_another_subject_are_not_read(answers, tmp_path):
    file, _, _ = answers
    other = load_subject(save(tmp_path / "model", "Llama", rms_norm_eps=0.05), "cpu")
    own = unedited.answers_for(other, ["Code:"])
    (others_file,) = set(file.parent.glob("*.jsonl")) - {file}
    others_file.write_bytes(file.read_bytes())
    unedited._journal.cache_clear()
    assert unedited.answers_for(other, ["Code:"]) == own


def test_an_artifact_that_was_changed_is_refused(tmp_path):
    tensors = {
        "b": torch.randn(3, 2).bfloat16(),
        "a": torch.arange(4),
        "none": torch.empty(0, 3),
        "single": torch.tensor(1),
    }
    made = Artifact(tmp_path / "a.safetensors", {"subject": "x"})
    made.write(tensors, more=[1])
    header, read = made.read()
    assert header["more"] == [1] and all(torch.equal(read[name], tensors[name]) for name in tensors)
    whole = made.file.read_bytes()
    spoilt = {
        "truncated": whole[:-1],
        "longer": whole + b"x",
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "header": whole.replace(b'\\"more\\": [1]', b'\\"more\\": [2]'),
        "identity": whole.replace(b'\\"subject\\": \\"x\\"', b'\\"subject\\": \\"y\\"'),
        "no JSON": whole.replace(b'\\"more\\": [1]', b'\\"more\\": [1['),
        "empty": b"",
    }
    for name, content in spoilt.items():
        assert content != whole, name
        made.file.write_bytes(content)
        for read in (made.read, lambda: made.read(with_tensors=False), lambda: made.rows("b", [0])):
            with pytest.raises(StudyError, match=r"a\.safetensors: .*remove it, and make it again"):
                read()
    content = load_file_with(made, whole)
    save_file(content, made.file, metadata={"clme": json.dumps({"subject": "y"})})
    with pytest.raises(StudyError, match="its subject is 'y', expected 'x'; remove the file"):
        made.read()


def load_file_with(artifact, content):
    artifact.file.write_bytes(content)
    return load_file(artifact.file)


def test_a_changed_query_is_refused(llama):
    first = stored_queries(llama, ["Code:"], 2, "mean")
    (file,) = (loading.cache_dir() / "queries").glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StudyError, match=r"\.safetensors: .*SHA-256.*remove it"):
        stored_queries(llama, ["Code:"], 2, "mean")
    file.unlink()
    assert torch.equal(stored_queries(llama, ["Code:"], 2, "mean"), first)


@pytest.fixture
def converted(monkeypatch):
    """A converted embedded model, of a few bytes."""

    def fetch(folder):
        (folder / "weights.gguf").write_bytes(b"gguf")
        return folder / "weights.gguf"

    def convert(_, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(embedded, "_fetch_gguf", fetch)
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "GGUF_SHA256", embedded.hashlib.sha256(b"gguf").hexdigest())
    return embedded.ensure()


def test_the_converted_model_is_verified_whenever_it_is_used(converted):
    assert embedded.ensure() == converted
    embedded.verify(whole=True)
    changes = {
        "config.json": lambda file: file.write_text('{"rms_norm_eps": 0.1}'),
        "model.safetensors": lambda file: file.write_bytes(b"Weights"),
        "tokenizer.json": lambda file: file.write_text("{}"),
        embedded.MANIFEST: lambda file: file.write_text("{"),
    }
    for name, change in changes.items():
        file = converted / name
        before = file.read_bytes() if file.is_file() else None
        change(file)
        with pytest.raises(StudyError, match=f"{name}.*remove the folder .*again|{name}.*JSON"):
            embedded.ensure()
        file.unlink() if before is None else file.write_bytes(before)
        embedded.ensure()
    (converted / "config.json").unlink()
    with pytest.raises(StudyError, match="config.json: is missing; remove the folder"):
        embedded.ensure()


def test_large_files_are_read_when_they_changed_or_all_are_asked_for(converted, monkeypatch):
    monkeypatch.setattr(embedded, "_SMALL", 0)
    file = converted / "model.safetensors"
    state = file.stat()
    file.write_bytes(b"Weights")
    with pytest.raises(StudyError, match="changed since it was made"):
        embedded.verify()
    embedded.os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    embedded.verify()
    with pytest.raises(StudyError, match="changed since it was made"):
        embedded.verify(whole=True)


def test_a_conversion_without_manifest_is_known_or_refused(converted, monkeypatch):
    (converted / embedded.MANIFEST).unlink()
    with pytest.raises(
        StudyError, match="nothing shows that its files are unchanged since the conversion; remove the folder"
    ):
        embedded.ensure()
    hashes = [[file.name, embedded.file_sha256(file)] for file in sorted(converted.iterdir())]
    digest = embedded.hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    monkeypatch.setattr(embedded, "_CONVERTED_SHA256", digest)
    assert embedded.ensure() == converted and (converted / embedded.MANIFEST).is_file()


@pytest.fixture
def encoder(tmp_path):
    """A tiny BERT with the tests' tokenizer."""
    sizes = dict(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=32))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.mask_token = tokenizer.eos_token

    def save_as(model=model, **changes):
        model.save_pretrained(tmp_path / "encoder")
        tokenizer.save_pretrained(tmp_path / "encoder")
        file = tmp_path / "encoder" / "tokenizer_config.json"
        written = {
            name: value for name, value in {**json.loads(file.read_text()), **changes}.items() if value is not None
        }
        file.write_text(json.dumps(written))
        return str(tmp_path / "encoder")

    return save_as


def test_an_encoder_whose_tokenizer_gives_no_mask_has_one(encoder):
    texts = ["a", "sort the list `xs` in place and " * 9]
    whole = language_models.TextEncoder(encoder()).vectors(texts)
    plain = language_models.TextEncoder(encoder(model_input_names=["input_ids"])).vectors(texts)
    assert torch.equal(plain, whole)
    alone = language_models.TextEncoder(encoder()).vectors(texts[:1])
    assert torch.allclose(plain[:1], alone, atol=1e-5)


def test_unfit_encoders_are_refused(encoder):
    with pytest.raises(StudyError, match="no pad token"):
        language_models.TextEncoder(encoder(pad_token=None))
    with pytest.raises(StudyError, match="lack cls.predictions"):
        language_models.MaskedNames(encoder())
    fnet = transformers.FNetModel(
        transformers.FNetConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    )
    with pytest.raises(StudyError, match="FNetModel, which takes no attention_mask"):
        language_models.TextEncoder(encoder(fnet))


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_card_that_is_none_is_refused(encoder, content):
    folder = encoder()
    (Path(folder) / "1_Pooling").mkdir()
    (Path(folder) / "1_Pooling" / "config.json").write_text(content)
    with pytest.raises(StudyError, match="config.json: "):
        language_models.card_pooling(folder)


def _doctor(capsys):
    status = cli.main(["doctor"])
    return status, capsys.readouterr().out


def test_the_doctor_tells_what_is_wrong(converted, capsys, monkeypatch):
    status, report = _doctor(capsys)
    assert status == 0 and "WRONG" not in report
    for what in (
        "Python",
        "torch",
        "memory",
        "cache",
        "smollm2-135m",
        "smollm2-135m-code",
        "CNLE",
        "CSNE",
        "packages",
        "browser",
    ):
        assert f"ok    {what}: " in report
    (converted / "config.json").write_text("[]")
    status, report = _doctor(capsys)
    assert status == 1 and re.search("WRONG smollm2-135m: .*config.json.*remove the folder", report)
    embedded.shutil.rmtree(converted)
    status, report = _doctor(capsys)
    assert status == 0 and "ok    smollm2-135m: not there yet" in report


def test_the_doctor_compares_packages(capsys, monkeypatch):
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "0.1" if name == "pydantic" else version(name)
    )
    status, report = _doctor(capsys)
    assert status == 1 and re.search(
        r"WRONG packages: pydantic 0\.1 \(pinned: .*pip install -c constraints.txt", report
    )


def test_the_doctor_finds_a_cache_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    registry._load.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "file" / "cache"))
    status, report = _doctor(capsys)
    assert status == 1 and re.search("WRONG cache: .*file/cache cannot be written to .*set CLME_CACHE", report)


def test_the_page_says_which_revisions_are_pinned():
    page = (Path(__file__).parents[1] / "book" / "reproducing.md").read_text(encoding="utf-8")
    for name in list_subjects():
        source = load_settings(name).subject
        if source.source == "hub":
            (row,) = [line for line in page.splitlines() if line.startswith("|") and f"`{source.id}`" in line]
            pinned = re.fullmatch("[0-9a-f]{40}", source.revision)
            assert f"commit `{source.revision[:12]}`" in row if pinned else "not pinned" in row


def _index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), r"index\.json: its weight_map must name"),
        (lambda folder: _index(folder, "{"), r"index\.json: .*JSON"),
        (lambda folder: _index(folder, "[]"), r"index\.json: not a JSON object"),
        (lambda folder: _index(folder, "{}"), r"index\.json: its weight_map"),
        (lambda folder: _index(folder, '{"weight_map": {"lm_head.weight": "other.safetensors"}}'), r"its weight_map"),
        (lambda folder: (folder / "special_tokens_map.json").write_text('{"eos_token": "<nope>"}'), "has token 320"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer_config.json: "),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(tmp_path, llama, spoil, message):
    llama.model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    llama.tokenizer.save_pretrained(tmp_path / "model")
    load_subject(str(tmp_path / "model"), "cpu")
    spoil(tmp_path / "model")
    with pytest.raises(StudyError, match=message):
        load_subject(str(tmp_path / "model"), "cpu")
