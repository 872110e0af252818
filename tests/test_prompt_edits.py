"""Edits that put text before prompts: equal to the model that is asked with the text, alone, composed, stored, in a run."""

from dataclasses import replace

import pytest
import torch
from conftest import run_config, write_source

from clme_lib.editors.registry import load_editor
from clme_lib.edits.base import Edit
from clme_lib.edits.codebooks import masked_mean
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.evaluation.generation import Request, generate
from clme_lib.evaluation.unedited import unchanged
from clme_lib.forward.prompt_keys import prompt_queries
from clme_lib.study.export import export_edits
from clme_lib.study.runs import run
from clme_lib.support.errors import StudyError

BUDGET = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def written(subject, prompts, edits=(), index=0):
    return [
        text.text for text in generate(subject, [Request(p, BUDGET, index if edits else -1) for p in prompts], edits)
    ]


def shown(case):
    return f"{case.prompt} {case.target}\n\n"


def retrieved(subject, cases, radius):
    editor = load_editor("in-context-retrieved", subject, layer=1, radii={"cnle": radius})
    return editor.edit(cases)


def between(distances):
    """A radius that the nearer half of the distances is within."""
    ordered = sorted(distances)
    middle = len(ordered) // 2
    assert ordered[middle - 1] < ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def test_in_context_reads_the_case_before_every_prompt(subject, cases):
    edits = load_editor("in-context", subject).edit(cases)
    prompts = [case.prompt for case in cases]
    for case, edit in zip(cases, edits):
        assert edit.changes_nothing is False and edit.layers == ()
        assert written(subject, prompts, [edit]) == written(subject, [shown(case) + prompt for prompt in prompts])
    # each row with an edit of its own, and rows without
    rows = [Request(prompts[0], BUDGET, n) for n in (-1, 0, 1)]
    plain = [prompts[0], shown(cases[0]) + prompts[0], shown(cases[1]) + prompts[0]]
    assert [text.text for text in generate(subject, rows, edits)] == written(subject, plain)


def test_retrieved_reads_the_nearest_case_within_its_radius_alone(subject, cases):
    first, second, third = cases[:3]
    keys = prompt_queries(subject, [case.prompt for case in cases], 1)["mean"]
    distances = (keys - keys[0]).norm(dim=-1).tolist()
    (edit,) = retrieved(subject, [first], between(distances))
    texts = generate(subject, [Request(case.prompt, BUDGET, 0) for case in cases], [edit])
    assert {text.fired for text in texts} == {True, False}
    for case, text, distance in zip(cases, texts, distances):
        assert text.distance == pytest.approx(distance, abs=1e-4) and text.fired == (distance <= edit.radii.item())
        read = shown(first) + case.prompt if text.fired else case.prompt
        assert [text.text] == written(subject, [read])
    # of several the nearest, whatever their order
    for stored in ([first, second, third], [third, first, second]):
        whole = Edit.compose(retrieved(subject, stored, 1e3))
        for case in stored:
            assert written(subject, [case.prompt], [whole]) == written(subject, [shown(case) + case.prompt])


def test_the_key_is_the_mean_over_the_prompt(llama, cases):
    (edit,) = retrieved(llama, cases[:1], 1.0)
    read = {}
    hook = llama.down_proj(1).register_forward_pre_hook(lambda _m, args: read.update(keys=args[0]))
    llama.model(llama.tokenizer(cases[0].prompt, return_tensors="pt", add_special_tokens=False)["input_ids"])
    hook.remove()
    mean = masked_mean(read["keys"], torch.ones(read["keys"].shape[:2]))
    torch.testing.assert_close(edit.keys, mean, atol=1e-5, rtol=1e-4)


