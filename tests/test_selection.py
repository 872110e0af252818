"""Choosing hyperparameters, and measuring what the released program's defects do."""

from dataclasses import replace

import pandas as pd
import pytest

from clme_lib.datasets import registry as datasets
from clme_lib.editors.base import EDITORS
from clme_lib.editors.registry import get_editor, load_editor, resolve_hparams
from clme_lib.study.appendices import selection
from clme_lib.support.errors import StudyError


@pytest.fixture
def small_sets(cases, monkeypatch, tmp_path):
    """Two selection cases a dataset, three others."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_cases", lambda name: [replace(case, dataset=name) for case in cases])
    monkeypatch.setattr(datasets, "selection_ids", lambda _name: {1, 3})


def measured(*scores):
    return pd.DataFrame({"setting": list("abcdef")[: len(scores)], "effectiveness_em": scores, "specificity_rate": 1.0})


def test_the_first_good_enough_is_chosen_else_the_best():
    assert list(selection.choose(measured(0.1, 0.96, 0.99), "effectiveness_em")["chosen"]) == [False, True, False]
    assert list(selection.choose(measured(0.3, 0.1 + 0.2), "effectiveness_em")["chosen"]) == [True, False], "rounding"
    assert list(selection.choose(measured(0.1, 0.3, 0.2), "effectiveness_em")["chosen"]) == [False, True, False]
    assert selection.criterion(0.0, 0.0) == 0 and selection.criterion(1.0, 0.5) == pytest.approx(2 / 3)
    assert selection.criterion(0.7, 0.0) > selection.criterion(0.1, 0.02)


def test_grids_start_at_the_papers_values():
    reduced = {"iterations", "records"}  # MALMEN's training is shorter in every setting
    grids = {editor: EDITORS[editor].selection_grid for editor in EDITORS if EDITORS[editor].selection_grid}
    without = {"none", "in-context", "a-grace-wo-cl", "a-grace-wo-mean"}  # nothing to select, or A-GRACE's is theirs
    assert set(grids) == {name for name in EDITORS if get_editor(name).__module__.startswith("clme_lib.")} - without
    assert {len(grid) for grid in grids.values()} == {8}  # none is searched for longer than another
    for editor, grid in grids.items():
        paper = resolve_hparams(editor, "codellama-7b", 30, values="transferred").model_dump()
        assert {name: paper[name] for name in grid[0] if name not in reduced} == {
            name: value for name, value in grid[0].items() if name not in reduced
        }
        assert len({str(values) for values in grid}) == len(grid)


def test_published_selections_are_the_subjects_values():
    """What the committed tables mark as chosen is what the YAML holds."""
    from pathlib import Path

    folder = Path(__file__).parent.parent / "results" / "selection"
    files = sorted(folder.glob("*.csv"))
    assert files
    for file in files:
        subject, editor, _ = file.name.split(".")
        table = pd.read_csv(file)
        own = resolve_hparams(editor, subject).model_dump()
        for chosen in table[table["chosen"]].itertuples():
            names = [part.split(" ")[0] for part in chosen.setting.split(", ")]
            dataset = getattr(chosen, "dataset", "cnle")
            assert selection.describe_setting({name: own[name] for name in names}, dataset) == chosen.setting
        assert table["chosen"].sum() == (table["dataset"].nunique() if "dataset" in table else 1)
        losses = selection.selection_table(table, label="tab").data["Loss"]
        assert [cell.strip("*") == "–" for cell in losses] == list(table["loss"].isna())


@pytest.mark.slow
def test_select_measures_every_setting(llama, small_sets, monkeypatch, tmp_path):
    monkeypatch.setattr(EDITORS["grace"], "selection_grid", [{"layer": 1, "steps": 2}, {"layer": 2, "steps": 40}])
    table = selection.select(llama, "grace", tmp_path / "table.csv")
    assert list(table["cases"]) == [4, 4] and table["chosen"].sum() == 1
    assert table["loss"][1] < table["loss"][0]
    written = pd.read_csv(tmp_path / "table.csv")
    assert list(written["setting"]) == ["layer 1, steps 2", "layer 2, steps 40"]
    with pytest.raises(StudyError, match="'none' has no grid of hyperparameters"):
        selection.select(llama, "none", tmp_path / "other.csv")
    table = selection.select(llama, "grace", tmp_path / "one.csv", cases=1, datasets=["csne"])
    assert list(table["cases"]) == [1, 1]


def test_how_far_an_edit_reaches_is_selected_for_each_dataset(llama, small_sets, monkeypatch, tmp_path):
    grid = [{"radii": {"cnle": radius, "csne": radius}, "layer": 1, "steps": 2} for radius in (1e-6, 1e6)]
    monkeypatch.setattr(EDITORS["grace-tuned"], "selection_grid", grid)

    def scores(subject, cases, edits):
        reach = {"cnle": edits[0].radii[0] > 1, "csne": edits[0].radii[0] < 1}[cases[0].dataset]
        return pd.DataFrame([{**dict.fromkeys(selection.SCORES, 0.5), "generalization_em": float(reach)}])

    monkeypatch.setattr(selection, "evaluate", scores)
    table = selection.select(llama, "grace-tuned", tmp_path / "table.csv")
    assert list(table[table["chosen"]]["dataset"]) == ["cnle", "csne"]
    assert [text.split(",")[0] for text in table[table["chosen"]]["setting"]] == ["radii 1e+06", "radii 1e-06"]
    shown = selection.selection_table(table, label="tab").data["Data"]
    assert {cell.strip("*") for cell in shown} == {"CNLE", "CSNE"}


def test_budgets_are_counted():
    rows = [{"editor": "grace", "setting": setting, "cases": 20} for setting in "abc"]
    of_datasets = [
        {"editor": "a-grace", "setting": s, "dataset": d, "cases": 10} for d in ("cnle", "csne") for s in "ab"
    ]
    uneven = [{"editor": "rome", "setting": "a", "cases": 10}, {"editor": "rome", "setting": "b", "cases": 20}]
    measured = {made[0]["editor"]: pd.DataFrame(made) for made in (of_datasets, rows, uneven)}
    shown = selection.budget_table(measured, label="tab").data.set_index("Editor")
    assert shown["Settings"].to_dict() == {"ROME": "2", "GRACE": "3", "A-GRACE": "2"}
    assert shown["Cases each"].to_dict() == {"ROME": "10 to 20", "GRACE": "20", "A-GRACE": "20"}
    assert shown["Edits"].to_dict() == {"ROME": "30", "GRACE": "60", "A-GRACE": "40"}
    assert "for each dataset" in shown["Chosen by"]["A-GRACE"] and "for each" not in shown["Chosen by"]["GRACE"]


@pytest.mark.slow
def test_learning_to_stop_is_measured(llama, small_sets, monkeypatch, tmp_path):
    quick = lambda name, subject, **named: load_editor(name, subject, **named, layer=2, steps=200, lr=0.05, bound=9.0)  # noqa: E731
    monkeypatch.setattr(selection, "load_editor", quick)
    table = selection.compare_ends(llama, "ft-l", tmp_path / "table.csv", cases=2)
    assert list(table["setting"]) == ["end_of_target False"] * 2 + ["end_of_target True"] * 2
    assert list(table["stops"]) == [0.0, 0.0, 1.0, 1.0] and list(table["effectiveness_em"]) == [1.0] * 4
    assert table["overrun"][0] > 0 and list(table["overrun"][2:]) == [0.0, 0.0]
    shown = selection.end_table({"ft-l": pd.read_csv(tmp_path / "table.csv")}, label="tab").data
    assert list(shown["End of text"]) == ["–", "learnt"] * 2 and list(shown["Stops"]) == ["0.0", "100.0"] * 2
    with pytest.raises(StudyError, match="'none' learns no target that an end of text could follow"):
        selection.compare_ends(llama, "none", tmp_path / "other.csv")


@pytest.mark.slow
def test_presets_are_every_combination_of_defects(llama, small_sets, monkeypatch, tmp_path):
    quick = lambda name, subject, **named: load_editor(name, subject, **named, layer=1, steps=3)  # noqa: E731
    monkeypatch.setattr(selection, "load_editor", quick)
    table = selection.compare_presets(llama, "rome", tmp_path / "table.csv", cases=1)
    assert list(table["setting"][::2]) == [
        "padding aligned, targets in-context",
        "padding aligned, targets alone",
        "padding released, targets in-context",
        "padding released, targets alone",
    ]
    assert list(table["dataset"]) == ["cnle", "csne"] * 4
    assert list(table["cases"]) == [1] * 8 and table["released_budget_em"].notna().all()
    assert table["loss"].nunique() == 4  # the fixture gives both datasets the same case
    with pytest.raises(
        StudyError,
        match="'grace' has no presets to compare; editors that have some: rome, memit, pmet, malmen, a-grace",
    ):
        selection.compare_presets(llama, "grace", tmp_path / "other.csv")


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(llama, small_sets, monkeypatch, tmp_path):
    monkeypatch.setattr(EDITORS["grace"], "selection_grid", [{"layer": 1, "steps": 2}, {"layer": 2, "steps": 3}])
    evaluated, evaluate = [], selection.evaluate

    def counting(subject, cases, edits, **options):
        if len(evaluated) == 3:
            raise ConnectionError
        evaluated.append(edits[0].log.steps)
        return evaluate(subject, cases, edits, **options)

    monkeypatch.setattr(selection, "evaluate", counting)
    file = tmp_path / "table.csv"
    with pytest.raises(ConnectionError):
        selection.select(llama, "grace", file)
    assert not file.exists()
    monkeypatch.setattr(
        selection, "evaluate", lambda *args: (evaluated.append(args[2][0].log.steps), evaluate(*args))[1]
    )
    resumed = selection.select(llama, "grace", file)
    assert evaluated == [2, 2, 3, 3] and sorted(file.name for file in tmp_path.glob("table*")) == ["table.csv"]
    assert selection.select(llama, "grace", tmp_path / "whole.csv").equals(resumed)


def test_a_trained_editor_learns_from_the_other_cases(llama, small_sets, monkeypatch, tmp_path):
    learnt = []
    monkeypatch.setattr(
        EDITORS["malmen"], "fit", lambda self, cases, edited: learnt.append({case.case_id for case in cases})
    )
    monkeypatch.setattr(EDITORS["malmen"], "edit", lambda self, cases: load_editor("none", llama).edit(cases))
    with selection._done_beside(tmp_path / "t.csv") as done:
        selection.measure(llama, "malmen", [{"records": 3, "layers": [2, 3]}], done, values="transferred")
    assert learnt == [{0, 2, 4}, {0, 2, 4}]
