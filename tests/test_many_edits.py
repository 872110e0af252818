"""Protocols that put many edits into one model: what is edited from which state, what is evaluated when, and that it goes on where it stopped."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import killed_at, run_config, write_source

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.grace import GRACE
from clme_lib.editors.registry import load_editor
from clme_lib.editors.rome import ROME
from clme_lib.edits.base import Edit
from clme_lib.edits.codebooks import Codebook
from clme_lib.edits.files import load_edits
from clme_lib.edits.simie import simie
from clme_lib.edits.weights import DenseUpdate, LowRankUpdate
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.forward.recording import recorded
from clme_lib.forward.tokens import encode, tokenize
from clme_lib.study import run_folder, spot_check, tables
from clme_lib.study.config import RunConfig
from clme_lib.study.copies import publish
from clme_lib.study.export import export_edits
from clme_lib.study.protocols import get_protocol, milestones
from clme_lib.study.runs import run, sampled
from clme_lib.support.errors import CaseError, StudyError

SMALL = "rome.layer=1,rome.steps=4,grace.layer=2,grace.steps=4,ft-l.layer=2,ft-l.steps=3,a-grace.layer=2,a-grace.steps=3,a-grace.epochs=2"
SCALED = {"initial": 0.01, "relative": True}  # m of simie-scaled, in squared norms of the first key


@pytest.fixture
def config(tiny, tmp_path):
    def of(**changes):
        named = {"editors": "rome", "cases": 5, "set": SMALL, "protocol": "sequential", **changes}
        return run_config(write_source(tmp_path), named.pop("out", tmp_path / "run"), **named)

    return of


def ordered(config):
    return sample_cases(load_cases("cnle", config.source), config.cases, config.sample)


def texts(records):
    """What was written for each case at each position."""
    return {(row.position, row.case_id): row.generated_effectiveness for row in records.itertuples()}


def test_milestones():
    assert milestones(1) == [1] and milestones(3) == [1, 3] and milestones(5) == [1, 3, 5]
    assert milestones(100) == [1, 3, 10, 30, 100] and milestones(1000)[-2:] == [300, 1000]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rome", "ft-l", "grace"])
def test_each_edit_is_made_of_the_model_that_holds_the_earlier_ones(tiny, config, name):
    asked = config(editors=name)
    records = run(asked)
    assert sorted(records["position"].unique()) == [1, 3, 5] and len(records) == 1 + 3 + 5
    subject, cases = tiny, ordered(asked)
    edits = []
    for case in cases:
        (edit,) = load_editor(name, subject, **asked.set[name]).edit([case])
        edits.append(edit)
        subject = tiny.edited(Edit.compose(edits))
    for position in (1, 3, 5):
        whole = Edit.compose(edits[:position])
        alone = evaluate(tiny, cases[:position], [replace(whole, case_id=case.case_id) for case in cases[:position]])
        expected = {(position, case.case_id): text for case, text in zip(cases, alone["generated_effectiveness"])}
        assert expected.items() <= texts(records).items()
    # seconds and losses are each edit's own
    last = records[records["position"] == 5].set_index("case_id")
    for case, edit in zip(cases, edits):
        assert last.loc[case.case_id, "loss"] == pytest.approx(edit.log.losses[-1], rel=1e-4)
        assert last.loc[case.case_id, "steps"] == edit.log.steps


def test_a_killed_sequence_goes_on_with_the_edit_in_flight(tiny, config, tmp_path, monkeypatch):
    whole = run(config(out=tmp_path / "whole"))
    edit, made = ROME._edit_batch, []

    for number in (2, 4):
        monkeypatch.setattr(ROME, "_edit_batch", killed_at(edit, made, number))
        with pytest.raises(KeyboardInterrupt):
            run(config())
    monkeypatch.setattr(ROME, "_edit_batch", killed_at(edit, made, 99))
    records = run(config())
    assert made == [case.case_id for case in ordered(config())], "each edit was made once, in the sample's order"
    assert texts(records) == texts(whole)
    # the last state is an edits file with all edits, which can be taken away
    (state,) = load_edits(run_folder.state_file(config(), "cnle", "rome"), tiny)
    assert state.delta(1).shape == tiny.down_proj(1).weight.shape and state.factors[1][0].shape[1] == 5
    export_edits([state], tiny, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_more_edits_go_on_from_the_kept_state(config, monkeypatch):
    edit, made = ROME._edit_batch, []
    monkeypatch.setattr(ROME, "_edit_batch", lambda self, *given: made.append(1) or edit(self, *given))
    run(config(cases=4))
    assert len(made) == 4
    records = run(config(cases=5))
    assert len(made) == 4 + 1
    assert sorted(records["position"].unique()) == [1, 3, 4, 5]


def test_another_order_or_another_training_is_another_run(config):
    run(config(editors="none,a-grace", cases=3))
    with pytest.raises(StudyError, match="sample=0, but sample=1 was requested"):
        run(config(editors="none", cases=3, sample=1))
    with pytest.raises(StudyError, match="cases of cnle=3, but cases of cnle=2 was requested"):
        run(config(editors="a-grace", cases=2))
    run(config(editors="none", cases=2))


def test_another_dataset_of_a_run_may_be_held_out_differently(config):
    asked = config(editors="a-grace", cases=2, held_out=1)
    edited = run(asked).drop_duplicates("case_id").query("not held_out")["case_id"].tolist()
    without = asked.model_copy(update={"held_out": 0})
    run_folder.check_same_run(without.model_copy(update={"dataset": ("csne",)}), edited={"csne": [1, 2, 3]})
    with pytest.raises(StudyError, match="held_out=1, but held_out=0 was requested"):
        run_folder.check_same_run(without, edited={"cnle": edited})


def test_a_trained_editor_learns_from_the_cases_that_are_not_edited(config, monkeypatch):
    from clme_lib.editors.a_grace import AGRACE

    fit, seen = AGRACE.fit, []
    monkeypatch.setattr(
        AGRACE, "fit", lambda self, cases, edited=(): (seen.append((cases, edited)), fit(self, cases, edited))[1]
    )
    asked = config(editors="a-grace", cases=3)
    assert len(run(asked)) == 1 + 3
    ((learnt_from, edited),) = seen
    assert [case.case_id for case in edited] == [case.case_id for case in ordered(asked)]
    assert {case.case_id for case in learnt_from} == set(range(5)) - {case.case_id for case in edited}
    with pytest.raises(
        StudyError, match="a-grace has to learn from cases of cnle that are not edited, but only 0 are left"
    ):
        run(config(editors="a-grace", cases=5, out=asked.out.with_name("all")))


def test_a_case_that_cannot_be_edited_is_left_out_of_the_model(tiny, config, tmp_path, monkeypatch):
    bad = ordered(config())[1].case_id
    edit = GRACE._edit_batch

    def fails(self, cases, tokenized):
        if bad in [case.case_id for case in cases]:
            raise CaseError(f"case {bad}: no luck")
        return edit(self, cases, tokenized)

    monkeypatch.setattr(GRACE, "_edit_batch", fails)
    for protocol in ("sequential", "batch"):
        asked = config(editors="grace", protocol=protocol, out=tmp_path / protocol)
        records = run(asked)
        failed = records[records["state"] == "failed"]
        assert set(failed["case_id"]) == {bad} and list(failed["position"]) == [3, 5]
        assert failed["error"].str.contains("no luck").all()
        assert len(records) == 1 + 3 + 5


def test_a_batch_is_made_together_of_the_unedited_model(tiny, config, monkeypatch):
    together, seen = GRACE.edit_together, []
    monkeypatch.setattr(
        GRACE, "edit_together", lambda self, cases: (seen.append((self.subject, len(cases))), together(self, cases))[1]
    )
    records = run(config(editors="grace", protocol="batch"))
    assert seen == [(tiny, 1), (tiny, 3), (tiny, 5)]
    cases = ordered(config())
    whole = Edit.compose(load_editor("grace", tiny, layer=2, steps=4).edit(cases))
    expected = evaluate(tiny, cases, [replace(whole, case_id=case.case_id) for case in cases])
    written = texts(records)
    assert [written[5, case.case_id] for case in cases] == expected["generated_effectiveness"].tolist()


def test_a_published_sequence_is_read_as_it_was(config, tmp_path):
    asked = config(cases=4)
    records = run(asked)
    published = tmp_path / "published"
    assert publish(asked.out, published) == len(records) == 1 + 3 + 4
    assert not list(published.rglob("*.png")), "RQ1's figure is of single edits"
    assert not (published / "states").exists()
    again = run(config(cases=4, out=published, name=None))
    assert texts(again) == texts(records)


def changed_copy(subject, edit, layer):
    """The subject's model with an edit's update in its weights."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight += edit.delta(layer)
    return model


