"""A-GRACE: queries, the encoder and its training, the codebook that is asked once a text, and the ablations."""

import json
from dataclasses import replace

import pytest
import torch

from clme_lib.editors.contrastive_encoder import (
    EncoderHyperparameters,
    Pairs,
    balanced_accuracy,
    contrastive_loss,
    distances,
    make_pairs,
    train,
)
from clme_lib.editors.registry import load_editor
from clme_lib.edits.codebooks import masked_mean
from clme_lib.edits.encoder import Encoder
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.generation import Request, generate
from clme_lib.forward import prompt_keys as queries_module
from clme_lib.forward.prompt_keys import prompt_queries, stored_queries
from clme_lib.study.appendices import encoder_settings as encoders_module
from clme_lib.study.rq3 import measurements
from clme_lib.support.artifact import Artifact
from clme_lib.support.errors import StudyError

SMALL = {"layer": 2, "steps": 3}
TRAINING = {"epochs": 4, "encoder_batch": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def fitted(name, subject, cases, **changes):
    editor = load_editor(name, subject, **{**SMALL, **(TRAINING if name != "a-grace-wo-cl" else {}), **changes})
    editor.fit(cases, edited=cases)
    return editor


def inputs_of(subject, prompt, layer=2):
    """(T, d_f) inputs of ``W_l`` over a prompt's tokens in an ordinary pass of the whole model."""
    seen = []
    handle = subject.down_proj(layer).register_forward_hook(lambda _m, args, _o: seen.append(args[0][0].float()))
    subject.model(**subject.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(subject.device))
    handle.remove()
    return seen[0].detach()


def test_contrastive_loss_by_hand():
    distance, positive = torch.tensor([0.5, 0.25, 1.5]), torch.tensor([True, False, False])
    # (0.5^2 + (1 - 0.25)^2 + 0) / 3
    assert contrastive_loss(distance, positive, 1.0).item() == pytest.approx((0.25 + 0.5625) / 3)
    # (0.25 + 1.75^2 + 0.5^2) / 3
    assert contrastive_loss(distance, positive, 2.0).item() == pytest.approx((0.25 + 3.0625 + 0.25) / 3)
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert distances(a, b).item() == pytest.approx(torch.nn.functional.pairwise_distance(a, b).item(), rel=1e-6)


def test_balanced_accuracy_pools_its_counts():
    distance = torch.tensor([0.2, 1.5, 0.9, 1.0, 1.1, 3.0])
    positive = torch.tensor([True, True, False, False, False, False])
    assert balanced_accuracy(distance, positive, 1.0) == [0.5 * (1 / 2 + 2 / 4)]
    assert balanced_accuracy(distance, positive, [0.1, 1.5]) == [0.5 * (0 + 1), 0.5 * (1 + 1 / 4)]
    with pytest.raises(StudyError, match="both positive and negative"):
        balanced_accuracy(distance[:2], positive[:2], 1.0)


@pytest.mark.parametrize("architecture", ["released", "paper"])
def test_encoder_is_what_it_says(architecture):
    encoder = Encoder(48, architecture, torch.Generator().manual_seed(0))
    assert [tuple(parameter.shape) for parameter in encoder.parameters()] == (
        [(12, 48), (12,), (256, 12), (256,)] if architecture == "released" else [(48, 48), (48,), (256, 48), (256,)]
    )
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    slope = 0.5 if architecture == "released" else 0.0
    inner = x @ encoder.first.weight.T + encoder.first.bias
    inner = torch.where(inner > 0, inner, slope * inner)
    assert torch.allclose(encoder(x), inner @ encoder.second.weight.T + encoder.second.bias, atol=1e-5)
    dropped = encoder(x, torch.Generator().manual_seed(2))
    assert torch.equal(dropped, encoder(x)) == (architecture == "paper"), "only the released one drops out"
    with pytest.raises(StudyError, match="unknown encoder architecture"):
        Encoder(48, "mlp")


def test_queries_are_the_mean_and_the_last_input(subject, cases):
    """Whatever the padding of the batch, and read from the cache or not."""
    prompts = [case.prompt for case in cases] + [cases[0].rephrased[0]]
    queries = prompt_queries(subject, prompts, 2)
    for n, prompt in enumerate(prompts):
        inputs = inputs_of(subject, prompt)
        assert torch.allclose(queries["mean"][n], inputs.mean(0), atol=1e-5)
        assert torch.allclose(queries["last"][n], inputs[-1], atol=1e-5)
    for query in ("mean", "last"):
        for _ in range(2):
            assert torch.allclose(stored_queries(subject, prompts, 2, query), queries[query].cpu(), atol=1e-5)


@pytest.mark.parametrize("pads", [0, 1, 5])
def test_masked_mean_ignores_padding(pads):
    keys = torch.randn(2, 4 + pads, 3, generator=torch.Generator().manual_seed(0))
    keys[0, :pads] = torch.nan
    mask = torch.ones(2, 4 + pads)
    mask[0, :pads] = 0
    means = masked_mean(keys, mask)
    assert torch.allclose(means[0], keys[0, pads:].mean(0)) and torch.allclose(means[1], keys[1].mean(0))


def test_extraction_resumes(llama, cases, monkeypatch):
    prompts = [case.prompt for case in cases]
    monkeypatch.setattr(queries_module, "_FILE_PROMPTS", 2)
    asked = []

    def interrupted(subject, some, layer):
        if len(asked) == 2:
            raise ConnectionError
        return counting(subject, some, layer)

    def counting(subject, some, layer):
        asked.append(list(some))
        return prompt_queries(subject, some, layer)

    monkeypatch.setattr(queries_module, "prompt_queries", interrupted)
    with pytest.raises(ConnectionError):
        stored_queries(llama, prompts, 2, "mean")
    assert [len(some) for some in asked] == [2, 2]
    monkeypatch.setattr(queries_module, "prompt_queries", counting)
    assert torch.allclose(stored_queries(llama, prompts, 2, "mean"), prompt_queries(llama, prompts, 2)["mean"].cpu())
    assert [len(some) for some in asked] == [2, 2, 1], "only what was missing is computed"


def test_queries_of_another_layer_are_refused(llama):
    prompt = "Intent: another\nCode:"
    for layer in (1, 2):
        stored_queries(llama, [prompt], layer, "mean")
    first, second = (next((queries_module.cache_dir() / "queries").glob(f"*layer-{n}-*/*.safetensors")) for n in (1, 2))
    second.with_name("copied.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(StudyError, match="copied.safetensors: its layer is 1, expected 2; remove the file"):
        stored_queries(llama, [prompt], 2, "mean")


def separable(count, width=16, seed=0):
    """Queries in which wordings of one request share a direction that the rest hides."""
    draw = torch.Generator().manual_seed(seed)
    rows, left, right, positive = [], [], [], []
    for _ in range(count):
        topic = torch.randn(width, generator=draw)
        start = len(rows)
        for k in range(7):
            own = topic if k < 2 else torch.randn(width, generator=draw)
            rows.append(own + 0.3 * torch.randn(width, generator=draw))
            if k:
                left.append(start), right.append(start + k), positive.append(k == 1)
    return Pairs(torch.stack(rows), torch.tensor(left), torch.tensor(right), torch.tensor(positive))


VALUES = EncoderHyperparameters(
    layer=0, steps=1, lr=1.0, radius=1.0, margin={"cnle": 1.0}, encoder_lr=1e-3, weight_decay=1e-4,
    encoder_batch=64, epochs=100, patience=20,
)  # fmt: skip


def test_training_learns_keeps_the_best_epoch_and_stops():
    pairs, held_out = separable(150), separable(60, seed=1)
    encoder, log = train(pairs, held_out, VALUES, 1.5, ("test",))
    accuracies = [epoch["accuracy"] for epoch in log]
    best = max(range(len(log)), key=lambda n: (accuracies[n], -n))
    assert balanced_accuracy(held_out.distances(encoder), held_out.positive, 1.0) == [accuracies[best]]
    assert accuracies[best] > 0.85 and accuracies[0] < accuracies[best]
    assert len(log) == min(VALUES.epochs, best + 1 + VALUES.patience)
    again, _ = train(pairs, held_out, VALUES, 1.5, ("test",))
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters()))
    other, _ = train(pairs, held_out, VALUES, 1.5, ("other seed",))
    assert not torch.equal(encoder.first.weight, other.first.weight)


