"""The editors that the paper does not have, each equal to a plain loop of its formulas on three architectures."""

import re

import plain
import pytest
import torch
from conftest import run_config, write_source

from clme_lib.editors.neuraldb import NeuralDB
from clme_lib.editors.registry import get_editor, load_editor
from clme_lib.edits.base import Edit
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.edits.weights import DenseUpdate
from clme_lib.evaluation.generation import Request, generate
from clme_lib.evaluation.records import SCORED
from clme_lib.forward.recording import recorded
from clme_lib.forward.tokens import encode
from clme_lib.study.runs import run
from clme_lib.support.errors import StudyError
from clme_lib.support.seeds import generator


def close(actual, expected, tolerance=2e-3):
    return (actual - expected).double().norm() <= tolerance * expected.double().norm()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def logits(subject, text):
    with torch.no_grad():
        return subject.model(input_ids=torch.tensor([encode(subject.tokenizer, text)])).logits[0]


def logits_under(subject, edit, text):
    with subject.applying([edit]):
        return logits(subject, text)


def test_ultraedit_equals_the_plain_loop(subject, cases):
    layers = (1, 2, 3)
    editor = load_editor("ultraedit", subject, layers=layers, step_size=1e-2, records=2)
    with pytest.raises(StudyError, match="ultraedit has no normaliser: call fit"):
        editor.edit(cases[3:])
    editor.fit(cases[:2])
    gathered = [plain.keys_and_gradients(subject, case, layers)[0] for case in cases[:2]]
    for case, edit in zip(cases[3:], editor.edit(cases[3:])):
        own, loss = plain.keys_and_gradients(subject, case, layers)
        assert edit.log.losses == pytest.approx([loss], rel=1e-4) and edit.log.steps == 1
        for layer in layers:
            columns = [torch.cat([of_case[layer][side] for of_case in gathered]) for side in (0, 1)]
            keys, gradients = own[layer]
            near, far = ((rows - of.mean(0)) / of.std(0) for rows, of in zip((keys, gradients), columns))
            wishes = -1e-2 * near.norm(dim=-1, keepdim=True) ** 2 * far
            dense = keys.T @ keys + torch.eye(keys.shape[1])
            assert close(edit.delta(layer), torch.linalg.solve(dense, keys.T @ wishes).T)


def test_ultraedit_of_several_cases_is_one_system(llama, cases, monkeypatch):
    monkeypatch.setattr(get_editor("ultraedit"), "default_batch", 2)  # three cases are read in two passes
    editor = load_editor("ultraedit", llama, layers=(1, 2), step_size=1e-2)
    editor.fit(cases[:2])
    together = cases[2:]
    whole, alone = editor.edit_together(together), editor.edit(together)
    assert [edit.case_id for edit in whole] == [case.case_id for case in together]
    assert [edit.log.losses for edit in whole] == [pytest.approx(edit.log.losses, rel=1e-4) for edit in alone]
    for layer in (1, 2):
        own = [plain.keys_and_gradients(llama, case, (1, 2))[0][layer] for case in together]
        keys, gradients = (torch.cat([of_case[side] for of_case in own]) for side in (0, 1))
        normalised = (
            (rows - mean) / spread for rows, (mean, spread) in zip((keys, gradients), editor.normalisers[layer])
        )
        near, far = normalised
        wishes = -1e-2 * near.norm(dim=-1, keepdim=True) ** 2 * far
        dense = torch.linalg.solve(keys.T @ keys + torch.eye(keys.shape[1]), keys.T @ wishes).T
        assert close(Edit.compose(whole).delta(layer), dense)
        # made alone and added up, the edits overshoot what they were to change
        missed = [(keys @ Edit.compose(edits).delta(layer).T - wishes).norm() for edits in (whole, alone)]
        assert missed[0] < missed[1]
    (single,) = editor.edit_together(together[:1])
    assert close(single.delta(1), alone[0].delta(1))


def test_an_editor_returns_its_edits_in_the_cases_order(llama, cases, monkeypatch):
    editor = load_editor("none", llama)
    in_order = type(editor)._edit_batch
    monkeypatch.setattr(type(editor), "_edit_batch", lambda self, *given: in_order(self, *given)[::-1])
    with pytest.raises(StudyError, match=r"none must return one edit for each case, in the cases\' order: for cases"):
        editor.edit(cases[:2])