def test_cases_that_are_held_out_show_what_else_the_model_can_do(tiny, config, tmp_path):
    asked = config(editors="none,in-context,rome", cases=3, held_out=2)
    records = run(asked)
    order = sample_cases(load_cases("cnle", asked.source), 5, asked.sample)
    held_out = {case.case_id: case for case in order[3:]}
    assert len(records) == 3 * ((1 + 2) + (3 + 2))
    assert set(records["case_id"]) == {case.case_id for case in order}
    apart = records["case_id"].isin(held_out)
    assert records["held_out"].tolist() == records["target_loss"].notna().tolist() == apart.tolist()
    assert (records[apart]["steps"] == 0).all() and records[apart]["effectiveness_em"].notna().all()
    # by transformers, of a model whose weights were really changed
    cases, edits, subject = order[:3], [], tiny
    for case in cases:
        edits += load_editor("rome", subject, layer=1, steps=4).edit([case])
        subject = tiny.edited(Edit.compose(edits))
    for editor, position in (("none", 3), ("rome", 1), ("rome", 3)):
        model = tiny.model if editor == "none" else changed_copy(tiny, Edit.compose(edits[:position]), 1)
        rows = records[apart & (records["editor"] == editor) & (records["position"] == position)]
        assert len(rows) == 2
        for row in rows.itertuples():
            case = held_out[row.case_id]
            tokens = tokenize(tiny.tokenizer, case.prompt, case.target)
            ids, count = torch.tensor([[*tokens.prompt_ids, *tokens.target_ids]]), len(tokens.target_ids)
            labels = ids.clone()
            labels[0, :-count] = -100
            with torch.no_grad():
                expected = model(input_ids=ids, labels=labels).loss.item()
            assert row.target_loss == pytest.approx(expected, rel=1e-3) and row.target_tokens == count
    # the size is that of the tensors of all edits of the state; a prompt and the unedited model have none
    of_rome = records[records["editor"] == "rome"].groupby("position")["edits_mib"].unique()
    for position, sizes in of_rome.items():
        parts = [tensor for edit in edits[:position] for tensor in edit.tensors().values()]
        assert sizes == pytest.approx(sum(4 * tensor.numel() for tensor in parts) / 2**20)
    assert set(of_rome.index) == {1, 3} and (records[records["editor"] != "rome"]["edits_mib"] == 0).all()
    # the prompt of an edit acts on them as well
    of_prompt, unedited = (records[apart & (records["editor"] == name)] for name in ("in-context", "none"))
    assert (of_prompt["target_loss"].to_numpy() != unedited["target_loss"].to_numpy()).all()
    # more of them are evaluated in states that are made again; published records are read as they were
    published = tmp_path / "published"
    assert publish(asked.out, published) == len(records)
    again = run(config(editors="none,in-context,rome", cases=3, held_out=2, out=published, name=None))
    assert texts(again) == texts(records)
    assert again["target_loss"].equals(records["target_loss"])