def test_pairs_of_cases(llama, cases):
    pairs = make_pairs(llama, cases, 2, "last")
    assert pairs.positive.tolist() == [True, False, False] * len(cases)
    for n, case in enumerate(cases):
        for k, prompt in enumerate((case.rephrased[0], *case.unrelated)):
            expected = inputs_of(llama, case.prompt)[-1] - inputs_of(llama, prompt)[-1]
            assert pairs.distances(None)[3 * n + k].item() == pytest.approx(expected.norm().item(), rel=1e-3)
    with pytest.raises(StudyError, match="case 0 of cnle needs a rephrased"):
        make_pairs(llama, [replace(cases[0], rephrased=())], 2, "mean")


@pytest.mark.parametrize("name", ["a-grace", "a-grace-wo-cl", "a-grace-wo-mean"])
def test_keys_and_values(subject, cases, name):
    """The key is the query of the edit prompt; the value is learnt as GRACE's, at the same place."""
    editor = fitted(name, subject, cases)
    edits = editor.edit(cases)
    for case, edit in zip(cases, edits):
        inputs = inputs_of(subject, case.prompt)
        query = inputs[-1] if name == "a-grace-wo-mean" else inputs.mean(0)
        query = query if edit.encoder is None else edit.encoder(query)
        assert torch.allclose(edit.keys[0], query, atol=1e-4 * query.norm().item())
        assert edit.log.steps == 3 and edit.values.shape == (1, subject.hidden_size)
    # without GRACE's own draws the values would be GRACE's: give it A-GRACE's name
    grace = load_editor("grace", subject, **SMALL)
    grace.name = name
    for edit, plain in zip(edits, grace.edit(cases)):
        assert torch.allclose(edit.values, plain.values, atol=1e-5) and edit.log.losses == pytest.approx(
            plain.log.losses
        )


