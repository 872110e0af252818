"""Sequences of edits that are resumed, retried, shortened or cannot be evaluated: no state is lost, and no two sequences are mixed."""

import importlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import killed_at, run_config, write_source

from clme_lib.editors.alphaedit import AlphaEdit
from clme_lib.editors.base import EDITORS
from clme_lib.editors.grace import GRACE
from clme_lib.editors.locate_then_edit.second_moments import SecondMoment
from clme_lib.editors.registry import load_editor
from clme_lib.editors.rome import ROME
from clme_lib.edits.base import EditLog
from clme_lib.edits.files import load_edits, save_edits
from clme_lib.edits.weights import DenseUpdate
from clme_lib.evaluation.records import FAILED
from clme_lib.study import provenance, run_folder, runs, states, work
from clme_lib.study.copies import publish
from clme_lib.study.runs import run
from clme_lib.support.errors import CaseError, StudyError

SMALL = "rome.layer=1,rome.steps=3,memit.layers=[1,2],memit.steps=2,memit.corpus_tokens=400"


@pytest.fixture
def config(tiny, tmp_path):
    def of(**changes):
        named = {"editors": "rome", "cases": 5, "set": SMALL, "protocol": "sequential", **changes}
        return run_config(write_source(tmp_path, copies=2), named.pop("out", tmp_path / "run"), **named)

    return of


def texts(records):
    return {(row.position, row.case_id): row.generated_effectiveness for row in records.itertuples()}


def failures(records):
    return {(row.position, row.case_id): row.error for row in records[records["state"] == FAILED].itertuples()}


def test_an_earlier_state_is_evaluated_again_beside_the_kept_one(config, tmp_path, monkeypatch):
    """Held-out cases are added to a finished sequence whose last edits are not all evaluated."""
    assert len(run(config())) == 1 + 3 + 5
    more = run(config(held_out=2))
    assert Counter(more["position"]) == {1: 3, 3: 5, 5: 7}
    assert texts(more) == texts(run(config(held_out=2, out=tmp_path / "fresh")))


def test_each_edit_is_written_once_between_states_that_are_evaluated(config, tiny, tmp_path, monkeypatch):
    """Not all edits after each edit, whose time and space would grow with the square of their number."""
    edit, made, written = ROME._edit_batch, [], []

    def saved(path, edits, subject, about):
        written.append((path.name, edits[0].factors[1][0].shape[1]))
        save_edits(path, edits, subject, about)

    whole = texts(run(config(cases=8, out=tmp_path / "whole")))
    monkeypatch.setattr(states, "save_edits", saved)
    folder = run_folder.state_file(config(), "cnle", "rome").parent
    for number in (2, 6):
        monkeypatch.setattr(ROME, "_edit_batch", killed_at(edit, made, number))
        with pytest.raises(KeyboardInterrupt):
            run(config(cases=8))
    file, added = "cnle.rome.safetensors", "cnle.rome.{}.safetensors"
    resumed = [(added.format(1), 1), (file, 2), (file, 3), *((added.format(number), 1) for number in (3, 4, 5))]
    assert written == [(file, 1), *resumed] and sorted(path.name for path in folder.iterdir()) == sorted(
        {name for name, _ in written} - {added.format(1)}
    )
    # a smaller sequence uses what the larger one has, and leaves it the rest
    monkeypatch.setattr(ROME, "_edit_batch", edit)
    fewer = texts(run(config(cases=5)))
    assert {key: text for key, text in fewer.items() if key[0] < 5}.items() <= whole.items()
    assert sorted(path.name for path in folder.iterdir()) == [added.format(5), file]
    monkeypatch.setattr(ROME, "_edit_batch", killed_at(edit, made, 99))
    assert texts(run(config(cases=8))).items() >= whole.items()
    assert len(made) == 8 == len(set(made)), "each edit was made once"
    assert [path.name for path in folder.iterdir()] == [file]
    (state,) = load_edits(folder / file, tiny)
    assert state.factors[1][0].shape[1] == 8


def test_a_failed_edit_stays_out_of_a_sequence(config, monkeypatch):
    """The later edits were made without it, so its record is not made again: not by another library, and not on demand."""
    edit = ROME._edit_batch

    def fails(self, cases, tokenized):
        if cases[0].case_id == order[0]:
            raise CaseError("no luck")
        return edit(self, cases, tokenized)

    order = [case.case_id for case in runs.sampled(config(), "cnle")]
    monkeypatch.setattr(ROME, "_edit_batch", fails)
    assert set(failures(run(config()))) == {(position, order[0]) for position in (1, 3, 5)}
    monkeypatch.setattr(ROME, "_edit_batch", edit)
    with pytest.raises(StudyError, match="retry_failed: protocol=sequential made the later edits without the failed"):
        run(config(retry_failed=True))
    monkeypatch.setattr(provenance, "library_sha256", lambda: "changed")
    grown = run(config(cases=6, accept="library"))
    assert {position for position, _ in failures(grown)} == {1, 3, 5, 6}


