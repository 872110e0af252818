"""Edits as values: every kind acts like its definition, row by row, in prompts and in decoding."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from clme_lib.edits.base import EditLog, Unedited
from clme_lib.edits.codebooks import AdditiveCodebook, Codebook
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.edits.weights import DenseUpdate, LowRankUpdate
from clme_lib.evaluation.generation import Request, generate
from clme_lib.forward.tokens import encode
from clme_lib.support.errors import StudyError


def low_rank(subject, seed, rank=2, layers=(1, 3)):
    draw = torch.Generator().manual_seed(seed)
    d, f = subject.hidden_size, subject.inner_size
    factors = {
        layer: (torch.randn(d, rank, generator=draw) * 0.3, torch.randn(rank, f, generator=draw) * 0.3)
        for layer in layers
    }
    return LowRankUpdate(
        seed,
        "test",
        factors={k: (a.to(subject.device), b.to(subject.device)) for k, (a, b) in factors.items()},
    )


def dense(subject, seed):
    draw = torch.Generator().manual_seed(seed)
    delta = torch.randn(subject.hidden_size, subject.inner_size, generator=draw) * 0.2
    return DenseUpdate(seed, "test", layer=2, delta=delta.to(subject.device))


def with_weights(subject, updates, ids):
    """Logits of the model with its weights really changed, and changed back."""
    saved = {layer: subject.down_proj(layer).weight.data.clone() for layer in updates}
    try:
        for layer, delta in updates.items():
            subject.down_proj(layer).weight.data += delta
        return subject.model(input_ids=ids).logits
    finally:
        for layer, weight in saved.items():
            subject.down_proj(layer).weight.data.copy_(weight)


def test_weight_updates_equal_changed_weights(subject):
    ids = torch.tensor([[5, 9, 17, 40, 3]], device=subject.device)
    for edit, updates in (
        (low_rank(subject, 1), {layer: low_rank(subject, 1).delta(layer) for layer in (1, 3)}),
        (dense(subject, 2), {2: dense(subject, 2).delta}),
    ):
        with subject.applying([edit]):
            edited = subject.model(input_ids=ids).logits
        assert torch.allclose(edited, with_weights(subject, updates, ids), atol=1e-4)
        assert not torch.allclose(edited, subject.model(input_ids=ids).logits, atol=1e-2)


def test_rows_of_one_batch_belong_to_different_models(subject):
    ids = torch.tensor([[5, 9, 17]] * 4, device=subject.device)
    edits = [low_rank(subject, 1), dense(subject, 2), low_rank(subject, 3, rank=1, layers=(2,))]
    with subject.applying(edits, rows=[2, -1, 1, 0]):
        mixed = subject.model(input_ids=ids).logits
    for row, edit in ((0, edits[2]), (2, edits[1]), (3, edits[0])):
        with subject.applying([edit]):
            assert torch.allclose(mixed[row], subject.model(input_ids=ids[:1]).logits[0], atol=1e-4)
    assert torch.allclose(mixed[1], subject.model(input_ids=ids[:1]).logits[0], atol=1e-4)


def test_rows_must_fit_the_batch(llama):
    with pytest.raises(StudyError, match="2 edits for a batch of 3"):
        with llama.applying([dense(llama, 1), dense(llama, 2)]):
            llama.model(input_ids=torch.tensor([[1, 2]] * 3, device=llama.device))
    with pytest.raises(StudyError, match="rows= must name edits"), llama.applying([dense(llama, 1)], rows=[1]):
        pass


def codebook(subject, prompt, radius=1.0, value=5.0):
    """A codebook whose key is the prompt's own query and whose value is a constant vector."""
    seen = {}
    handle = subject.down_proj(2).register_forward_hook(lambda _m, args, _o: seen.update(key=args[0][0, -1].clone()))
    ids = subject.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(subject.device)
    subject.model(input_ids=ids)
    handle.remove()
    values = torch.full((1, subject.hidden_size), value, device=subject.device)
    radii = torch.tensor([radius], device=subject.device)
    return Codebook(7, "grace", layer=2, keys=seen["key"][None].float(), values=values, radii=radii)


