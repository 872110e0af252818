"""ROME, MEMIT and PMET: equal to the plain loop, and to the identities they are built on."""

import copy
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import plain
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clme_lib.datasets import registry as datasets
from clme_lib.editors.base import EDITORS
from clme_lib.editors.locate_then_edit import learning as rewriting
from clme_lib.editors.locate_then_edit.learning import Rewriting, RewritingEditor, misplaced, rewriting_rows
from clme_lib.editors.locate_then_edit.second_moments import SecondMoment, second_moments
from clme_lib.editors.registry import load_editor, resolve_hparams
from clme_lib.edits.base import Edit
from clme_lib.edits.weights import LowRankUpdate
from clme_lib.forward.tokens import tokenize
from clme_lib.study.appendices import lookups, statistics
from clme_lib.study.appendices import weight_updates as diagnosis
from clme_lib.study.appendices.weight_updates import diagnose
from clme_lib.support.errors import StudyError

SMALL = {
    "rome": {"layer": 1, "steps": 4},
    "memit": {"layers": [0, 1, 2], "steps": 4, "covariance_weight": 2.0},
    "pmet": {"layers": [0, 1, 2], "steps": 4, "covariance_weight": 2.0},
    "emmet": {"layers": [1], "steps": 4, "covariance_weight": 2.0},
    "alphaedit": {"layers": [0, 1, 2], "steps": 4, "ridge": 0.01, "lr": 0.5, "clamp": 4.0, "weight_decay": 1e-3},
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A small corpus of text files, and a cache of its own."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for n in range(30):
        letters = torch.randint(97, 123, (300,), generator=generator).tolist()
        (folder / f"{n}.txt").write_text(f"text {n}: " + "".join(map(chr, letters)))
    return str(folder)


def editor_of(name, subject, corpus, **changes):
    statistics = {} if name == "rome" and not changes.get("covariance") else {"corpus": corpus}
    return load_editor(name, subject, **{**SMALL[name], **statistics, **changes})


def close(actual, expected, tolerance=2e-3):
    return torch.linalg.vector_norm(actual - expected) <= tolerance * torch.linalg.vector_norm(expected)


def test_rome_equals_the_plain_loop(subject, cases):
    editor = load_editor("rome", subject, **SMALL["rome"])
    for case, edit in zip(cases, editor.edit(cases)):
        update, losses = plain.rome(subject, case, editor.contexts, editor.hparams)
        assert edit.log.losses == pytest.approx(losses, rel=1e-3)
        assert edit.log.steps == 3 and len(losses) == 4
        assert close(edit.delta(1), update)


def middle_eigenvalue(moments) -> float:
    """A threshold that keeps about half of every layer's dimensions."""
    return (
        torch.stack([torch.linalg.eigvalsh(moment.matrix.double()).median() for moment in moments.values()])
        .mean()
        .item()
    )


SPREADING = [("memit", {}), ("pmet", {}), ("pmet", {"attention": False}), ("alphaedit", {}), ("emmet", {})]


def spreading_editor(name, subject, corpus, **changes):
    """The editor, and the second moments of its layers."""
    editor = editor_of(name, subject, corpus, **changes)
    gathered = second_moments(subject, editor.layers, editor.hparams)
    if name == "alphaedit":
        editor = editor_of(name, subject, corpus, **changes, eigenvalue_threshold=middle_eigenvalue(gathered))
    return editor, {layer: moment.matrix for layer, moment in gathered.items()}


@pytest.mark.parametrize(("name", "changes"), SPREADING)
def test_spread_editors_equal_the_plain_loop(subject, cases, corpus, name, changes):
    editor, moments = spreading_editor(name, subject, corpus, **changes)
    for case, edit in zip(cases[:2], editor.edit(cases[:2])):
        updates, (losses,) = plain.spread(subject, [case], editor.contexts, editor.hparams, moments, name)
        assert edit.log.losses == pytest.approx(losses, rel=1e-3)
        assert set(updates) == set(edit.layers)
        for layer, update in updates.items():
            assert close(edit.delta(layer), update)


def adjusted_by_hand(subject, moment, layer, cases, lookup, weight, ridge):
    """S + rho (tr S / d) I with S = C + w C_lookup, summed over the prompts that cases have."""
    prompts = {text: None for case in cases for text in (case.prompt, *case.rephrased)}
    summed = torch.zeros(subject.inner_size, subject.inner_size, dtype=torch.double)
    for prompt in prompts:
        ids, column, _ = plain.rows_of(subject, replace(cases[0], prompt=prompt), [""], lookup)[0]
        key = plain.read_at(subject, subject.down_proj(layer), ids, column)[0].double()
        summed += torch.outer(key, key)
    whole = moment.double() + weight * summed / len(prompts)
    return (whole + ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.double)).float()