def test_a_smaller_run_leaves_the_state_of_the_larger(tiny, config):
    def edits_held():
        (state,) = load_edits(run_folder.state_file(config(), "cnle", "rome"), tiny)
        return state.factors[1][0].shape[1]

    run(config())
    assert edits_held() == 5
    assert Counter(run(config(cases=4))["position"]) == {1: 1, 3: 3, 4: 4}
    assert edits_held() == 5
    run(config(cases=7))
    assert edits_held() == 7


def test_sequences_of_other_cases_are_not_mixed(config, monkeypatch):
    """Such as those of another ``held_out``, where a dataset has few cases with a check."""
    run(config(cases=3))
    first, second, *others = runs.sampled(config(cases="all"), "cnle")
    monkeypatch.setattr(runs, "sampled", lambda asked, _: [first, others[0], second, *others[1:]][: asked.cases])
    message = f"case 2 of the edits of cnle={second.case_id}, but .*={others[0].case_id} was requested: choose another"
    with pytest.raises(StudyError, match=message):
        run(config(cases=4))


def test_a_case_that_cannot_be_evaluated_does_not_end_the_run(tiny, config, monkeypatch):
    """Here since the texts before the prompt fill the model's positions, as of many cases in the prompt."""
    asked = config(editors="in-context,rome", held_out=1)
    order = runs.sampled(asked, "cnle")
    monkeypatch.setattr(tiny.model.config, "max_position_embeddings", 150)
    records = run(asked)
    of_prompt = failures(records[records["editor"] == "in-context"])
    assert of_prompt and not failures(records[records["editor"] == "rome"])
    assert all(
        reason.startswith("with 5 edits: CaseError: ") for (position, _), reason in of_prompt.items() if position == 5
    )
    apart = records[records["case_id"] == order[-1].case_id]
    assert apart["held_out"].all() and len(apart) == 2 * 3
    assert texts(run(asked)) == texts(records)


def test_cases_that_do_not_fit_into_memory_are_evaluated_in_halves(config, tmp_path, monkeypatch):
    whole, score, sizes = run(config(out=tmp_path / "whole")), work.score, []

    def with_little_memory(subject, cases, *given, **named):
        sizes.append(len(cases))
        if len(cases) > 2:
            raise torch.OutOfMemoryError
        return score(subject, cases, *given, **named)

    monkeypatch.setattr(work, "score", with_little_memory)
    assert texts(run(config())) == texts(whole)
    assert sizes == [1, 3, 1, 2, 5, 2, 3, 1, 2]


@pytest.mark.parametrize(("protocol", "at_once"), [("sequential", 1), ("batch", 5)])
def test_a_sequence_that_runs_out_of_memory_can_go_on(config, tmp_path, monkeypatch, protocol, at_once):
    """No edit is left out of the later ones only because memory was short."""
    edit, many = GRACE.edit_together, GRACE.edit
    whole = texts(run(config(editors="grace", protocol=protocol, out=tmp_path / "whole")))

    def without_memory(made):
        def fails(self, cases, *given, **named):
            if cases[-1].case_id == order[4]:
                raise torch.OutOfMemoryError
            return made(self, cases, *given, **named)

        return fails

    order = [case.case_id for case in runs.sampled(config(), "cnle")]
    monkeypatch.setattr(GRACE, "edit_together", without_memory(edit))
    monkeypatch.setattr(GRACE, "edit", without_memory(many))
    asked = config(editors="grace", protocol=protocol)
    with pytest.raises(
        StudyError, match=rf"grace: out of memory while editing \(cases at once: {at_once}\); free some"
    ):
        run(asked)
    monkeypatch.setattr(GRACE, "edit_together", edit)
    monkeypatch.setattr(GRACE, "edit", many)
    assert texts(run(asked)) == whole


