"""Edits compose, and a subject that was edited for good is a subject: editing it again is editing a model whose weights were changed."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_subject
from test_edits import codebook, dense, low_rank

from clme_lib.editors.locate_then_edit.contexts import context_templates
from clme_lib.editors.registry import load_editor
from clme_lib.edits.base import Composite, Edit, EditLog, Unedited
from clme_lib.edits.codebooks import Codebook, PromptCodebook
from clme_lib.edits.encoder import Encoder
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.edits.weights import DenseUpdate, LowRankUpdate
from clme_lib.evaluation import unedited
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.generation import Request, generate
from clme_lib.forward.blockwise import Blockwise
from clme_lib.forward.partial import PartialForward
from clme_lib.forward.prompt_keys import prompt_queries
from clme_lib.forward.tokens import encode, tokenize

PROMPT = "Intent: sort it\nCode:"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def fresh():
    """A subject of its own, so that no other test's hooks are seen."""
    return make_subject("llama")


def weights_of(subject):
    return {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}


def really_changed(subject, edit):
    """A subject whose weights were changed by an update; what editors gather beforehand is the unchanged one's, as for an edited subject."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for layer, delta in edit.deltas().items():
            model.model.layers[layer].mlp.down_proj.weight += delta
    return replace(subject, model=model, fingerprint="changed", loaded=subject)


def logits(subject, prompt=PROMPT):
    ids = torch.tensor([encode(subject.tokenizer, prompt)], device=subject.device)
    with torch.no_grad():
        return subject.model(input_ids=ids).logits[0]


def prompt_codebook(subject, prompts, values=(5.0, -5.0), radius=1.0, query="mean", encoder=None, layer=2):
    keys = prompt_queries(subject, prompts, layer)[query]
    keys = keys if encoder is None else encoder(keys)
    rows = torch.stack([torch.full((subject.hidden_size,), value) for value, _ in zip(values, prompts)])
    radii = torch.full((len(prompts),), radius)
    return PromptCodebook(
        3, "a-grace", layer=layer, keys=keys, values=rows.to(keys), radii=radii.to(keys), query=query, encoder=encoder
    )


EDITORS = {
    "grace": {"layer": 1, "steps": 6, "radius": 3.0},
    "rome": {"layer": 1, "steps": 5},
    "ft-l": {"layer": 1, "steps": 4, "lr": 2e-3, "bound": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize("base", [low_rank, dense])
@pytest.mark.parametrize("name", EDITORS)
def test_editing_an_edited_subject_is_editing_changed_weights(subject, cases, name, base):
    """Losses, edits and everything that is generated; the base edits change layers above, at and below the new one's."""
    edit, cases = base(subject, 3), cases[:2]
    before = weights_of(subject)
    edited, changed, plain = subject.edited(edit), really_changed(subject, edit), subject
    if name == "rome":
        assert load_editor(name, edited).contexts == context_templates(plain, 42) != context_templates(edited, 42)
    made = {}
    for what in (edited, changed, plain):
        made[what] = load_editor(name, what, **EDITORS[name]).edit(cases)
    first_losses = [[edit.log.losses[0] for edit in edits] for edits in made.values()]
    assert first_losses[0] != pytest.approx(first_losses[2], rel=1e-2), "the base edit matters"
    for ours, theirs in zip(made[edited], made[changed]):
        assert ours.log.losses == pytest.approx(theirs.log.losses, rel=1e-4)
        for tensor, expected in zip(ours.tensors().values(), theirs.tensors().values()):
            if name == "ft-l":  # a sign search: entries, not norms, agree
                assert torch.isclose(tensor, expected, rtol=1e-3, atol=1e-6).float().mean() >= 0.999
            else:
                assert (tensor - expected).double().norm() <= 1e-3 * expected.double().norm()
    scored = [evaluate(what, cases, made[what]) for what in (edited, changed)]
    for column in (column for column in scored[0] if column.startswith("generated_")):
        assert scored[0][column].tolist() == scored[1][column].tolist()
    assert all(torch.equal(before[key], tensor) for key, tensor in weights_of(subject).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


@pytest.mark.parametrize("base", [low_rank, dense])
@pytest.mark.parametrize("name", ["memit", "pmet", "malmen", "a-grace-wo-cl"])
def test_every_editor_takes_an_edited_subject(fresh, cases, tmp_path, base, name):
    for n in range(30):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{n}.txt").write_text("".join(chr(40 + (n * k * 7 + k) % 80) for k in range(300)))
    corpus = {"corpus": str(tmp_path / "corpus"), "steps": 4}
    options = {
        "memit": {"layers": [0, 1], **corpus},
        "pmet": {"layers": [1, 2], **corpus},
        "malmen": {"layers": [1, 2, 3], "rank": 8, "iterations": 3},
        "a-grace-wo-cl": {"layer": 1, "steps": 4},
    }[name]
    edit = base(fresh, 3)
    made = []
    for subject in (fresh.edited(edit), really_changed(fresh, edit)):
        editor = load_editor(name, subject, **options)
        editor.fit(cases[:3])
        made.append(editor.edit(cases[3:]))
    for ours, theirs in zip(*made):
        assert ours.log.losses == pytest.approx(theirs.log.losses, rel=1e-3)
        for tensor, expected in zip(ours.tensors().values(), theirs.tensors().values()):
            assert (tensor - expected).double().norm() <= 1e-2 * expected.double().norm()


def test_what_was_gathered_or_learnt_before_is_not_gathered_again(fresh, cases, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    for n in range(30):
        (tmp_path / "corpus" / f"{n}.txt").write_text("".join(chr(40 + (n * k * 7 + k) % 80) for k in range(300)))
    options = {
        "memit": {"layers": [0, 1], "steps": 2, "corpus": str(tmp_path / "corpus")},
        "malmen": {"layers": [1, 2, 3], "rank": 8, "iterations": 2},
        "a-grace": {"layer": 1, "steps": 2, "epochs": 2},
    }
    edited = fresh.edited(low_rank(fresh, 3)).edited(low_rank(fresh, 2))
    assert edited.original is fresh
    before = {}
    for subject in (fresh, edited):
        for name, values in options.items():
            editor = load_editor(name, subject, **values)
            editor.fit(cases[:3])
            editor.edit(cases[3:])
        kept = {str(file) for file in (tmp_path / "cache").rglob("*.safetensors") if "queries" not in str(file)}
        before.setdefault("files", kept)
    assert kept == before["files"] and len(kept) == 4  # two moments, a network, an encoder


def test_a_subject_is_edited_in_order_and_shares_its_weights(fresh):
    first, second = low_rank(fresh, 1), codebook(fresh, PROMPT)
    once, together = fresh.edited(first), fresh.edited(Edit.compose([first, second]))
    with fresh.applying([dense(fresh, 9)]):
        twice = once.edited(second)  # whatever is applied just now
    with fresh.applying([Edit.compose([first, second])]):
        expected = logits(fresh)
    with once.applying([second]):
        assert torch.allclose(logits(once), expected, atol=1e-5)
    assert not torch.allclose(logits(once), expected, atol=1e-2)
    assert torch.allclose(logits(twice), expected, atol=1e-5) and torch.allclose(logits(together), expected, atol=1e-5)
    assert not torch.allclose(logits(fresh), expected, atol=1e-2)
    theirs = dict(fresh.model.named_parameters())
    assert all(parameter.data_ptr() == theirs[name].data_ptr() for name, parameter in twice.model.named_parameters())
    assert [part.kind for part in twice.edit.parts] == ["low-rank", "codebook"]


def test_fingerprints_name_base_and_edit(fresh):
    edits = [low_rank(fresh, 1), low_rank(fresh, 2), dense(fresh, 1), codebook(fresh, PROMPT), Unedited(0, "none")]
    edits.append(replace(codebook(fresh, PROMPT), radii=torch.tensor([0.5])))
    edits += [Edit.compose([edits[0], edits[2]]), Edit.compose([edits[2], edits[0]])]
    names = [fresh.edited(edit).fingerprint for edit in edits]
    assert len({fresh.fingerprint, *names}) == 1 + len(names)
    assert all(name.startswith(f"{fresh.fingerprint}+edit-sha256:") for name in names)
    assert fresh.edited(edits[0]).edited(edits[2]).fingerprint == names[6] != names[7], "order counts"
    again = replace(low_rank(fresh, 1), case_id=9, editor="else", log=EditLog(steps=3))
    assert fresh.edited(again).fingerprint == names[0], "who made it and how is no part of what it does"


def test_caches_of_an_edited_subject_are_its_own(fresh, cases):
    edited = fresh.edited(low_rank(fresh, 1))
    prompts = [prompt for case in cases for prompt in case.unrelated]
    before = unedited.answers_for(fresh, prompts)
    assert unedited.answers_for(edited, prompts) != before == unedited.answers_for(fresh, prompts)
    assert unedited.answers_for(edited, prompts) == [
        output.text for output in generate(edited, [Request(prompt, 16) for prompt in prompts])
    ]
    with pytest.raises(Exception, match="were made for tiny-llama"):
        save_edits(cases_file := unedited.cache_dir() / "edits.safetensors", [dense(fresh, 1)], fresh)
        load_edits(cases_file, edited)


def decoded_losses(subject, case):
    """Mean cross-entropy of the target's tokens when the model reads the prompt and then writes the target token by token."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    cache, losses, ids = None, [], list(tokens.prompt_ids)
    with torch.no_grad():
        for label in tokens.target_ids:
            done = subject.model(
                input_ids=torch.tensor([ids], device=subject.device), past_key_values=cache, use_cache=True
            )
            losses.append(-done.logits[0, -1].float().log_softmax(-1)[label])
            cache, ids = done.past_key_values, [label]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("from_lookup", [True, False])
def test_codebooks_act_in_training_passes_as_they_do_in_generation(fresh, cases, layer, from_lookup):
    """GRACE's is asked at every token that is written, A-GRACE's once a prompt; rows differ in length and in what fires."""
    tokenized = [tokenize(fresh.tokenizer, case.prompt, case.target) for case in cases]
    every = replace(codebook(fresh, cases[0].prompt, radius=1e6), values=torch.full((1, fresh.hidden_size), 0.5))
    for book in (every, prompt_codebook(fresh, [cases[1].prompt, cases[3].prompt], radius=0.1),
                 prompt_codebook(fresh, [cases[1].prompt, cases[3].prompt], radius=1.0, query="last")):  # fmt: skip
        edited = fresh.edited(Edit.compose([low_rank(fresh, 1), book]))
        expected = torch.stack([decoded_losses(edited, case) for case in cases])
        assert not torch.allclose(expected, torch.stack([decoded_losses(fresh, case) for case in cases]), rtol=1e-2)
        forward = PartialForward(edited, tokenized, layer, from_lookup=from_lookup)
        assert torch.allclose(forward.losses(forward.outputs), expected, rtol=1e-4)
        some = torch.tensor([1, 3, 4])
        assert torch.allclose(forward.select(some).losses(forward.outputs[some]), expected[some], rtol=1e-4)


def test_grace_learns_on_top_of_a_codebook(fresh, cases):
    """The value learnt at a layer below a codebook gives the loss that generation has with both."""
    for book in (codebook(fresh, cases[0].prompt, radius=2.0), prompt_codebook(fresh, [cases[0].prompt, PROMPT])):
        edited = fresh.edited(book)
        editor = load_editor("grace", edited, layer=1, steps=5, radius=1e-3)
        longer = load_editor("grace", edited, layer=1, steps=6, radius=1e-3)
        for case, edit, checked in zip(cases, editor.edit(cases), longer.edit(cases)):
            with edited.applying([edit]):
                assert decoded_losses(edited, case).item() == pytest.approx(checked.log.losses[-1], rel=1e-3)


def test_unchanged_texts_of_edited_subjects_are_what_they_generate(fresh, cases):
    edited = fresh.edited(codebook(fresh, cases[0].prompt, radius=1e6, value=0.5))
    keys = prompt_queries(edited, [case.prompt for case in cases], 1)["last"]
    radius = torch.cdist(keys, keys)[0].sort().values[2:3] * 0.99
    books = [
        Codebook(n, "any", layer=1, keys=keys[n : n + 1], values=10 * torch.ones(1, fresh.hidden_size), radii=radius)
        for n in range(len(cases))
    ]
    edits = [Edit.compose([book, prompt_codebook(edited, [cases[n].prompt])]) for n, book in enumerate(books)]
    requests = [Request(case.prompt, 7, n) for n in range(len(cases)) for case in cases]
    generated, still = generate(edited, requests, edits), unedited.unchanged(edited, requests, edits)
    assert 0 < len(still) < len(requests) - len(cases)
    for n, text in still.items():
        assert (text.text, text.ids, text.fired) == (generated[n].text, generated[n].ids, False)
        assert text.distance == pytest.approx(generated[n].distance, rel=1e-4)
    with_weights = [Edit.compose([low_rank(fresh, 1), edit]) for edit in edits]
    assert unedited.unchanged(edited, requests, with_weights) == {}, "an update of weights changes every column"


def test_a_codebook_is_not_consulted_for_single_columns(fresh, cases, tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 900)
    edited = fresh.edited(codebook(fresh, PROMPT))
    editor = load_editor("pmet", edited, layers=[2], steps=2, corpus=str(tmp_path))
    with pytest.raises(Exception, match="layer 2 has a codebook"), torch.enable_grad():
        editor.learn(cases[:1])


def test_documents_and_prompts_have_keys_of_the_edited_model(fresh):
    edited, changed = fresh.edited(low_rank(fresh, 1)), really_changed(fresh, low_rank(fresh, 1))
    rows = [encode(fresh.tokenizer, prompt) for prompt in (PROMPT, "Intent: a\nCode:")]
    for layer in range(4):
        ours, theirs = (
            walk.block(layer, walk.up_to(layer)) for walk in (Blockwise(s, rows) for s in (edited, changed))
        )
        for name in ("hidden", "keys", "outputs"):
            assert torch.allclose(getattr(ours, name)[1, -3:], getattr(theirs, name)[1, -3:], atol=1e-4)


def test_composing_adds_and_concatenates(fresh, cases):
    a, b, c, d = low_rank(fresh, 1), low_rank(fresh, 2, rank=1, layers=(2, 3)), dense(fresh, 1), dense(fresh, 2)
    for edit in (a, c, codebook(fresh, PROMPT), Unedited(1, "none"), Edit.compose([a, c])):
        assert Edit.compose([edit]).sha256 == edit.sha256
    assert Edit.compose([c]) is c
    low = Edit.compose([a, Unedited(0, "none"), b])
    assert isinstance(low, LowRankUpdate) and low.case_id == 2
    assert {layer: left.shape[1] for layer, (left, _) in low.factors.items()} == {1: 2, 2: 1, 3: 3}
    assert torch.allclose(low.delta(3), a.delta(3) + b.delta(3), atol=1e-6) and torch.equal(low.delta(1), a.delta(1))
    summed = Edit.compose([c, d])
    assert isinstance(summed, DenseUpdate) and torch.equal(summed.delta, c.delta + d.delta)
    both = Edit.compose([low, summed])
    assert isinstance(both, Composite) and both.layers == (1, 2, 3)
    assert torch.allclose(both.deltas()[2], b.delta(2) + c.delta + d.delta, atol=1e-6)
    assert Edit.compose([both, codebook(fresh, PROMPT)]).deltas() is None
    for edit in (low, summed, both):
        expected = logits(really_changed(fresh, edit))
        with fresh.applying([edit]):
            assert torch.allclose(logits(fresh), expected, atol=1e-3)


def test_codebooks_join_and_order_decides_between_kinds(fresh, cases):
    prompts = [case.prompt for case in cases[:2]]
    books = [codebook(fresh, prompt, value=value) for prompt, value in zip(prompts, (5.0, -5.0))]
    joined = Edit.compose(books)
    assert isinstance(joined, Codebook) and len(joined.keys) == 2 and joined.lookups == (joined,)
    for prompt, book in zip(prompts, books):
        with fresh.applying([joined]):
            together = logits(fresh, prompt)
        with fresh.applying([book]):
            assert torch.allclose(together, logits(fresh, prompt), atol=1e-5)
    encoder = Encoder(fresh.inner_size, "released", torch.Generator().manual_seed(0)).requires_grad_(False)
    alike = [prompt_codebook(fresh, [prompt], encoder=copy.deepcopy(encoder)) for prompt in prompts]
    assert len(Edit.compose(alike).keys) == 2
    for different in (prompt_codebook(fresh, prompts[:1]), replace(alike[1], first_call_only=True),
                      prompt_codebook(fresh, prompts[:1], query="last"), codebook(fresh, PROMPT)):  # fmt: skip
        assert isinstance(Edit.compose([alike[0], different]), Composite)
    update = low_rank(fresh, 4, layers=(2,))
    seen = []
    for edits in ([update, books[0]], [books[0], update]):
        with fresh.applying([Edit.compose(edits)]), torch.no_grad():
            handle = fresh.down_proj(2).register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
            logits(fresh, prompts[0])
            handle.remove()
    (_, replaced), (inputs, added) = seen
    assert torch.equal(replaced[0, -1], books[0].values[0])
    assert torch.allclose(added[0, -1], books[0].values[0] + update.delta(2) @ inputs[0, -1], atol=1e-4)


def test_composed_edits_of_a_batch_act_row_by_row(fresh, cases):
    book, update = codebook(fresh, cases[0].prompt, radius=1e6), low_rank(fresh, 5, layers=(2,))
    edits = [Edit.compose([update, book, dense(fresh, 1)]), book, Edit.compose([book, update]), update]
    requests = [Request(case.prompt, 6, n) for case in cases for n in (-1, 0, 1, 2, 3)]
    together = generate(fresh, requests, edits)
    for request, text in zip(requests, together):
        assert text.text == generate(fresh, [request], edits)[0].text


def test_composed_edits_are_saved(fresh, tmp_path):
    log = EditLog(steps=3, losses=(2.0, 1.0))
    parts = [
        low_rank(fresh, 1),
        replace(dense(fresh, 2), log=log),
        codebook(fresh, PROMPT),
        prompt_codebook(fresh, [PROMPT]),
    ]
    composed = Edit.compose(parts)
    save_edits(tmp_path / "edits.safetensors", [composed, parts[0]], fresh)
    loaded, alone = load_edits(tmp_path / "edits.safetensors", fresh)
    assert loaded.sha256 == composed.sha256 and alone.sha256 == parts[0].sha256
    assert [part.case_id for part in loaded.parts] == [1, 2, 7, 3] and loaded.parts[1].log == log
    with fresh.applying([composed]):
        expected = logits(fresh)
    with fresh.applying([loaded]):
        assert torch.equal(logits(fresh), expected)


def test_kinds_register_themselves_and_say_how_they_are_applied():
    with pytest.raises(TypeError, match="needs its own kind: 'dense' is DenseUpdate"):

        class Sparse(DenseUpdate):
            pass

    with pytest.raises(TypeError, match=r"Silent has tensors but no stack\(\)"):

        class Silent(Edit):
            kind = "silent"

            def tensors(self):
                return {"0.shift": torch.zeros(1)}

    assert Edit.kinds["dense"] is DenseUpdate and "silent" not in Edit.kinds