@pytest.mark.slow
@pytest.mark.parametrize("lookup", ["colon", "content"])
@pytest.mark.parametrize("name", ["rome", "memit", "pmet", "alphaedit"])
def test_lookup_aware_statistics_and_the_content_token_equal_the_plain_loop(subject, cases, corpus, name, lookup):
    changes = {"lookup": lookup, "lookup_weight": 2.0, "statistics_ridge": 0.01}
    changes |= {"covariance": True} if name == "rome" else {}
    edited, others = cases[0], cases[1:]
    editor = editor_of(name, subject, corpus, **changes)
    assert editor.needs_training
    with pytest.raises(StudyError, match="call fit"):
        _ = editor.moments
    gathered = second_moments(subject, editor.layers, editor.hparams)
    moments = {
        layer: adjusted_by_hand(subject, moment.matrix, layer, others, lookup, 2.0, 0.01)
        for layer, moment in gathered.items()
    }
    if name == "alphaedit":
        changed = {layer: SecondMoment(matrix, {}, subject.device) for layer, matrix in moments.items()}
        editor = editor_of(name, subject, corpus, **changes, eigenvalue_threshold=middle_eigenvalue(changed))
    editor.fit(others)
    (edit,) = editor.edit([edited])
    if name == "rome":
        update, losses = plain.rome(subject, edited, editor.contexts, editor.hparams, moments[1])
        updates = {1: update}
    else:
        updates, (losses,) = plain.spread(subject, [edited], editor.contexts, editor.hparams, moments, name)
    assert edit.log.losses == pytest.approx(losses, rel=1e-3)
    for layer, update in updates.items():
        assert close(edit.delta(layer), update, 5e-3)
    statistics = editor.setup().get("statistics", {})
    assert all(described["lookup_prompts"] == 2 * len(others) for described in statistics.values())


def test_statistics_that_nothing_uses_and_a_prompt_without_content_are_refused(llama, cases):
    with pytest.raises(StudyError, match="set covariance to true"):
        load_editor("rome", llama, **SMALL["rome"], lookup_weight=1.0)
    bare = replace(cases[0], prompt="Code:")
    with pytest.raises(StudyError, match="lookup: content ends at a line break"):
        load_editor("rome", llama, **SMALL["rome"], lookup="content").edit([bare])
    assert not load_editor("rome", llama, **SMALL["rome"]).needs_training


def test_a_memory_of_keys_has_no_other_lookup_token_or_statistics(llama):
    for change in ({"lookup": "content"}, {"lookup_weight": 1.0}, {"statistics_ridge": 0.1}):
        with pytest.raises(StudyError, match="do not apply"):
            load_editor("neuraldb", llama, **change)