def test_cases_whose_answers_can_be_run_are_held_out_first():
    """Of embedded CNLE about half of the cases have a check; the others are held out only where these do not suffice."""
    asked = RunConfig(subject="smollm2-135m-code", dataset="cnle", editors="rome", protocol="sequential", cases="all")
    order = [case.case_id for case in sampled(asked, "cnle")]
    checks = {case.case_id: case.check for case in load_cases("cnle", "embedded")}
    with_check = [case_id for case_id in order if checks[case_id]]
    for count in (20, len(with_check), len(with_check) + 3):
        few = sampled(asked.model_copy(update={"cases": 5, "held_out": count}), "cnle")
        edited, apart = ([case.case_id for case in part] for part in (few[:5], few[5:]))
        without = [case_id for case_id in order if not checks[case_id]]
        more = max(count - len(with_check), 0)
        assert set(apart) == {*with_check[-count:], *without[len(without) - more :]}
        assert apart == [case_id for case_id in order if case_id in set(apart)]
        assert edited == [case_id for case_id in order if case_id not in set(apart)][:5]


def test_a_run_that_grows_keeps_its_held_out_cases(config, tmp_path, monkeypatch):
    """They are the last of the order, so that all states are evaluated on the same cases."""
    edit, made = ROME._edit_batch, []
    monkeypatch.setattr(ROME, "_edit_batch", lambda self, *given: made.append(1) or edit(self, *given))
    held_out = ordered(config(cases=None))[-1]
    run(config(cases=2, held_out=1))
    grown = run(config(cases=4, held_out=1))
    assert len(made) == 4, "edits are not made again"
    assert set(grown[grown["held_out"]]["case_id"]) == {held_out.case_id}
    assert Counter(grown["position"]) == {1: 2, 2: 3, 3: 4, 4: 5}
    fresh = run(config(cases=4, held_out=1, out=tmp_path / "fresh"))
    assert texts(fresh).items() <= texts(grown).items()
    # what was asked for earlier is a part of it, here and as a published run
    assert Counter(run(config(cases=2, held_out=1))["position"]) == {1: 2, 2: 3}
    assert publish(config().out, tmp_path / "published") == len(grown)
    asked = config(cases=3, held_out=1, out=tmp_path / "published", name=None)
    assert Counter(run(asked)["position"]) == {1: 2, 2: 3, 3: 4}
    with pytest.raises(StudyError, match="held_out=2: .* is a published run; its held_out is 0 or 1"):
        run(config(cases=3, held_out=2, out=tmp_path / "published", name=None))
    # the summary of a run shows each state, without the cases that are held out
    assert tables.summary(grown)["n"].tolist() == [1, 2, 3, 4]