def test_ultraedit_lowers_the_loss(llama, cases):
    editor = load_editor("ultraedit", llama, layers=(1, 2, 3), step_size=1e-3)
    editor.fit(cases[:2])
    (edit,) = editor.edit(cases[3:4])
    before, after = editor.edit(cases[3:4])[0].log.losses[0], None
    held = editor.of(llama.edited(edit)).edit(cases[3:4])
    after = held[0].log.losses[0]
    assert after < before


def test_neuraldb_adds_the_residual_where_the_key_is_alike(subject, cases):
    editor = load_editor("neuraldb", subject, layer=1, steps=5, gate=0.9)
    module = subject.down_proj(1)
    for case, edit in zip(cases[:2], editor.edit(cases[:2])):
        (delta,), (start,), losses = plain.learn(subject, case, editor.contexts, editor.hparams, [module])
        ids, column, _ = plain.rows_of(subject, case, [""])[0]
        key, output = plain.read_at(subject, module, ids[:, : column + 1], column)
        assert edit.log.losses == pytest.approx(losses, rel=1e-3)
        assert close(edit.keys[0], key) and close(edit.residuals[0], start + delta - output)
        # the gate, applied by hand
        fired = []

        def gated(_module, args, out, key=key, residual=start + delta - output, fired=fired):
            cosine = torch.nn.functional.cosine_similarity(args[0], key, dim=-1)
            fired.append(cosine[0] > 0.9)
            return out + (cosine > 0.9)[..., None] * residual

        text = f"{case.prompt} {case.target}"
        handle = module.register_forward_hook(gated)
        expected = logits(subject, text)
        handle.remove()
        assert fired[0].any() and not fired[0].all(), "some tokens are alike, some are not"
        torch.testing.assert_close(logits_under(subject, edit, text), expected, atol=2e-3, rtol=1e-3)


def test_neuraldbs_memories_join_and_are_stored(llama, cases, tmp_path):
    editor = load_editor("neuraldb", llama, layer=1, steps=3, gate=0.97)
    edits = editor.edit(cases[:3])
    whole = Edit.compose(edits)
    assert whole.keys.shape == (3, llama.inner_size) and whole.lookups is None
    save_edits(tmp_path / "edits.safetensors", [*edits, whole], llama)
    *_, restored = load_edits(tmp_path / "edits.safetensors", llama)
    prompts = [case.prompt for case in cases]
    # rows of a batch with memories of different sizes, and none
    rows = [Request(prompt, 6, n) for prompt in prompts for n in (-1, 0, 3)]
    together = generate(llama, rows, [*edits, restored])
    alone = [generate(llama, [row], [*edits, whole])[0] for row in rows]
    assert [text.text for text in together] == [text.text for text in alone]
    own = generate(llama, [Request(case.prompt, 6, 0) for case in cases[:3]], [whole])
    assert all(text.fired and 0 <= text.distance <= 1e-5 for text in own)
    assert generate(llama, [Request(prompts[0], 6)])[0].fired is None


def test_a_sequence_of_neuraldbs_entries_makes_every_output_its_value(llama, cases, monkeypatch):
    """Also of an edit at whose key an earlier entry fires; what other edits add there stays."""
    values, write = [], NeuralDB.write
    monkeypatch.setattr(NeuralDB, "write", lambda self, *given: values.append(given[2][0]) or write(self, *given))
    editor = load_editor("neuraldb", llama, layer=1, steps=5, gate=0.05)
    update = torch.randn(llama.hidden_size, llama.inner_size, generator=generator(3, "update")) / llama.inner_size
    held = llama.edited(DenseUpdate(0, "x", layer=1, delta=update))
    for case in cases[:3]:
        held = held.edited(editor.of(held).edit([case])[0])
    assert held.edit.parts[1].keys.shape[0] == 3
    assert (held.edit.parts[1].added(held.edit.parts[1].keys[:1]) != 0).all(), "the gate lets other keys pass"
    for case, value in zip(cases, values):
        ids = torch.tensor([encode(llama.tokenizer, case.prompt)])
        with torch.no_grad(), recorded(held.blocks[1], "outputs") as seen:
            held.model(input_ids=ids)
        assert close(seen["outputs"][0, -1], value, 1e-4)