@pytest.mark.slow
def test_the_same_learnt_vectors_are_written_under_every_statistics(llama, cases, corpus, tmp_path, monkeypatch):
    """A row is what the editor with its values does, except that what is learnt is learnt once for each token."""
    monkeypatch.setattr(datasets, "load_cases", lambda _name: [case for case in cases if case.dataset == _name])
    monkeypatch.setattr(datasets, "selection_ids", lambda _name: {case.case_id for case in cases[:4]})
    monkeypatch.setattr(lookups, "WEIGHTS_AND_RIDGES", ((0.0, 0.0), (2.0, 0.1)))
    monkeypatch.setattr(lookups, "CONTROL", ((0.0, 0.0),))
    learnt = []
    small = {"corpus": corpus, "layer": 1, "steps": 6}
    monkeypatch.setattr(
        lookups, "load_editor", lambda name, subject, **changes: load_editor(name, subject, **small, **changes)
    )
    learn = RewritingEditor.learn
    monkeypatch.setattr(RewritingEditor, "learn", lambda self, cases: learnt.append(self.name) or learn(self, cases))
    file = tmp_path / "lookups.csv"
    dataset = cases[0].dataset
    table = lookups.sweep_lookups(llama, "rome", file, cases=2, datasets=[dataset])
    assert learnt == ["rome", "rome"] and list(table["lookup"]) == ["colon"] * 3 + ["content"] * 2
    assert list(table["weight"].fillna(-1)) == [-1, 0, 2, -1, 0]
    chosen, others = datasets.selection_cases(dataset, 2)
    made = load_editor("rome", llama, **small, covariance=True, lookup_weight=2.0, statistics_ridge=0.1)
    made.fit(others)
    diagnosed = diagnose(llama, chosen, made.edit(chosen))
    assert table["reach"][2] == pytest.approx(diagnosed["reach"].mean(), rel=1e-3)
    assert table["reach"][2] != pytest.approx(table["reach"][0], rel=1e-3)
    assert pd.read_csv(file)["cases"].tolist() == [2] * 5
    with pytest.raises(StudyError, match="'grace' does not write at a lookup token"):
        lookups.sweep_lookups(llama, "grace", file)


@pytest.mark.parametrize(("name", "changes"), SPREADING)
def test_cases_written_together_equal_the_plain_loop(subject, cases, corpus, name, changes):
    cases = cases[:2]
    editor, moments = spreading_editor(name, subject, corpus, **changes)
    edits = editor.edit_together(cases)
    updates, losses = plain.spread(subject, cases, editor.contexts, editor.hparams, moments, name)
    for edit, of_case in zip(edits, losses):
        assert edit.log.losses == pytest.approx(of_case, rel=1e-3)
        assert edit.log.batch == len(cases)
    whole = Edit.compose(edits)
    alone = Edit.compose(editor.edit(cases))
    for layer, update in updates.items():
        assert close(whole.delta(layer), update)
        assert not close(alone.delta(layer), update, 0.02), "made alone, they know nothing of each other"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memit", "pmet", "alphaedit", "emmet"])
def test_what_earlier_edits_wrote_counts_like_other_texts(subject, cases, corpus, name):
    editor, moments = spreading_editor(name, subject, corpus, accumulate=True)
    first, second, third = cases[:3]
    earlier = Edit.compose(editor.edit([first, second]))
    assert all(len(keys) == 2 for keys in earlier.keys.values()) and set(earlier.keys) == set(editor.layers)
    edited = subject.edited(earlier)
    settings = {name: value for name, value in editor.hparams.model_dump().items() if value is not None}
    (edit,) = load_editor(name, edited, **settings).edit([third])
    updates, _ = plain.spread(edited, [third], editor.contexts, editor.hparams, moments, name, earlier.keys)
    forgetful, _ = plain.spread(edited, [third], editor.contexts, editor.hparams, moments, name)
    for layer, update in updates.items():
        assert close(edit.delta(layer), update)
        assert not close(forgetful[layer], update, 0.01), "they do count"


@pytest.mark.parametrize("subject", ["smollm2-135m", "smollm2-135m-code", "codellama-7b"])
def test_memit_with_accumulated_statistics_has_memits_values(subject):
    forgetful, accumulated = (resolve_hparams(name, subject).model_dump() for name in ("memit", "memit-accumulated"))
    assert accumulated.pop("accumulate") and not forgetful.pop("accumulate")
    assert accumulated == forgetful