def test_a_codebook_is_asked_once_a_text(subject, cases, monkeypatch):
    """In the first generation and in later ones; never in a decoding step; always with a finite query."""
    (edit,) = fitted("a-grace", subject, cases).edit(cases[:1])
    seen = []
    applying = type(subject).applying

    def watching(self, edits, rows=None):
        manager = applying(self, edits, rows)

        class Watched:
            def __enter__(self):
                self.state = manager.__enter__()
                return self.state

            def __exit__(self, *error):
                seen.extend(self.state.lookups)
                return manager.__exit__(*error)

        return Watched()

    monkeypatch.setattr(type(subject), "applying", watching)
    for _ in range(2):
        seen.clear()
        (first,) = generate(subject, [Request(cases[0].prompt, 6, 0)], [edit])
        assert [lookup.phase for lookup in seen] == ["prefill"]
        assert first.fired and first.distance < 1e-3
        assert all(lookup.distances.isfinite().all() for lookup in seen)


@pytest.mark.parametrize("pads", [0, 1, 5])
def test_only_the_last_prompt_column_is_replaced(subject, cases, pads):
    (edit,) = fitted("a-grace-wo-cl", subject, cases).edit(cases[:1])
    ids = subject.tokenizer(cases[0].prompt, add_special_tokens=False).input_ids
    row = torch.tensor([[0] * pads + ids], device=subject.device)
    mask = torch.tensor([[0] * pads + [1] * len(ids)], device=subject.device)
    seen = {}
    with subject.applying([edit]) as state:
        handle = subject.down_proj(2).register_forward_hook(lambda _m, _a, out: seen.update(out=out))
        subject.model(input_ids=row, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        handle.remove()
    (lookup,) = state.lookups
    assert lookup.fired.tolist() == [True] and lookup.distances[0] < 1e-3 * edit.keys.norm()
    assert torch.equal(seen["out"][0, -1], edit.values[0])
    assert not torch.isclose(seen["out"][0, :-1], edit.values[0]).all(-1).any()


def test_a_batch_without_a_mask_has_no_padding(subject, cases):
    (edit,) = fitted("a-grace", subject, cases).edit(cases[:1])
    ids = subject.tokenizer(cases[0].prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(subject.device)
    other = ids.flip(1)
    with subject.applying([edit]) as state:
        subject.model(input_ids=torch.cat([other, ids]))
    (lookup,) = state.lookups
    assert lookup.rows == [0, 1] and lookup.distances[1] < 1e-3 * edit.keys.norm() < lookup.distances[0]


def test_a_one_token_prompt_can_be_matched(llama, cases):
    """The phase decides, not the width of the pass."""
    (edit,) = fitted("a-grace-wo-cl", llama, cases).edit(cases[:1])
    token = llama.tokenizer.decode([5])
    assert generate(llama, [Request(token, 2, 0)], [replace(edit, radii=edit.radii + 1e6)])[0].fired


def test_an_infinite_query_is_an_error(llama, cases):
    (edit,) = fitted("a-grace-wo-cl", llama, cases).edit(cases[:1])
    broken = Encoder(llama.inner_size, "paper").requires_grad_(False)
    broken.first.bias[0] = torch.nan
    with pytest.raises(StudyError, match="query of layer 2 is not finite"):
        generate(llama, [Request(cases[0].prompt, 2, 0)], [replace(edit, encoder=broken)])


def test_order_and_company_do_not_matter(subject, cases):
    editor = fitted("a-grace", subject, cases)
    together, alone = editor.edit(cases), [editor.edit([case])[0] for case in reversed(cases)][::-1]
    for batched, single in zip(together, alone):
        assert torch.allclose(batched.keys, single.keys, atol=1e-5) and torch.allclose(
            batched.values, single.values, atol=1e-4
        )


def test_edits_of_several_encoders_meet_in_a_batch(subject, cases):
    """Two folds' encoders, a codebook without one, GRACE's and no edit, row by row as they are alone."""
    edits = [
        *fitted("a-grace", subject, cases[:3]).edit(cases[3:4]),
        *fitted("a-grace", subject, cases[2:]).edit(cases[:1]),
        *fitted("a-grace-wo-mean", subject, cases[2:]).edit(cases[:1]),
        *fitted("a-grace-wo-cl", subject, cases).edit(cases[1:2]),
        *load_editor("grace", subject, **SMALL).edit(cases[2:3]),
    ]
    prompts = [cases[n].prompt for n in (3, 0, 0, 1, 2, 4)]
    requests = [Request(prompt, 5, n if n < 5 else -1) for n, prompt in enumerate(prompts)]
    together = generate(subject, requests, edits)
    for n, request in enumerate(requests[:5]):
        (alone,) = generate(subject, [replace(request, edit=0)], [edits[n]])
        assert alone.text == together[n].text and alone.fired and together[n].fired
        assert together[n].distance == pytest.approx(alone.distance, abs=1e-4)
    assert together[5].distance is None


def test_compat_leaves_later_generations_unedited(llama, cases):
    """With a radius that reaches everything, the released program's specificity is still perfect."""
    wide = {"radius": 1e6}
    clean = evaluate(llama, cases, fitted("a-grace-wo-cl", llama, cases, **wide).edit(cases))
    editor = load_editor("a-grace-wo-cl", llama, preset="compat", **SMALL, **wide)
    compat = evaluate(llama, cases, editor.edit(cases), preset="compat")
    assert clean["fired"].map(all).all() and (clean["specificity_em"] < 1).all()
    assert (compat["specificity_em"] == 1).all()
    assert (
        compat["distances"].map(lambda distances: [distance is None for distance in distances]).tolist()
        == [[False] * 2 + [True] * 2] * 5
    )
    unedited = evaluate(llama, cases, load_editor("none", llama).edit(cases))
    assert (compat["fluency"] == unedited["fluency"]).all() and not (clean["fluency"] == unedited["fluency"]).all()
    a_grace = load_editor("a-grace", llama, preset="compat", **SMALL, **TRAINING)
    assert a_grace.hparams.later_calls == "unedited" and a_grace.hparams.selection == "edited"
    with pytest.raises(StudyError, match="pass them as fit"):
        a_grace.fit(cases)
    wo_mean = load_editor("a-grace-wo-mean", llama, preset="compat", **SMALL, **TRAINING)
    wo_mean.fit(cases[:3], edited=cases[3:])
    assert not wo_mean.edit(cases[3:])[0].first_call_only


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        (2.0, "margin: .*expected a value for each dataset, such as"),
        ({"cnle": -1.0}, r"margin.cnle: Input should be greater than 0 \(got -1.0\)"),
    ],
)
def test_margins_are_checked(llama, margin, message):
    with pytest.raises(StudyError, match=message):
        load_editor("a-grace", llama, margin=margin)