def test_states_of_other_edits_are_not_compared(config, tmp_path):
    here, other = (run(config(cases=3, held_out=1, sample=n, out=tmp_path / str(n))) for n in (0, 1))
    other = other.assign(
        sha256_effectiveness=other["sha256_effectiveness"].map(lambda hashes: ["0" * 64] * len(hashes))
    )
    assert set(here["case_id"]) & set(other["case_id"]), "cases in common, in states of other edits"
    with pytest.raises(StudyError, match="nothing to compare"):
        spot_check.compare(here[here["position"] == 1], other[other["position"] == 1])
    assert spot_check.compare(here, here).table["cases"].tolist() == [1 + 1 + 3 + 1]


def test_cases_are_held_out_of_many_edits_only(config, monkeypatch):
    from clme_lib.editors.a_grace import AGRACE

    with pytest.raises(StudyError, match="held_out=2: protocol=single edits each case in the unedited model"):
        run(config(protocol="single", cases=3, held_out=2))
    with pytest.raises(StudyError, match="cases=4: cnle has only 3 cases to draw from besides the 2 that are held out"):
        run(config(cases=4, held_out=2))
    with pytest.raises(StudyError, match="held_out=5: cnle has 5 cases; leave some to edit"):
        run(config(cases=None, held_out=5))
    seen = []
    fit = AGRACE.fit
    monkeypatch.setattr(AGRACE, "fit", lambda self, cases, edited=(): (seen.extend(cases), fit(self, cases, edited))[1])
    asked = config(editors="a-grace", cases=2, held_out=1)
    run(asked)
    assert {case.case_id for case in seen} == set(range(5)) - {case.case_id for case in sampled(asked, "cnle")}, (
        "nor learnt from"
    )
    with pytest.raises(StudyError, match="held_out=1, but held_out=0 was requested"):
        run(config(editors="a-grace", cases=2))