@pytest.mark.parametrize("name", ["memit", "pmet", "alphaedit", "emmet"])
def test_one_after_another_is_all_together_if_earlier_keys_count(llama, corpus, name):
    """The identity of recursive least squares: with every residual taken from what is written already, the sum is the joint solution."""
    editor, _ = spreading_editor(name, llama, corpus, accumulate=True)
    layer, draw = editor.layers[0], torch.Generator().manual_seed(3)
    keys = torch.randn(6, llama.inner_size, generator=draw)
    values = torch.randn(6, llama.hidden_size, generator=draw)
    together = values.T @ editor.directions(layer, keys, together=True)
    written = torch.zeros_like(together)
    for n in range(6):
        before = LowRankUpdate(0, name, factors={layer: (values[:0].T, keys[:0])}, keys={layer: keys[:n]})
        later = copy.copy(editor)
        later.subject = replace(llama, edit=before if n else None)
        residual = values[n] - written @ keys[n]
        written = written + torch.outer(residual, later.directions(layer, keys[n : n + 1])[0])
    torch.testing.assert_close(written, together, rtol=1e-3, atol=1e-4 * together.abs().max().item())


@pytest.mark.slow
def test_pmet_changes_its_factor_and_stops_when_targets_win(llama, cases, corpus):
    """A target of one token soon is the arg-max of every row: the case ends, or, if the KL forbids it, its loss drops tenfold."""
    easy = [replace(case, target="in") for case in cases[:2]]
    changes = dict(steps=40, lr=0.3, clamp=50.0, kl_factor=1e-3, loss_floor=1e-9)
    modules = [llama.blocks[2].self_attn.o_proj, llama.down_proj(2)]
    for kl_stop in (0.01, 0.0):
        editor = editor_of("pmet", llama, corpus, **changes, kl_stop=kl_stop)
        for case, edit in zip(easy, editor.edit(easy)):
            _, _, losses = plain.learn(llama, case, editor.contexts, editor.hparams, modules, pmet=True)
            assert edit.log.losses == pytest.approx(losses, rel=2e-3)
            ratios = [after / before for before, after in pairwise(losses)]
            if kl_stop:
                assert edit.log.steps < 10
            else:
                assert edit.log.steps == 39 and min(ratios) < 0.12


def test_a_loss_that_is_not_finite_keeps_the_last_good_delta(llama, cases, monkeypatch):
    (short,) = load_editor("rome", llama, **{**SMALL["rome"], "steps": 2}).edit(cases[:1])
    evaluate, calls = Rewriting.evaluate, []

    def breaks_at(call):
        def evaluated(self, changed, reference):
            calls.append(1)
            nll, *others = evaluate(self, changed, reference)
            return (nll * torch.nan if len(calls) == call else nll), *others

        return evaluated

    monkeypatch.setattr(Rewriting, "evaluate", breaks_at(3))
    (edit,) = load_editor("rome", llama, **SMALL["rome"]).edit(cases[:1])
    assert len(calls) == 3, "the case stopped there"
    assert edit.log.losses == pytest.approx(short.log.losses) and edit.log.steps == short.log.steps == 1
    assert close(edit.delta(1), short.delta(1), 1e-4)
    calls.clear()
    monkeypatch.setattr(Rewriting, "evaluate", breaks_at(1))
    with pytest.raises(StudyError, match="case 0: the loss of rome is not finite"):
        load_editor("rome", llama, **SMALL["rome"]).edit(cases[:1])


def test_rome_maps_the_bare_key_to_the_value(subject, cases):
    """(W + dW) k_0 = v* (to 1e-4), with rank one."""
    editor = load_editor("rome", subject, **SMALL["rome"])
    module = subject.down_proj(1)
    for case, edit in zip(cases, editor.edit(cases)):
        (delta,), (start,), _ = plain.learn(subject, case, editor.contexts, editor.hparams, [module])
        ids, column, _ = plain.rows_of(subject, case, [""])[0]
        key, _ = plain.read_at(subject, module, ids[:, : column + 1], column)
        assert close((module.weight + edit.delta(1)) @ key, start + delta, 1e-3)
        assert torch.linalg.matrix_rank(edit.delta(1)) == 1