def test_cases_that_do_not_fit_into_memory_are_edited_in_halves(llama, cases, monkeypatch):
    """Unless a batch size was requested: then it is the caller's to change."""
    edit, sizes = GRACE._edit_batch, []
    editor = load_editor("grace", llama, layer=2, steps=2)
    alike = [replace(cases[0], case_id=n) for n in range(5)]
    whole = editor.edit(alike)

    def with_little_memory(self, cases, tokenized):
        sizes.append(len(cases))
        if len(cases) > 2:
            raise torch.OutOfMemoryError
        return edit(self, cases, tokenized)

    monkeypatch.setattr(GRACE, "_edit_batch", with_little_memory)
    parts = editor.edit(alike)
    assert sizes == [5, 2, 3, 1, 2] and [edit.case_id for edit in parts] == [0, 1, 2, 3, 4]
    for made, expected in zip(parts, whole):
        for name, tensor in made.tensors().items():
            torch.testing.assert_close(tensor, expected.tensors()[name])
    with pytest.raises(torch.OutOfMemoryError):
        editor.edit(alike, batch_size=5)


def test_statistics_that_are_learnt_are_prepared_once(config, monkeypatch):
    """With ``lookup_weight`` they need cases, and all copies of the editor share them."""
    adjusted, made = SecondMoment.adjusted, []
    monkeypatch.setattr(SecondMoment, "adjusted", lambda self, *given: made.append(1) or adjusted(self, *given))
    records = run(config(editors="memit", cases=3, set=f"{SMALL},memit.lookup_weight=1.0"))
    assert len(records) == 1 + 3 and not failures(records)
    assert len(made) == 2, "a moment for each layer"


def test_projections_are_those_of_the_cases_learnt_from_last(llama, cases, monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    options = {"layers": (1, 2), "corpus_tokens": 400, "eigenvalue_threshold": 1e9, "lookup_weight": 1.0}
    editor = load_editor("alphaedit", llama, **options)
    assert isinstance(editor, AlphaEdit)
    editor.fit(cases[:1])
    first = editor.projections
    editor.fit(cases[2:4])
    assert editor.projections is not first


def test_a_log_without_a_peak_is_stored(llama, tmp_path):
    """Some systems do not report how much memory was used."""
    log = EditLog(steps=2, losses=(1.0, 0.5), peak_memory_mib=float("nan"))
    edit = DenseUpdate(1, "x", layer=1, delta=torch.ones(llama.hidden_size, llama.inner_size), log=log)
    save_edits(tmp_path / "edits.safetensors", [edit], llama)
    (restored,) = load_edits(tmp_path / "edits.safetensors", llama)
    assert restored.log.losses == log.losses and restored.log.peak_memory_mib != restored.log.peak_memory_mib
    with pytest.raises(ValueError, match="JSON"):
        save_edits(tmp_path / "other.safetensors", [edit], llama, {"loss": float("nan")})
    assert not (tmp_path / "other.safetensors").exists()


def test_a_run_without_records_is_not_published(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ROME, "_edit_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config())
    file = run_folder.records_file(config(), "cnle", "rome")
    assert not file.exists()
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(
        StudyError, match=r"cnle.rome.jsonl has no records yet: run the same command again, then publish"
    ):
        publish(config().out, tmp_path / "published")


def test_a_sequence_does_not_go_on_with_other_statistics(config, tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(8):
        (texts / f"{n}.txt").write_text(f"a text of number {n}, and some more words for the model to read. " * 4)
    changes = {"editors": "none,memit", "set": f"{SMALL},memit.corpus={texts}"}
    run(config(cases=1, **changes))
    assert len(run(config(cases=2, **changes))) == 2 * (1 + 2), "the same texts"
    (texts / "3.txt").write_text("other words " * 40)
    with pytest.raises(StudyError, match="memit gathered its statistics from other texts when the run started"):
        run(config(cases=3, **changes))
    assert run(config(cases=3, editors="none"))["position"].max() == 3, "an editor without statistics goes on"


def test_a_run_does_not_go_on_with_another_packages_changed_code(config, tmp_path, monkeypatch):
    package = tmp_path / "site" / "slight_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    source = "from clme_lib.editors.rome import ROME\n\n\nclass Slight(ROME):\n    name, title = 'slight', 'Slight'\n"
    (package / "editor.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    slight = importlib.import_module("slight_package.editor").Slight
    try:
        own = {"editors": "slight", "set": "slight.layer=1,slight.steps=3"}
        run(config(cases=1, **own))
        (package / "editor.py").write_text(f"{source}    default_batch = 2\n")
        with pytest.raises(StudyError, match="holds a run with code of slight=.*or pass --accept library if"):
            run(config(cases=2, **own))
        assert len(run(config(cases=2, accept="library", **own))) == 1 + 2
    finally:
        EDITORS._entries.pop(slight.name)