@pytest.mark.parametrize("name", ["simie", "simie-scaled"])
def test_simie_reuses_edits_and_joins_them(tiny, config, monkeypatch, name):
    edit, made = ROME._edit_batch, []
    monkeypatch.setattr(
        ROME, "_edit_batch", lambda self, cases, *given: made.extend(cases) or edit(self, cases, *given)
    )
    records = run(config(protocol=name))
    cases = ordered(config())
    assert [case.case_id for case in made] == [case.case_id for case in cases], "each is made once"
    editor = load_editor("rome", tiny, layer=1, steps=4)
    edits = editor.edit(cases)
    whole = simie(edits, lambda layer: editor.lookup_keys(cases, layer), **({} if name == "simie" else SCALED))
    expected = evaluate(tiny, cases, [replace(whole, case_id=case.case_id) for case in cases])
    written = texts(records)
    assert [written[5, case.case_id] for case in cases] == expected["generated_effectiveness"].tolist()
    (first,) = load_editor("grace", tiny, layer=2, steps=2).edit(cases[:1])
    with pytest.raises(StudyError, match="SimIE joins updates of weights, but the edits of grace do not"):
        simie([first], lambda layer: editor.lookup_keys(cases[:1], layer))


@pytest.mark.parametrize("lookup", ["colon", "content"])
def test_simie_joins_at_the_token_where_an_edit_is_written(tiny, config, lookup):
    """With m small beside its key, a first edit keeps nearly all of what it adds there."""
    case = ordered(config())[0]
    case = replace(case, prompt=f"{case.prompt.removesuffix(':')}\nCode:")
    editor = load_editor("rome", tiny, layer=1, steps=4, lookup=lookup)
    edits = editor.edit([case])
    joined = get_protocol("simie-scaled").join(editor, [case], edits)
    before = case.prompt if lookup == "colon" else case.prompt.rpartition("\n")[0]
    ids = torch.tensor([encode(tiny.tokenizer, before)])
    with torch.no_grad(), recorded(tiny.blocks[1], "keys") as seen:
        tiny.model(input_ids=ids)
    key = seen["keys"][0, -1]
    added, kept = edits[0].delta(1) @ key, joined.delta(1) @ key
    assert added.norm() > 0 and torch.allclose(kept, added / 1.01, rtol=1e-3, atol=1e-6)
    released = load_editor("rome", tiny, layer=1, steps=4, padding="released")
    with pytest.raises(
        StudyError, match="with padding: released the token at which an edit is written is not the prompt's"
    ):
        get_protocol("simie").join(released, [case], edits)


def test_simie_equals_the_plain_loop():
    draw = torch.Generator().manual_seed(4)
    keys = torch.randn(6, 12, generator=draw)
    edits = [
        LowRankUpdate(n, "x", factors={1: (torch.randn(8, 2, generator=draw), torch.randn(2, 12, generator=draw))})
        if n % 2
        else DenseUpdate(n, "x", layer=1, delta=torch.randn(8, 12, generator=draw))
        for n in range(6)
    ]
    for initial in (1e4, 0.5):
        precision, weight = initial * torch.eye(12, dtype=torch.double), torch.zeros(8, 12, dtype=torch.double)
        for key, edit in zip(keys.double(), edits):
            precision = precision + torch.outer(key, key)
            delta = edit.deltas()[1].double()
            weight = weight + (delta - weight) @ torch.outer(key, key) @ torch.linalg.inv(precision)
        ratio = initial / (keys[0].double() @ keys[0].double()).item()
        for given in ({"initial": initial}, {"initial": ratio, "relative": True}):
            joined = simie(edits, lambda layer: {1: keys}[layer], **given)
            torch.testing.assert_close(joined.delta(1).double(), weight, rtol=1e-4, atol=1e-6)