def test_rome_with_covariance_still_maps_the_key(llama, cases, corpus):
    editor = editor_of("rome", llama, corpus, covariance=True)
    plainly = load_editor("rome", llama, **SMALL["rome"]).edit(cases)
    key_of = llama.down_proj(1)
    for case, edit, without in zip(cases, editor.edit(cases), plainly):
        ids, column, _ = plain.rows_of(llama, case, [""])[0]
        key, _ = plain.read_at(llama, key_of, ids[:, : column + 1], column)
        assert close(edit.delta(1) @ key, without.delta(1) @ key, 1e-3)
        assert not close(edit.delta(1), without.delta(1), 0.1)
    assert editor.setup()["statistics"][1]["tokens"] == 1920


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_batch_of_twenty_equals_one_by_one(llama, name, corpus, many_cases):
    """Cases stop at different iterations here, so freezing and leaving the batch are both exercised."""
    editor = editor_of(name, llama, corpus, steps=12, loss_floor=5.62)
    together = editor.edit(many_cases, batch_size=20)
    assert len({edit.log.steps for edit in together}) > 2, "the test needs cases that stop at different times"
    for case, edit in zip(many_cases, together):
        (alone,) = editor.edit([case])
        assert alone.log.steps == edit.log.steps
        assert alone.log.losses == pytest.approx(edit.log.losses, rel=1e-3)
        for layer in edit.layers:
            assert close(edit.delta(layer), alone.delta(layer), 5e-3)


@pytest.mark.parametrize("name", list(SMALL))
def test_the_host_may_look_seldom(llama, corpus, many_cases, monkeypatch, name):
    """A case that has stopped stays as it was, however long the host takes to notice."""
    editor = editor_of(name, llama, corpus, steps=12, loss_floor=5.62)
    often = editor.edit(many_cases[:6])
    assert len({edit.log.steps for edit in often}) > 1, "the test needs cases that stop at different times"
    monkeypatch.setitem(rewriting.CHECK_DONE_EVERY, "cpu", 5)
    for edit, other in zip(often, editor.edit(many_cases[:6])):
        assert edit.log.steps == other.log.steps and edit.log.losses == pytest.approx(other.log.losses, rel=1e-4)
        for layer in edit.layers:
            assert close(edit.delta(layer), other.delta(layer), 1e-3)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, and finding where something is true."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*SMALL, "grace"])
def test_steps_do_not_wait_for_the_device(llama, cases, corpus, monkeypatch, name):
    """Twice the steps, and no more waiting."""
    monkeypatch.setitem(rewriting.CHECK_DONE_EVERY, "cpu", 100)
    counts = []
    for steps in (8, 16):
        editor = (
            editor_of(name, llama, corpus, steps=steps, loss_floor=0.0)
            if name in SMALL
            else load_editor(name, llama, layer=2, steps=steps)
        )
        editor.edit(cases[:2])  # what is made once
        with Waits() as waits:
            editor.edit(cases[:2])
        learnt = 2 if name == "pmet" else 1
        counts.append(
            waits.count - learnt * steps
        )  # Adam reads its own count of each vector's steps, which the host has
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", list(SMALL))
def test_order_does_not_matter(subject, cases, corpus, name):
    editor, cases = editor_of(name, subject, corpus), cases[:3]
    for edit, other in zip(editor.edit(cases), editor.edit(cases[::-1])[::-1]):
        assert edit.case_id == other.case_id
        for layer in edit.layers:
            assert close(edit.delta(layer), other.delta(layer), 5e-3)
            assert torch.linalg.matrix_rank(edit.delta(layer)) == 1


@pytest.mark.parametrize("name", [*SMALL, "malmen"])
def test_base_model_is_bit_identical_afterwards(subject, cases, corpus, name):
    before = {key: tensor.clone() for key, tensor in subject.model.state_dict().items()}
    if name == "malmen":
        editor = load_editor("malmen", subject, layers=[2, 3], rank=8, iterations=2)
        editor.fit(cases)
    else:
        editor = editor_of(name, subject, corpus)
    edits = editor.edit(cases[:2])
    with subject.applying(edits):
        subject.model(input_ids=torch.ones(len(edits), 3, dtype=torch.long, device=subject.device))
    assert all(torch.equal(before[key], tensor) for key, tensor in subject.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in subject.model.parameters())


def test_lookup_token_is_the_colon_in_every_row(subject, cases):
    editor = load_editor("rome", subject)
    for case in cases:
        for targets in ("in-context", "alone"):
            rows = rewriting_rows(subject, case, editor.contexts, "aligned", targets)
            assert len(rows) == (6 if targets == "in-context" else 7)
            for row in rows:
                assert subject.tokenizer.decode([row.inputs[row.lookup]]) == ":"