def test_composed_with_edits_of_the_model(llama, cases):
    first, second = cases[:2]
    (prompt_edit,) = load_editor("in-context", llama).edit([first])
    (update,) = load_editor("rome", llama, layer=1, steps=4).edit([second])
    prompts = [case.prompt for case in cases]
    expected = written(llama.edited(update), [shown(first) + prompt for prompt in prompts])
    for whole in (Edit.compose([prompt_edit, update]), Edit.compose([update, prompt_edit])):
        assert written(llama, prompts, [whole]) == expected
        assert whole.to_outputs.layers == (1,) and [part.kind for part in whole.to_prompts] == ["prompt"]
        assert written(llama.edited(whole), prompts) == expected
    assert written(llama.edited(prompt_edit).edited(update), prompts) == expected
    both = Edit.compose(load_editor("in-context", llama).edit([first, second]))
    assert written(llama, prompts, [both]) == written(llama, [shown(first) + shown(second) + p for p in prompts])


def test_texts_before_which_nothing_is_put_are_the_unedited_ones(llama, cases):
    (far,) = retrieved(llama, cases[:1], 1e-6)
    requests = [Request(case.prompt, BUDGET, 0) for case in cases]
    known = unchanged(llama, requests, [far])
    assert set(known) == set(range(1, len(cases))), "all but its own prompt"
    assert [known[n].text for n in known] == written(llama, [cases[n].prompt for n in known])
    assert all(text.fired is False and text.distance > 0 for text in known.values())


def test_saved_and_restored(llama, cases, tmp_path):
    edits = [*load_editor("in-context", llama).edit(cases[:2]), *retrieved(llama, cases[:2], 2.0)]
    edits.append(Edit.compose(edits))
    save_edits(tmp_path / "edits.safetensors", edits, llama)
    restored = load_edits(tmp_path / "edits.safetensors", llama)
    assert [edit.sha256 for edit in restored] == [edit.sha256 for edit in edits]
    prompts = [case.prompt for case in cases]
    for before, after in zip(edits, restored):
        assert written(llama, prompts, [after]) == written(llama, prompts, [before])


def test_a_pass_over_given_tokens_an_export_and_a_later_edit_are_refused(llama, cases, tmp_path):
    (edit,) = load_editor("in-context", llama).edit(cases[:1])
    with pytest.raises(StudyError, match="puts text before prompts.*clme_lib.generate"), llama.applying([edit]):
        pass
    with pytest.raises(StudyError, match="edits of in-context are text before prompts, which weights cannot hold"):
        export_edits([edit], llama, tmp_path / "exported")
    with pytest.raises(StudyError, match="grace depends on what the model reads, and in-context has put text"):
        load_editor("grace", llama.edited(edit))
    with pytest.raises(StudyError, match="radii: no value for 'cnle'; given: other"):
        load_editor("in-context-retrieved", llama, layer=1, radii={"other": 1.0}).edit(cases[:1])


def test_a_run_scores_them(tiny, tmp_path):
    config = run_config(
        write_source(tmp_path), tmp_path / "run", editors="none,in-context,in-context-retrieved",
        set="in-context-retrieved.layer=1,in-context-retrieved.radii={cnle: 1000.0}",
    )  # fmt: skip
    records = run(config).set_index(["editor", "case_id"])
    assert not records["error"].notna().any() and len(records) == 9
    everywhere, near = records.loc["in-context"], records.loc["in-context-retrieved"]
    # the radius is as wide as the space: both read the same
    assert everywhere["generated_effectiveness"].equals(near["generated_effectiveness"])
    assert near["fired"].map(all).all() and everywhere["fired"].isna().all()
    assert not everywhere["generated_effectiveness"].equals(records.loc["none"]["generated_effectiveness"])


def test_a_prompt_with_what_is_put_before_it_has_to_fit(llama, cases):
    (edit,) = load_editor("in-context", llama).edit(cases[:1])
    long = replace(edit, texts=("word " * 600,))
    with pytest.raises(StudyError, match="tokens with what is to be written; tiny-llama reads 512"):
        generate(llama, [Request(cases[0].prompt, BUDGET, 0)], [long])