def test_an_encoder_is_refused_for_anything_else(llama, cases):
    editor = fitted("a-grace", llama, cases)
    with pytest.raises(StudyError, match="case 0 belongs to csne, but the encoder of a-grace was trained on cnle"):
        editor.edit([replace(cases[0], dataset="csne")])
    with pytest.raises(StudyError, match="has not been trained: call fit"):
        load_editor("a-grace", llama, **{**SMALL, "steps": 10**9}).edit(cases)  # before any value is learnt
    with pytest.raises(StudyError, match="margin: no value for 'cnle'"):
        fitted("a-grace", llama, cases, margin={"csne": 1.0})
    (file,) = (queries_module.cache_dir() / "encoders").glob("*.safetensors")
    expected = editor.trained.header
    assert torch.equal(Artifact(file, expected).read()[1]["first.weight"], editor.trained.encoder.first.weight.cpu())
    for name in ("fingerprint", "layer", "query", "dataset", "margin", "training"):
        with pytest.raises(StudyError, match=f"its {name} is .*, expected 'else'; remove the file"):
            Artifact(file, {**expected, name: "else"}).read()
    of_fewer = fitted("a-grace", llama, cases[:4]).trained
    (other_file,) = set((queries_module.cache_dir() / "encoders").glob("*.safetensors")) - {file}
    file.write_bytes(other_file.read_bytes())
    with pytest.raises(StudyError, match=f"its training is '{of_fewer.header['training']}'"):
        fitted("a-grace", llama, cases)