def test_released_padding_reads_too_far_left(llama, cases):
    """Only the longest row keeps its colon; the others are read as many columns too early as they are shorter."""
    contexts = load_editor("rome", llama).contexts
    aligned = rewriting_rows(llama, cases[0], contexts, "aligned", "alone")
    moved = rewriting_rows(llama, cases[0], contexts, "released", "alone")
    longest = max(len(row.inputs) for row in aligned)
    for before, after in zip(aligned, moved):
        shift = longest - len(before.inputs)
        assert after.inputs[after.pads :] == before.inputs
        assert after.lookup - after.pads == before.lookup - shift
        assert after.first_label - after.pads == before.first_label - shift
        assert min(after.lookup, after.first_label) >= 0
    assert any(row.pads for row in moved), "the bare prompt's row falls on padding"
    assert misplaced(aligned[:1], 0)[0].lookup == aligned[0].lookup


@pytest.mark.parametrize("name", [name for name in SMALL if EDITORS[name].compat])
def test_compat_differs_and_runs(subject, cases, corpus, name):
    clean = editor_of(name, subject, corpus)
    compat = load_editor(name, subject, preset="compat", **{**SMALL[name], "corpus": corpus})
    assert compat.hparams.padding == "released" and compat.hparams.targets == "alone"
    for edit, other in zip(clean.edit(cases), compat.edit(cases)):
        assert all(torch.isfinite(other.delta(layer)).all() for layer in other.layers)
        assert not close(edit.delta(edit.layers[0]), other.delta(edit.layers[0]), 0.05)


def test_sherman_morrison_is_the_dense_solve():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 24, generator=generator)
    moment = SecondMoment(samples.T @ samples / 400, {"layer": 0, "tokens": 400, "corpus": "random"}, samples.device)
    keys = torch.randn(5, 24, generator=generator)
    scaled = moment.solve(keys) / 7.0
    ours = scaled / (1 + (keys.double() * scaled).sum(-1, keepdim=True))
    for key, right in zip(keys.double(), ours):
        dense = 7.0 * moment.matrix.double() + torch.outer(key, key)
        assert torch.allclose(torch.linalg.solve(dense, key), right, rtol=1e-9)


def test_statistics_are_the_second_moment_of_every_token(llama, corpus, tmp_path):
    values = load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus}).hparams
    moment = second_moments(llama, [1], values)[1]
    assert moment.header["tokens"] == 1920, "forty tokens per dimension of the key"
    from clme_lib.editors.locate_then_edit.corpora import open_corpus
    from clme_lib.forward.tokens import encode

    keys, left = [], 1920
    for text in open_corpus(corpus).documents():
        ids = encode(llama.tokenizer, text)[:left]
        left -= len(ids)
        if not ids:
            break
        handle = llama.down_proj(1).register_forward_hook(lambda _m, args, _o: keys.append(args[0][0]))
        with torch.no_grad():
            llama.model(input_ids=torch.tensor([ids], device=llama.device))
        handle.remove()
    keys = torch.cat(keys)
    assert len(keys) == 1920
    assert torch.allclose(moment.matrix, keys.T @ keys / 1920, atol=1e-5)


