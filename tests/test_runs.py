"""Runs: resuming, extending, refusing; records; the notebook's parameters; the spot check; publishing."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_config as config

from clme_lib.cli import main
from clme_lib.datasets import published
from clme_lib.datasets.cases import Case
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.editors.malmen.editor import MALMEN
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.records import FAILED, SCORED, UNSCORED, read_records
from clme_lib.metrics.base import TEXTS
from clme_lib.study import provenance, run_folder, runs, work
from clme_lib.study.copies import publish
from clme_lib.study.notebook import config_from_notebook
from clme_lib.study.rq1 import examples, findings, proficiency_figure, proficiency_table, transfer_table
from clme_lib.study.spot_check import agreement_table, compare, describe
from clme_lib.study.tables import interval
from clme_lib.study.tables import scored as scored_records
from clme_lib.study.work import Work, circumstances_of
from clme_lib.support.display import inline_code
from clme_lib.support.errors import StudyError
from clme_lib.support.journal import append_rows, read_rows


def test_a_run_is_completed_extended_and_never_repeated(tiny, source, tmp_path):
    out = tmp_path / "run"
    first = runs.run(config(source, out))
    assert list(first["editor"]) == ["none"] * 3 + ["grace"] * 3
    assert first["error"].isna().all() and first["fluency"].notna().all()
    assert (first[first["editor"] == "none"]["specificity_em"] == 1).all()
    files = {path: path.read_bytes() for path in (out / "records").glob("*")}
    again = runs.run(config(source, out))
    assert files == {path: path.read_bytes() for path in (out / "records").glob("*")}
    pd.testing.assert_frame_equal(first, again)
    more = runs.run(config(source, out, cases=5, editors="none,grace"))
    assert len(more) == 10 and not more.duplicated(["editor", "case_id"]).any()
    for path, before in files.items():
        assert path.read_bytes().startswith(before), "what was recorded stays as it was"
    manifest = json.loads((out / "run.json").read_text())
    assert len(manifest["starts"]) == 2 and manifest["starts"][0]["hyperparameters"]["grace"]["values"]["steps"] == 30
    assert set(json.loads((out / "folds.json").read_text())) == {"cnle"}


def test_scores_can_wait(tiny, source, tmp_path, capsys):
    """A run without scores, scored afterwards, is the run with scores; its own records stay as they are."""
    now, later = (config(source, tmp_path / name, scored=scored) for name, scored in (("now", True), ("later", False)))
    whole = runs.run(now)
    assert runs.run(later)["state"].eq(UNSCORED).all() and scored_records(runs.run(later)).empty
    before = {file: file.read_bytes() for file in (later.out / "records").iterdir()}
    assert main(["score", str(later.out), str(tmp_path / "scored")]) == 0
    assert f"{len(whole)} records scored" in capsys.readouterr().out
    filled = run_folder.load_run(tmp_path / "scored")
    varying = ("edit_seconds", "peak_memory_mib", "run", "start")
    shared = [name for name in whole.columns if name not in varying]
    pd.testing.assert_frame_equal(filled[shared], whole[shared])
    assert before == {file: file.read_bytes() for file in (later.out / "records").iterdir()}
    assert main(["score", str(later.out), str(tmp_path / "scored")]) == 1
    assert "already exists" in capsys.readouterr().err


def test_trained_editors_learn_from_the_other_fold(tiny, source, tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    load_editor = work.load_editor
    small = {"layers": [2, 3], "rank": 8, "iterations": 2}
    monkeypatch.setattr(work, "load_editor", lambda *given, **named: load_editor(*given, **named, **small))
    learnt, edited = [], []
    fit, edit = MALMEN.fit, MALMEN.edit
    monkeypatch.setattr(
        MALMEN, "fit", lambda self, cases, edited: (learnt.append({c.case_id for c in cases}), fit(self, cases))
    )
    monkeypatch.setattr(
        MALMEN,
        "edit",
        lambda self, cases, **named: (edited.append((len(learnt), cases)), edit(self, cases, **named))[1],
    )
    records = runs.run(config(source, tmp_path / "run", editors="malmen", cases=5))
    assert records["error"].isna().all() and len(records) == 5
    halves = json.loads((tmp_path / "run" / "folds.json").read_text())["cnle"]
    assert learnt == [set(halves[1]), set(halves[0])]
    for fits, cases in edited:
        assert not learnt[fits - 1] & {case.case_id for case in cases}
    assert sorted(records["fold"]) == sorted([0] * len(halves[0]) + [1] * len(halves[1]))


def test_what_an_editor_prepared_is_recorded(tiny, source, tmp_path, monkeypatch):
    load_editor = work.load_editor
    monkeypatch.setattr(work, "load_editor", lambda *given, **named: load_editor(*given, **named, steps=2, layer=1))
    runs.run(config(source, tmp_path / "run", editors="rome", cases=2))
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    contexts = start["setup"]["rome"]["contexts"]
    assert contexts[0] == "" and len(contexts) == 6 and all(context.endswith(". ") for context in contexts[1:])
    assert start["hyperparameters"]["rome"]["values"]["padding"] == "aligned"
    runs.run(config(source, tmp_path / "compat", editors="rome", cases=2, preset="compat"))
    (start,) = json.loads((tmp_path / "compat" / "run.json").read_text())["starts"]
    assert start["hyperparameters"]["rome"]["values"]["padding"] == "released"


@pytest.mark.slow
def test_a_torn_record_is_cut_and_redone(tiny, source, tmp_path):
    whole = runs.run(config(source, tmp_path / "whole"))
    out = tmp_path / "torn"
    runs.run(config(source, out))
    file = out / "records" / "cnle.grace.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    resumed = runs.run(config(source, out))
    columns = [
        c
        for c in whole.columns
        if c not in ("edit_seconds", "edit_batch", "peak_memory_mib", "distances", "loss", "run", "start")
    ]
    pd.testing.assert_frame_equal(resumed[columns], whole[columns])


@pytest.mark.slow
def test_records_do_not_depend_on_the_batch(tiny, source, tmp_path):
    singly = runs.run(config(source, tmp_path / "one", batch_size=1, cases=5, editors="ft-l,grace"))
    together = runs.run(config(source, tmp_path / "five", batch_size=5, cases=5, editors="ft-l,grace"))
    for name in TEXTS:
        assert list(singly[f"sha256_{name}"]) == list(together[f"sha256_{name}"])


def test_another_configuration_is_refused(tiny, source, tmp_path):
    runs.run(config(source, tmp_path / "run"))
    with pytest.raises(StudyError, match="holds a run with seed=42, but seed=1 was requested"):
        runs.run(config(source, tmp_path / "run", seed=1, cases=4))


def test_a_changed_case_is_refused(tiny, source, tmp_path):
    runs.run(config(source, tmp_path / "run", cases=5))
    source.write_text(source.read_text().replace("xs.sort()", "ys.sort()"))
    from clme_lib.datasets.registry import _load

    _load.cache_clear()
    with pytest.raises(StudyError, match="run.json: .* holds a run with the cases of cnle="):
        runs.run(config(source, tmp_path / "run", cases=5))


def test_one_bad_case_spoils_no_other(tiny, source, tmp_path):
    cases = published.read(source, CNLE)
    bad = Case(2, "cnle", cases[2].prompt, "  ", cases[2].rephrased, cases[2].unrelated)
    editor = load_editor("grace", tiny, steps=2, layer=1)
    start = {"id": "1", "library": "l", "commit": "c"}
    configured = config(source, tmp_path / "run")
    working = Work(configured, tiny, editor, circumstances_of(configured, "grace", "cnle", cases, start))
    records = working.attempt([cases[0], bad, cases[1]])
    assert [record.state for record in records] == [SCORED, FAILED, SCORED]
    assert "case 2 of cnle" in records[1].error and records[1].scores is None
    assert {(record.start, record.library, record.commit) for record in records} == {("1", "l", "c")}


def test_evaluate_is_a_row_per_case(tiny, cases):
    from clme_lib.editors.registry import load_editor

    table = evaluate(tiny, cases, load_editor("grace", tiny).edit(cases))
    assert list(table["case_id"]) == [case.case_id for case in cases]
    assert all(len(distances) == 1 + 1 + 2 for distances in table["distances"])
    assert all(distances[0] < 1e-2 for distances in table["distances"])
    with pytest.raises(StudyError, match="one edit per case"):
        evaluate(tiny, cases, load_editor("none", tiny).edit(cases[:2]))


def in_notebook(parameters, **others):
    """The configuration from a notebook with these parameters in its cell, and other names in its namespace."""
    cell = "\n".join(f"{name}: object = ..." for name in parameters)
    return config_from_notebook({"In": ["", cell, "%matplotlib inline", "x = 1"], "_hidden": 1, **parameters, **others})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"editor": "grace"},
            r"unknown parameter 'editor' \(did you mean 'editors'\?\); known: subject, dataset",
        ),
        ({"cases": "many"}, "cases: .*integer"),
        ({"editors": "grace,rome2"}, "unknown editor 'rome2'; known: none, ft-l, rome, memit, pmet, malmen, grace"),
        ({"set": "grace.radius=-1"}, "smollm2-135m: editors.grace: radius: .*greater than 0"),
        (
            {"set": "grace.radios=1"},
            "editors.grace: radios: unknown key .*known: end_of_target, layer, steps, lr, radius",
        ),
        ({"set": "grace=1"}, "'grace=1' is not of the form editor.hyperparameter=value"),
        (
            {"protocol": "sequence"},
            "unknown protocol 'sequence'; known: batch, sequential, simie, simie-scaled, single",
        ),
        ({"metrics": "em"}, "unknown metric 'em'; known: effectiveness_em"),
        ({"dataset": "conala"}, "unknown dataset 'conala'"),
        ({"preset": "dirty"}, "preset: .*'clean' or 'compat'"),
        ({"cases": 0}, "cases: .*greater than or equal to 1"),
    ],
)
def test_notebook_parameters_are_checked(values, message):
    with pytest.raises(StudyError, match=message):
        in_notebook({"subject": "smollm2-135m", **values})


def test_a_notebooks_own_names_are_no_parameters():
    """The cell can be run again after the others."""
    imported = {"pd": pd, "Case": Case, "main": main, "records": pd.DataFrame({"n": [1]})}
    first = in_notebook({"subject": "smollm2-135m"}, seed_of_something=7, **imported)
    assert in_notebook({"subject": "smollm2-135m"}, config=first, **imported) == first
    # a parameter is checked, whatever its type
    assert in_notebook({"out": Path("elsewhere")}).out == Path("elsewhere")
    with pytest.raises(StudyError, match="cases: .*integer"):
        in_notebook({"cases": pd.DataFrame()})
    # what papermill passes counts, whether the cell lists it or not; a cell without types is no parameter cell
    cells = ["cases: int = 8", "# Parameters\ncases = 2\nset = 'grace.steps=3'\n", "seed = 'none'"]
    passed = config_from_notebook({"In": cells, "cases": 2, "set": "grace.steps=3", "seed": "none"})
    assert (passed.cases, passed.set, passed.seed) == (2, {"grace": {"steps": 3}}, 42)


def test_notebook_parameters_may_be_text():
    chosen = in_notebook({"cases": "8", "dataset": "cnle", "editors": "none, grace", "within": ""})
    assert (chosen.cases, chosen.dataset, chosen.editors, chosen.within) == (
        8,
        ("cnle",),
        ("none", "grace"),
        None,
    )
    assert [in_notebook({"cases": text}).cases for text in ("all", "None", "")] == [None] * 3


def test_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    append_rows(path, [{"n": 1}, {"n": 2}])
    with path.open("ab") as file:
        file.write(b'{"n": 3')
    assert read_rows(path) == [{"n": 1}, {"n": 2}]
    append_rows(path, [{"n": 4}])
    assert read_rows(path) == [{"n": 1}, {"n": 2}, {"n": 4}]
    path.write_bytes(b'{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(StudyError, match="line 2: cannot be read as UTF-8 JSON"):
        read_rows(path)


def test_records_are_checked(tiny, source, tmp_path):
    runs.run(config(source, tmp_path / "run", cases=1, editors="none"))
    file = tmp_path / "run" / "records" / "cnle.none.jsonl"
    (row,) = read_rows(file)
    for change, message in (
        ({"schema_version": 1}, "schema_version 1, expected 2; .*migrate.py"),
        ({"scores": {"fluency": "high"}}, "scores.fluency: .*number"),
        ({"flunecy": 1.0}, "flunecy: unknown key"),
    ):
        file.write_text(json.dumps({**row, **change}) + "\n")
        with pytest.raises(StudyError, match=message):
            read_records([file])
    file.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(StudyError, match="a second record of case"):
        read_records([file])


def test_publishing_keeps_cnle_texts_and_hashes_of_csne(tiny, source, tmp_path):
    code = tmp_path / "EditCodeSearchNet.json"
    mined = [CSNE.prompt(f"def f{n}(): return {n}") for n in range(14)]
    published.write(code, [Case(n, "csne", mined[n], "Return it.", (mined[n + 2],), tuple(mined[4:9])) for n in (0, 1)])
    runs.run(config(code, tmp_path / "code", dataset="csne", cases=2))
    publish(tmp_path / "code", tmp_path / "out-code")
    published_run = run_folder.load_run(tmp_path / "out-code")
    assert published_run["generated_effectiveness"].isna().all() and published_run["sha256_effectiveness"].notna().all()

    runs.run(config(source, tmp_path / "run", cases=2))
    runs.run(config(source, tmp_path / "run", cases=4, editors="none"))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["starts"][0]["commit"] = manifest["starts"][1]["commit"] = "unknown"
    manifest["starts"][1]["library"] = "another"
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    assert publish(tmp_path / "run", tmp_path / "out") == 4 + 2
    table = run_folder.load_run(tmp_path / "out")
    assert table["generated_effectiveness"].notna().all()
    assert (tmp_path / "out" / "proficiency.png").stat().st_size > 1000
    starts = json.loads((tmp_path / "out" / "run.json").read_text())["starts"]
    assert starts[0]["commit"] == provenance.commit(), "the library is this one, so its commit is known"
    assert starts[1]["commit"] == "unknown"
    with pytest.raises(StudyError, match="already exists"):
        publish(tmp_path / "run", tmp_path / "out")


def test_publishing_takes_the_largest_finished_sample(tiny, source, tmp_path):
    runs.run(config(source, tmp_path / "run", cases=2))
    runs.run(config(source, tmp_path / "run", cases=5, editors="none"))
    file = tmp_path / "run" / "records" / "cnle.none.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert publish(tmp_path / "run", tmp_path / "out") == 2 + 2, "the larger one was interrupted"
    file.write_text("".join(lines))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    for start in manifest["starts"]:
        del start["finished"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    assert publish(tmp_path / "run", tmp_path / "whole") == 5 + 2, "what was completed by several starts is whole"
    file.write_text("".join(lines[:1]))
    with pytest.raises(StudyError, match="none has not finished on cnle"):
        publish(tmp_path / "run", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_published_run_is_only_read(tiny, source, tmp_path):
    runs.run(config(source, tmp_path / "run", cases=2))
    runs.run(config(source, tmp_path / "run", cases=4, editors="none"))
    publish(tmp_path / "run", tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    table = runs.run(config(source, tmp_path / "out", cases=5))
    assert table.groupby("editor").size().to_dict() == {"none": 4, "grace": 2}
    assert len(runs.run(config(source, tmp_path / "out", cases=1))) == 2
    with pytest.raises(StudyError, match="published run and has no records of ft-l on cnle"):
        runs.run(config(source, tmp_path / "out", editors="none,ft-l"))
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    # repeating a part of it draws cases that all of the editors have
    both = {case.case_id for case in runs.sampled(config(source, "x", cases=None, within=tmp_path / "out"), "cnle")}
    only = runs.sampled(config(source, "x", cases=None, within=tmp_path / "out", editors="none"), "cnle")
    assert both == set(table[table["editor"] == "grace"]["case_id"]) and len(only) == 4


def test_spot_check_counts_and_fails(tiny, source, tmp_path):
    table = runs.run(config(source, tmp_path / "run", cases=5))
    same = compare(table, table.copy(deep=True))
    assert same.passed and not same.differences and (same.agreement == 1).all()
    assert same.table["greedy"].tolist() == [5 * 9, 5 * 9] and same.table["sampled"].tolist() == [10, 10]
    changed = table.copy(deep=True)
    row = changed.index[changed["editor"] == "grace"][0]
    changed.at[row, "sha256_specificity"] = ["0"] * 5
    comparison = compare(table, changed)
    assert comparison.agreement["grace"] == pytest.approx(40 / 45) and comparison.agreement["none"] == 1
    assert not comparison.passed and len(comparison.differences) == 5
    assert "FAILED" in describe(comparison)
    shown = agreement_table(comparison, label="tab-here")
    assert shown.label == "tab-here" and shown.data.iloc[:, 4].tolist() == ["45", "40"]
    moved = table.copy(deep=True)
    first = moved.index[moved["editor"] == "none"][0]
    moved.at[first, "effectiveness_bleu"] += 0.06  # 1.2 points over five cases
    assert not compare(table, moved).passed
    with pytest.raises(StudyError, match="nothing to compare"):
        compare(table, table.assign(subject="other"))


def test_report_is_computed_from_records(tiny, source, tmp_path):
    table = runs.run(config(source, tmp_path / "run", cases=5))
    shown = proficiency_table(table, label="tab-scores")
    none = shown.data[shown.data["Editor"] == "unedited"].iloc[0]
    assert none["Spec. EM"].startswith("100.00") and none["n"] == "5"
    mean = 100 * table[table["editor"] == "grace"]["effectiveness_bleu"].mean()
    assert f"{mean:.2f}" in shown.data[shown.data["Editor"] == "GRACE"].iloc[0]["Eff. BLEU"]
    bundle = shown._repr_mimebundle_()
    assert ":name: tab-scores" in bundle["text/markdown"] and "<table" in bundle["text/html"]
    assert none["Spec. kept"].startswith("100.00")
    kept = 100 * table[table["editor"] == "grace"]["specificity_rate"].mean()
    assert f"{kept:.2f}" in shown.data[shown.data["Editor"] == "GRACE"].iloc[0]["Spec. kept"]
    assert not shown.data["FL."].str.contains("strong").any()
    figure = proficiency_figure(table)
    assert figure.axes[0].get_title() == "CNLE, 5 cases per editor"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GRACE"]
    plt.close(figure)
    unscored = proficiency_figure(table.assign(state=UNSCORED))
    assert "clme score" in " ".join(text.get_text() for text in [*unscored.texts, *unscored.axes[0].texts])
    plt.close(unscored)
    shares = findings(table)["CNLE"]
    assert shares["best"]["effectiveness"][0] == ["GRACE"]
    twins = pd.concat([table, table[table["editor"] == "grace"].assign(editor="ft-l")])
    assert findings(twins)["CNLE"]["best"]["effectiveness"][0] == ["GRACE", "FT-L"]
    assert not findings(table[table["editor"] == "none"])
    own = table[table["editor"] == "grace"]
    both = own["effectiveness_em"].mean() >= 0.5 and own["specificity_em"].mean() >= 0.5
    assert list(shares["careful"]) == (["GRACE"] if both else [])
    perfect = table.assign(effectiveness_em=1.0, specificity_em=1.0, generalization_em=0.25)
    assert findings(perfect)["CNLE"]["careful"] == {"GRACE": 0.25}
    nothing = transfer_table(table, label="tab")
    assert nothing.data.empty and "(nothing to show)" in nothing.to_myst(), "one dataset has nothing to compare"
    case, written = next(examples(table, published.read(source, CNLE)))
    assert case.case_id == min(table["case_id"]) and list(written["Editor"]) == ["unedited", "GRACE"]
    (unedited,) = table[(table["case_id"] == case.case_id) & (table["editor"] == "none")]["generated_effectiveness"]
    assert written["effectiveness"].iloc[0] == inline_code(unedited[0])
    assert not list(examples(table, []))


def test_intervals():
    wilson = interval([1] * 9 + [0], binary=True)
    # Wilson's formula by hand for 9 of 10 at z = 1.959964
    assert (wilson.mean, round(wilson.low, 4), round(wilson.high, 4)) == (0.9, 0.5958, 0.9821)
    spread = interval([0.0, 1.0] * 50, binary=False)
    assert spread.low < 0.5 < spread.high and 0.15 < spread.high - spread.low < 0.25
    same = interval([0.3] * 20, binary=False)
    assert same.mean == pytest.approx(0.3) and np.isnan(same.low), "resampling would call it certain"
    for value, binary in ((0.0, False), (1.0, False), (0.0, True), (1.0, True)):
        certain = interval([value] * 20, binary=binary)
        assert certain == interval([value] * 20, binary=True) and 0 <= certain.low < certain.high <= 1
    assert np.isnan(interval([1.0] * 20, binary=False, shares=False).low), "bits are no share"
    assert interval([1.0, float("nan"), 0.0], binary=True) == interval([1.0, 0.0], binary=True)
    assert interval([float("nan")], binary=True).n == 0
    assert interval([1.0, 0.5, 0.0, 1.0], binary=True).n == 4, "means over several texts are no 0/1 values"