def test_what_is_retrained_and_what_is_shared(llama, cases):
    trained = fitted("a-grace", llama, cases[:3]).trained
    assert torch.equal(fitted("a-grace", llama, cases[:3]).trained.encoder.first.weight, trained.encoder.first.weight)
    files = {tuple(sorted(queries_module.cache_dir().glob("encoders/*")))}
    fitted("a-grace", llama, cases[:3], steps=5)
    assert {tuple(sorted(queries_module.cache_dir().glob("encoders/*")))} == files, (
        "the value's steps are no matter of it"
    )
    reused = fitted("a-grace-wo-mean", llama, cases[:3], encoder_query="mean").trained
    assert torch.equal(reused.encoder.first.weight, trained.encoder.first.weight)
    assert not torch.equal(
        fitted("a-grace-wo-mean", llama, cases[:3]).trained.encoder.first.weight, trained.encoder.first.weight
    )
    assert not torch.equal(
        fitted("a-grace", llama, cases[1:4]).trained.encoder.first.weight, trained.encoder.first.weight
    )


def test_saved_edits_share_their_encoder(subject, cases, tmp_path):
    edits = [*fitted("a-grace", subject, cases).edit(cases), *fitted("a-grace-wo-cl", subject, cases).edit(cases[:1])]
    file = tmp_path / "edits.safetensors"
    save_edits(file, edits, subject)
    loaded = load_edits(file, subject)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert sum("encoder" in name for name in header) == 4, "one encoder, four tensors"
    requests = [Request(case.prompt, 5, n) for n, case in enumerate(cases)] + [Request(cases[0].prompt, 5, 5)]
    assert generate(subject, requests, loaded) == generate(subject, requests, edits)
    assert loaded[0].query == "mean" and loaded[5].encoder is None and not loaded[0].first_call_only