def test_interrupted_statistics_go_on(llama, corpus, monkeypatch):
    from clme_lib.editors.locate_then_edit import second_moments as statistics

    values = load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus}).hparams
    whole = second_moments(llama, [0], values)[0].matrix
    folder = Path(corpus).parent / "cache" / "statistics"
    (file,) = folder.glob("*-layer-0-*.safetensors")
    file.unlink()
    monkeypatch.setattr(statistics, "_CHUNK_DOCUMENTS", 2)
    add, calls = statistics._add, []

    def dies_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(statistics, "_add", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        second_moments(llama, [0], values)
    assert not file.exists()
    calls.clear()
    monkeypatch.setattr(statistics, "_add", lambda *arguments: (calls.append(1), add(*arguments)))
    again = second_moments(llama, [0], values)[0].matrix
    assert torch.allclose(again, whole, atol=1e-5)
    monkeypatch.setattr(statistics, "_add", add)
    assert list(folder.glob("*.safetensors")) == [file] and calls, "finished, and from where it stopped"


def test_statistics_of_something_else_are_never_used(llama, corpus):
    """Those of a corpus that has changed are gathered anew; a file of others under their name is refused."""
    values = load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus}).hparams
    before = second_moments(llama, [0], values)[0]
    folder = Path(corpus).parent / "cache" / "statistics"
    (stale,) = folder.glob("*.safetensors")
    for file in Path(corpus).iterdir():
        file.write_text(file.read_text()[::-1])
    after = second_moments(llama, [0], values)[0]
    assert before.header["identity"] != after.header["identity"] and not torch.equal(before.matrix, after.matrix)
    (fresh,) = set(folder.glob("*.safetensors")) - {stale}
    fresh.write_bytes(stale.read_bytes())
    with pytest.raises(StudyError, match=r"safetensors: its identity is .* remove the file"):
        second_moments(llama, [0], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus_tokens": 20}, "less than the 48 dimensions"),
        ({"corpus_tokens": 10**6}, "has only"),
        ({"corpus": "/nowhere"}, "not embedded, wikipedia"),
    ],
)
def test_unusable_statistics(llama, corpus, change, message):
    editor = load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus, **change})
    with pytest.raises(StudyError, match=message):
        editor.setup()


def test_repetitive_text_is_not_positive_definite(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.txt").write_text("a" * 60)
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text("a")
    editor = load_editor("memit", llama, **{**SMALL["memit"], "corpus": str(tmp_path), "corpus_tokens": 60})
    with pytest.raises(StudyError, match="not positive definite"):
        editor.setup()


def test_diagnosis_reads_the_edited_model(subject, cases):
    edits = load_editor("rome", subject, **SMALL["rome"]).edit(cases)
    diagnosed = diagnose(subject, cases, edits)
    module = subject.down_proj(1)
    for (_, row), case, edit in zip(diagnosed.iterrows(), cases, edits):
        tokens = tokenize(subject.tokenizer, case.prompt, case.target)
        assert row["nll_before"] == pytest.approx(plain.target_loss(subject, tokens).item(), rel=1e-4)
        with torch.no_grad():
            base = module.weight.clone()
            module.weight += edit.delta(1)
            assert row["nll_after"] == pytest.approx(plain.target_loss(subject, tokens).item(), rel=1e-3)
            module.weight.copy_(base)
        assert row["norm"] == pytest.approx(edit.delta(1).norm().item(), rel=1e-4)
        assert row["reach"] > 0
    same = [replace(case, unrelated=(case.prompt,)) for case in cases]
    assert diagnose(subject, same, edits)["reach"].to_numpy() == pytest.approx(1.0)
    with pytest.raises(StudyError, match="does not update weights"):
        diagnose(subject, cases[:1], load_editor("grace", subject, steps=1, layer=1).edit(cases[:1]))


def test_an_updates_norm_is_summed_in_double_precision():
    """At the size of a 7B layer a sum of equal squares in float32 is off by nearly two percent."""
    matrix = torch.full((4096, 11008), 1e-3)
    exact = (2 * matrix.numel()) ** 0.5 * matrix[0, 0].double().item()
    assert diagnosis.frobenius([matrix, matrix]) == pytest.approx(exact, rel=1e-9)


def test_only_updates_of_weights_are_diagnosed(llama, tmp_path):
    with pytest.raises(
        StudyError, match="not editors that update weights: gracy, grace; known: ft-l, rome, memit, pmet, malmen"
    ):
        diagnosis.diagnose_editors(llama, tmp_path / "table.csv", ["rome", "gracy", "grace"], cases=1)
    assert not (tmp_path / "table.csv").exists()


def test_statistics_are_compared_with_four_times_the_tokens(llama, cases, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_cases", lambda _name: cases)
    monkeypatch.setattr(datasets, "selection_ids", lambda _name: {0, 1, 2})
    small = {"corpus": corpus, "layers": [1, 2]}
    monkeypatch.setattr(
        statistics, "load_editor", lambda name, subject, **named: load_editor(name, subject, **small, **named)
    )
    table = statistics.compare_statistics(llama, tmp_path / "table.csv", cases=2)
    assert list(table["layer"]) == [1, 2, 1, 2] and list(table["tokens"]) == [480, 480, 1920, 1920]
    assert list(table["cases"]) == [4] * 4
    assert (table["cosine"][:2].to_numpy() < table["cosine"][2:].to_numpy()).all()
    assert (table["cosine"] < 0.9999).all() and (table["cosine"] > 0.5).all()
    assert ((table["share"] > 0) & (table["share"] < 1)).all() and (table["difference"] > 0).all()
    assert (tmp_path / "table.csv").is_file()


def test_a_smaller_corpus_is_read_whole(llama, corpus):
    for n in range(5, 30):
        Path(corpus, f"{n}.txt").unlink()
    moment = load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus}).moments[0]
    assert 480 <= moment.header["tokens"] < 1920 and moment.header["documents"] == 5
    Path(corpus, "1.txt").write_text("a short one")
    for n in (2, 3, 4):
        Path(corpus, f"{n}.txt").unlink()
    shutil.rmtree(Path(corpus).parent / "cache")
    with pytest.raises(StudyError, match=r"has only \d+ tokens for tiny-llama, but 480 are needed"):
        load_editor("memit", llama, **{**SMALL["memit"], "corpus": corpus}).setup()