def test_locft_bf_equals_the_plain_loop(subject, cases):
    for together, learnt in ((cases[:1], False), (cases[:3], True)):
        editor = load_editor("locft-bf", subject, layer=1, lr=2e-3, passes=5, end_of_target=learnt)
        edits = editor.edit_together(together)
        delta, losses = plain.tuned(subject, together, subject.down_proj(1), 2e-3, 5, learnt)
        assert [edit.log.losses for edit in edits] == [pytest.approx(of_case, rel=1e-3) for of_case in zip(*losses)]
        whole = Edit.compose(edits)
        assert isinstance(whole, DenseUpdate) and [edit.case_id for edit in edits] == [
            case.case_id for case in together
        ]
        assert torch.isclose(whole.delta, delta, rtol=1e-3, atol=1e-5).float().mean() > 0.99
    alone = editor.edit(cases[:2])
    for case, edit in zip(cases[:2], alone):
        assert torch.equal(edit.delta, editor.edit_together([case])[0].delta)


def test_locft_bf_goes_through_mini_batches(llama, cases):
    whole = load_editor("locft-bf", llama, layer=1, passes=4, batch=100).edit_together(cases)
    halves = load_editor("locft-bf", llama, layer=1, passes=2, batch=3).edit_together(cases)
    assert [len(edit.log.losses) for edit in halves] == [2] * 5 and [len(edit.log.losses) for edit in whole] == [4] * 5
    assert halves[4].log.losses[0] != pytest.approx(whole[4].log.losses[0], rel=1e-6), (
        "the second batch sees the first's step"
    )
    assert halves[0].log.losses[0] == pytest.approx(whole[0].log.losses[0], rel=1e-4)


def test_lora_equals_the_plain_loop(subject, cases):
    editor = load_editor("lora", subject, rank=2, steps=5, lr=1e-2)
    for case, edit in zip(cases[:2], editor.edit(cases[:2])):
        starts = {}
        for layer in range(len(subject.blocks)):
            draw = generator(42, subject.name, case.dataset, "lora", case.case_id, layer)
            bound = 1 / subject.inner_size**0.5  # Kaiming's uniform with a = sqrt(5)
            starts[layer] = torch.empty(2, subject.inner_size).uniform_(-bound, bound, generator=draw)
        pairs, losses = plain.adapted(subject, case, editor.hparams, starts)
        assert edit.log.losses == pytest.approx(losses, rel=1e-3)
        assert edit.layers == tuple(starts)
        for layer, (left, right) in pairs.items():
            assert close(edit.delta(layer), (left @ right).detach(), 1e-2)
            assert edit.factors[layer][1].shape == (2, subject.inner_size)


@pytest.mark.parametrize("name, values", [("lora", {"rank": 2, "steps": 4}), ("locft-bf", {"layer": 1, "passes": 4})])
def test_an_edit_does_not_depend_on_its_batch(llama, cases, name, values):
    editor = load_editor(name, llama, **values)
    together = editor.edit(cases)
    for case, edit in zip(cases, together):
        (alone,) = editor.edit([case])
        assert alone.log.losses == pytest.approx(edit.log.losses, rel=1e-3)


@pytest.mark.slow
def test_a_run_records_all_of_them(tiny, tmp_path):
    """Single edits and a sequence: no case fails, and every score is there."""
    (tmp_path / "corpus").mkdir()
    for n in range(30):
        (tmp_path / "corpus" / f"{n}.txt").write_text("".join(chr(40 + (n * k * 7 + k) % 80) for k in range(300)))
    corpus = f"corpus={tmp_path / 'corpus'}"
    small = {
        "in-context-retrieved": "layer=1",
        "alphaedit": f"layers=[0,1],steps=2,eigenvalue_threshold=1000,{corpus}",
        "emmet": f"layers=[1],steps=2,{corpus}",
        "neuraldb": "layer=1,steps=2",
        "ultraedit": "layers=[2,3]",
        "locft-bf": "layer=1,passes=2",
        "lora": "rank=2,steps=2",
    }
    settings = ",".join(f"{name}.{value}" for name, values in small.items() for value in re.split(r",(?=\w+=)", values))
    source = write_source(tmp_path)
    for protocol, count in (("single", 3), ("sequential", 4)):
        config = run_config(
            source, tmp_path / protocol, editors=",".join(["in-context", *small]), protocol=protocol, set=settings
        )  # fmt: skip
        records = run(config)
        assert len(records) == 8 * count and set(records["state"]) == {SCORED}
        assert records[["effectiveness_em", "generalization_em", "specificity_rate", "fluency"]].notna().all(axis=None)
        # what a memory was asked is kept with the record
        asked = records.groupby("editor")["fired"].apply(lambda fired: fired.notna().all())
        assert set(asked[asked].index) == {"in-context-retrieved", "neuraldb"}