@pytest.fixture
def five_neighbours(cases):
    """The cases with all other cases' prompts as neighbours."""
    return [replace(c, unrelated=tuple(other.prompt for other in cases if other is not c)) for c in cases]


@pytest.mark.slow
def test_the_sweep_is_what_each_radius_gives(llama, five_neighbours, tmp_path, monkeypatch):
    """One evaluation with an infinite radius stands for all: the same as editing with each radius."""
    cases = five_neighbours
    monkeypatch.setattr(measurements, "PAPER_DATASET_NAMES", ("cnle",))
    monkeypatch.setattr(measurements, "RADII", 4)
    monkeypatch.setattr(measurements, "selection_cases", lambda dataset, count: (cases[:3], cases[3:] + cases[:2]))
    load = load_editor
    monkeypatch.setattr(
        measurements,
        "load_editor",
        lambda name, subject, **changes: load(name, subject, **({} if name == "none" else SMALL), **changes),
    )
    table = measurements.sweep_radius(llama, tmp_path / "radius.csv", 3, margins=[1.0])
    assert set(table["editor"]) == {"grace", "a-grace", "a-grace-wo-cl", "a-grace-wo-mean"}
    assert (table["radius"] == 1.0).groupby(table["editor"]).sum().eq(1).all()
    for name in ("a-grace", "a-grace-wo-cl"):
        rows = table[table["editor"] == name]
        assert rows["specificity_rate"].is_monotonic_decreasing and rows["specificity_rate"].nunique() > 1
        for _, row in rows[rows["radius"] > 0].iterrows():
            editor = load(name, llama, radius=row["radius"] * (1 + 1e-6), **SMALL)
            if name == "a-grace":
                editor.fit(cases[3:] + cases[:2])
            records = evaluate(llama, cases[:3], editor.edit(cases[:3]))
            for measure in ("effectiveness", "generalization", "specificity"):
                assert row[measure] == pytest.approx(records[f"{measure}_em"].mean())
            assert row["specificity_rate"] == pytest.approx(records["specificity_rate"].mean())


def test_encoders_are_compared_and_the_command_resumes(llama, five_neighbours, tmp_path, monkeypatch):
    more = [replace(case, case_id=case.case_id + 5 * n) for n in range(2) for case in five_neighbours]
    monkeypatch.setattr(encoders_module, "PAPER_DATASET_NAMES", ("cnle",))
    monkeypatch.setattr(encoders_module, "SIZES", (3,))
    monkeypatch.setattr(encoders_module, "load_cases", lambda dataset: more)
    load, asked = load_editor, []

    def counting(name, subject, **changes):
        asked.append(name)
        return load(name, subject, **{**SMALL, **TRAINING, **changes})

    monkeypatch.setattr(measurements, "load_editor", counting)
    file = tmp_path / "encoders.csv"
    table = encoders_module.compare_encoders(llama, file)
    settings = list(encoders_module.encoder_settings(2.0))
    assert len(table) == 2 * len(settings) == len(asked)
    assert (table["cases"] == 3).sum() == 2 and (table["epochs"] <= 4).all() and table["best"].between(0.5, 1).all()
    row = table.iloc[0]
    assert row["accuracy"] == pytest.approx((row["inside"] + 1 - row["neighbours_inside"]) / 2)
    kept = file.read_text().splitlines()
    file.write_text("\n".join(kept[:4]) + "\n")
    asked.clear()
    assert len(encoders_module.compare_encoders(llama, file)) == len(table) and len(asked) == len(table) - 3
    assert file.read_text().splitlines() == kept


def test_a_tuned_radius_is_the_datasets_own(subject, cases):
    values = {"layer": 2, "steps": 3}
    editor = load_editor("grace-tuned", subject, radii={"cnle": 3.5}, **values)
    for tuned, plain in zip(editor.edit(cases[:2]), load_editor("grace", subject, **values).edit(cases[:2])):
        assert tuned.radii.tolist() == [3.5] and plain.radii.tolist() == [1.0]
        assert torch.equal(tuned.keys, plain.keys)
    with pytest.raises(StudyError, match="radii: no value for 'csne'; given: cnle"):
        editor.edit([replace(cases[0], dataset="csne")])