@pytest.mark.slow
def test_pmet_is_taken_apart(llama, cases, corpus, tmp_path, monkeypatch):
    """Each row is what PMET with those values does; the vectors are learnt once for all windows."""
    monkeypatch.setattr(datasets, "load_cases", lambda _name: cases)
    monkeypatch.setattr(datasets, "selection_ids", lambda _name: {0, 1, 2})
    monkeypatch.setattr(diagnosis, "PARTS_WEIGHTS", (1e-6, 2.0))
    small = {"corpus": corpus, "steps": 6}

    def load(name, subject, **changes):
        return load_editor(name, subject, **{"layers": [1, 2], **small, **changes})

    monkeypatch.setattr(diagnosis, "load_editor", load)
    table = diagnosis.take_pmet_apart(llama, tmp_path / "parts.csv", cases=2)
    assert list(table["layers"]) == ["2", "2", "1-2", "1-2"] * 2
    assert list(table["attention learnt"]) == [True] * 4 + [False] * 4
    for n, layers, weight, attention in ((0, [2], 1e-6, True), (3, [1, 2], 2.0, True), (6, [1, 2], 1e-6, False)):
        editor = load("pmet", llama, layers=layers, covariance_weight=weight, attention=attention, kl_factor=0.0)
        diagnosed = diagnose(llama, cases[:2], editor.edit(cases[:2]))
        assert table["nll_after"][n] == pytest.approx(diagnosed["nll_after"].mean(), rel=1e-3)
        assert table["norm"][n] == pytest.approx(diagnosed["norm"].mean(), rel=1e-3)
    assert len(pd.read_csv(tmp_path / "parts.csv")) == 8


def test_alphaedit_leaves_what_other_texts_use_as_it_is(llama, cases, corpus):
    moments = second_moments(llama, [0, 1, 2], editor_of("alphaedit", llama, corpus).hparams)
    threshold = middle_eigenvalue(moments)
    editor = editor_of("alphaedit", llama, corpus, eigenvalue_threshold=threshold)
    described = editor.setup()
    (edit,) = editor.edit(cases[:1])
    for layer, moment in moments.items():
        eigenvalues, vectors = torch.linalg.eigh(moment.matrix.double())
        used = vectors[:, eigenvalues >= threshold].float()
        delta = edit.delta(layer)
        assert (delta @ used).norm() < 1e-4 * delta.norm(), "nothing along the directions of other texts"
        assert 0 < described["dimensions written to"][layer] == (eigenvalues < threshold).sum() < len(eigenvalues)
    with pytest.raises(StudyError, match="layer 0 has no eigenvalue below eigenvalue_threshold=1e-30; the smallest is"):
        editor_of("alphaedit", llama, corpus, eigenvalue_threshold=1e-30).setup()
