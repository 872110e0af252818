"""Two edits of one prompt: what is measured is what the twice edited model does."""

from dataclasses import replace

import pandas as pd
import pytest

from clme_lib.datasets import registry as datasets
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.unedited import answers_for
from clme_lib.study import conflicts
from clme_lib.support.errors import StudyError

SMALL = {"grace": {"layer": 2, "steps": 30}, "rome": {"layer": 1, "steps": 10}, "in-context": {}}


@pytest.fixture
def cases(cases):
    """With targets that even a random model learns."""
    return [replace(case, target=target) for case, target in zip(cases, ("in", "or", "to"))]


@pytest.fixture(autouse=True)
def small(monkeypatch, cases, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_cases", lambda name: cases)
    monkeypatch.setattr(datasets, "selection_ids", lambda name: {case.case_id for case in cases})
    monkeypatch.setattr(
        conflicts, "load_editor", lambda name, subject: load_editor(name, subject, **SMALL.get(name, {}))
    )


@pytest.mark.slow
def test_what_is_measured_is_what_the_twice_edited_model_does(llama, cases, tmp_path):
    file = tmp_path / "conflicts.csv"
    table = conflicts.measure_conflicts(llama, file, list(SMALL), cases=3)
    assert pd.read_csv(file).shape == table.shape == (9, 3 + len(conflicts.SHARES))
    for editor, values in SMALL.items():
        rows = table[table["editor"] == editor].set_index("case_id")
        for case, other in zip(cases, (*cases[1:], cases[0])):
            (first,) = load_editor(editor, llama, **values).edit([case])
            once = llama.edited(first)
            second = replace(case, target=other.target)
            later = load_editor(editor, llama, **values).of(once)
            (edit,) = later.edit([second])
            alone = evaluate(llama, [case], [first]).iloc[0]
            both = evaluate(once, [second], [edit]).iloc[0]
            row = rows.loc[case.case_id]
            control = load_editor(editor, llama, **values).edit([second])
            assert row["second_alone"] == evaluate(llama, [second], control).iloc[0]["effectiveness_em"]
            assert row["first"] == alone["effectiveness_em"] and row["second"] == both["effectiveness_em"]
            assert row["neighbours_first"] == alone["specificity_rate"]
            # the second's neighbours are compared with the unedited model, not with the one that holds the first
            kept = [
                text == before
                for text, before in zip(both["generated_specificity"], answers_for(llama, case.unrelated))
            ]
            assert row["neighbours_second"] == pytest.approx(sum(kept) / len(kept))
    grace = table[table["editor"] == "grace"]
    assert grace["first"].any() and grace["second"].any() and (grace["second"] + grace["still_first"] <= 1).all()
    shown = conflicts.conflict_table(table, label="tab").data
    assert list(shown["Editor"]) == ["ROME", "GRACE", "in context"] and set(shown["n"]) == {"3"}


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(llama, tmp_path, monkeypatch):
    file, edited = tmp_path / "conflicts.csv", []
    measure = conflicts._edited_twice

    def stops(editor, case, *targets):
        if len(edited) == 2:
            raise KeyboardInterrupt
        edited.append(case.case_id)
        return measure(editor, case, *targets)

    monkeypatch.setattr(conflicts, "_edited_twice", stops)
    with pytest.raises(KeyboardInterrupt):
        conflicts.measure_conflicts(llama, file, ["rome"], cases=3)
    assert not file.exists()
    monkeypatch.setattr(
        conflicts,
        "_edited_twice",
        lambda editor, case, *targets: edited.append(case.case_id) or measure(editor, case, *targets),
    )
    conflicts.measure_conflicts(llama, file, ["rome"], cases=3)
    assert len(edited) == 3 and file.exists() and not list(tmp_path.glob("*.part"))


def test_an_editor_that_has_to_learn_first_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(SMALL, "malmen", {"layers": [2, 3], "rank": 8})
    with pytest.raises(StudyError, match="malmen must be trained before it edits"):
        conflicts.measure_conflicts(llama, tmp_path / "c.csv", ["malmen"], cases=3)