@pytest.mark.parametrize("pads", [0, 1, 5])
def test_codebook_replaces_the_last_real_column_alone(subject, pads):
    prompt = "Intent: sort it\nCode:"
    edit = codebook(subject, prompt)
    ids = subject.tokenizer(prompt, add_special_tokens=False).input_ids
    row = torch.tensor([[0] * pads + ids], device=subject.device)
    mask = torch.tensor([[0] * pads + [1] * len(ids)], device=subject.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = {}
    with subject.applying([edit]) as state:
        handle = subject.down_proj(2).register_forward_hook(lambda _m, _a, out: outputs.update(out=out))
        subject.model(input_ids=row, attention_mask=mask, position_ids=positions)
        handle.remove()
    assert [bool(lookup.fired[0]) for lookup in state.lookups] == [True]
    assert state.lookups[0].distances[0] < 1e-3 * edit.keys.norm()
    assert torch.equal(outputs["out"][0, -1], edit.values[0])
    assert not torch.isclose(outputs["out"][0, :-1], edit.values[0]).any()


def test_codebook_is_consulted_in_every_step(subject):
    prompt = "Intent: sort it\nCode:"
    with subject.applying([codebook(subject, prompt)]) as state:
        ids = subject.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(subject.device)
        out = subject.model.generate(**ids, max_new_tokens=6, min_new_tokens=6)
    steps = out.shape[1] - ids.input_ids.shape[1]
    assert [lookup.phase for lookup in state.lookups] == ["prefill"] + ["decode"] * (steps - 1)


def test_radius_decides_what_a_codebook_touches(subject):
    """A radius of 1 leaves other prompts alone; one that reaches them changes what they write."""
    prompts = ["Intent: sort it\nCode:", "Intent: open the file\nCode:"]
    requests = [Request(prompt, 8, 0) for prompt in prompts]
    plain = generate(subject, [Request(prompt, 8) for prompt in prompts])
    narrow = generate(subject, requests, [codebook(subject, prompts[0], radius=1e-3)])
    wide = generate(subject, requests, [codebook(subject, prompts[0], radius=1e6)])
    assert [lookup.fired for lookup in narrow] == [True, False]
    assert narrow[1].text == plain[1].text
    assert narrow[1].distance > 1e-3
    assert [lookup.fired for lookup in wide] == [True, True]
    assert wide[1].text != plain[1].text


def test_nearest_key_decides(llama):
    entry = codebook(llama, "Intent: sort it\nCode:")
    far = entry.keys + 0.5 / entry.keys.shape[1] ** 0.5
    both = Codebook(7, "grace", layer=2, keys=torch.cat([far, entry.keys]), values=torch.cat([-entry.values, entry.values]),
                    radii=torch.tensor([10.0, 1e-2], device=llama.device))  # fmt: skip
    ids = llama.tokenizer("Intent: sort it\nCode:", add_special_tokens=False, return_tensors="pt").input_ids.to(
        llama.device
    )
    with llama.applying([both]):
        nearest = llama.model(input_ids=ids).logits
    with llama.applying([entry]):
        assert torch.allclose(nearest, llama.model(input_ids=ids).logits, atol=1e-5)


def test_save_and_load(llama, tmp_path):
    log = EditLog(steps=3, losses=(2.0, 1.0), seconds=0.5, batch=2, peak_memory_mib=9.0, initial_sha256="ab")
    edits = [Unedited(0, "none"), low_rank(llama, 1), dense(llama, 2), codebook(llama, "Intent: a\nCode:")]
    edits.append(Unedited(9, "none", log=log))
    path = tmp_path / "edits.safetensors"
    save_edits(path, edits, llama)
    loaded = load_edits(path, llama)
    assert [type(edit) for edit in loaded] == [type(edit) for edit in edits]
    assert [edit.case_id for edit in loaded] == [edit.case_id for edit in edits]
    assert loaded[-1].log == log
    for edit, restored in zip(edits, loaded):
        for a, b in zip(edit.tensors().values(), restored.tensors().values()):
            assert torch.equal(a.cpu(), b)


def test_loading_refuses_what_does_not_fit(llama, subject, tmp_path):
    path = tmp_path / "edits.safetensors"
    save_edits(path, [dense(llama, 2)], llama)
    stranger = type(llama)("other", llama.model, llama.tokenizer, llama.settings, "another fingerprint")
    with pytest.raises(StudyError, match="were made for tiny-llama"):
        load_edits(path, stranger)
    save_edits(path, [dense(llama, 2)], llama.edited(low_rank(llama, 1)))
    with pytest.raises(StudyError, match="made for tiny-llama with another edit in it, and do not include that"):
        load_edits(path, llama)
    save_file({"x": torch.zeros(1)}, path, metadata={"clme": json.dumps({"format": "else"})})
    with pytest.raises(StudyError, match="not a clme-edits file"):
        load_edits(path, llama)
    path.write_bytes(b"not safetensors")
    with pytest.raises(StudyError, match="cannot be read"):
        load_edits(path, llama)
    wrong = DenseUpdate(3, "test", layer=2, delta=torch.zeros(2, 2))
    with pytest.raises(StudyError, match="does not fit"), llama.applying([wrong]):
        pass


@pytest.mark.parametrize("kind", [Codebook, AdditiveCodebook])
def test_a_memory_that_all_rows_share_acts_as_in_each_row(subject, kind):
    """It is not copied for every row, and beside another memory it is looked up in another way."""
    ids = torch.tensor([[5, 9, 17], [40, 3, 8], [17, 9, 5]], device=subject.device)
    seen = []
    with subject.down_proj(2).register_forward_hook(lambda _module, args, _output: seen.append(args[0])) as hook:
        subject.model(input_ids=ids)
        hook.remove()
    keys = seen[0][:, -1] * torch.tensor([[1.0], [1.001], [-1.0]], device=subject.device)
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(3, subject.hidden_size, generator=draw).to(subject.device)
    entries = {
        Codebook: {"values": values, "radii": 0.01 * keys.norm(dim=-1)},
        AdditiveCodebook: {"residuals": values, "gates": torch.full((3,), 0.9999, device=subject.device)},
    }
    edit = kind(1, "test", layer=2, keys=keys, **entries[kind])
    with subject.applying([edit]):
        shared = subject.model(input_ids=ids).logits
    with subject.applying([edit, replace(edit, case_id=2)], rows=[0, 1, 0]):
        apart = subject.model(input_ids=ids).logits
    unedited = subject.model(input_ids=ids).logits
    assert torch.allclose(shared, apart, atol=1e-5)
    changed = [not torch.allclose(shared[row, -1], unedited[row, -1], atol=1e-3) for row in range(3)]
    assert changed == [True, True, False]


def test_an_edit_that_stands_for_several_rows_is_stacked_once(subject, monkeypatch):
    """A state of many edits is evaluated on many cases: its factors are not copied for each."""
    edit, other = low_rank(subject, 1), low_rank(subject, 2)
    ids = torch.tensor([encode(subject.tokenizer, "Intent: sort it\nCode:")] * 4)
    stack, seen = LowRankUpdate.stack.__func__, []
    monkeypatch.setattr(
        LowRankUpdate, "stack", classmethod(lambda cls, edits, *of: seen.append(len(edits)) or stack(cls, edits, *of))
    )
    logits = {}
    for name, edits in {
        "same": [edit] * 4,
        "copies": [replace(edit) for _ in range(4)],
        "mixed": [edit, other, edit, edit],
    }.items():
        with subject.applying(edits), torch.no_grad():
            logits[name] = subject.model(input_ids=ids).logits
    assert seen == [1, 1, 4, 4, 2, 2], "in each of two layers"
    torch.testing.assert_close(logits["same"], logits["copies"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["same"][0], logits["mixed"][0], atol=1e-5, rtol=1e-5)