def test_plans_evaluate_all_that_is_held(cases):
    for name in ("sequential", "batch", "simie", "simie-scaled"):
        for step in get_protocol(name).plan(cases):
            held = step.position
            assert not step.evaluated or list(step.evaluated) == cases[:held]


def memory(case_id, key, target, radius=1.0, value=0.0):
    return Codebook(
        case_id, "grace", layer=1, keys=torch.tensor([key]), values=torch.full((1, 3), value), radii=torch.tensor([radius]),
        targets=torch.tensor([target]),
    )  # fmt: skip


@pytest.mark.parametrize(
    "second, keys, radii, values",
    [
        # the balls do not meet
        (memory(2, [3.0, 0.0], 7, value=2.0), [[0.0, 0.0], [3.0, 0.0]], [1.0, 1.0], [1.0, 2.0]),
        # the same target, outside the old radius and within it
        (memory(2, [1.5, 0.0], 7, value=2.0), [[0.0, 0.0]], [1.5], [1.0]),
        (memory(2, [0.5, 0.0], 7, value=2.0), [[0.0, 0.0]], [1.0], [1.0]),
        # another target
        (memory(2, [0.0, 1.5], 8, value=2.0), [[0.0, 0.0], [0.0, 1.5]], [0.75, 0.75], [1.0, 2.0]),
        # the very key: the later edit counts
        (memory(2, [0.0, 0.0], 8, value=2.0), [[0.0, 0.0]], [1.0], [2.0]),
    ],
)
def test_a_memory_grows_by_the_rule_of_grace(second, keys, radii, values):
    whole = Edit.compose([memory(1, [0.0, 0.0], 7, value=1.0), second])
    assert whole.keys.tolist() == keys and whole.values[:, 0].tolist() == values
    assert whole.radii.tolist() == pytest.approx(radii, rel=1e-3)
    # a key that a radius was widened to reach is inside, however its distance is rounded when it is looked up
    if radii == [1.5]:
        assert all(bool(whole.nearest(second.keys * (1 + off))[1]) for off in (-1e-6, 1e-6))
    assert len(whole.targets) == len(keys)
    # an edit whose targets nobody knows is put beside the others
    beside = Edit.compose([memory(1, [0.0, 0.0], 7), replace(second, targets=None)])
    assert len(beside.keys) == (1 if second.keys.tolist() == [[0.0, 0.0]] else 2) and beside.targets is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, values",
    [
        ("grace", {"layer": 2, "steps": 30}),
        ("neuraldb", {"layer": 1, "steps": 8, "gate": 0.9, "clamp": 20.0}),
        ("in-context-retrieved", {"layer": 1, "radii": {"cnle": 0.1}}),
    ],
)
def test_the_last_of_two_edits_of_one_prompt_counts(subject, cases, monkeypatch, tmp_path, name, values):
    """Also where a target is edited back: what is written is what the last edit alone makes the model write."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    first, second = cases[0], replace(cases[0], target=cases[1].target)
    editor = load_editor(name, subject, **values)
    made = [editor.edit([case])[0] for case in (first, second, first)]
    alone = evaluate(subject, [first, second, first], made)["generated_effectiveness"].tolist()
    assert made[0].sha256 == made[2].sha256 != made[1].sha256
    whole = made[0]
    for edit, expected in zip(made[1:], alone[1:]):
        whole = Edit.compose([whole, edit])
        assert whole.sha256 == edit.sha256
        assert evaluate(subject, [first], [whole])["generated_effectiveness"].tolist() == [expected]
