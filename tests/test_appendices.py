"""The appendices' tables, from small measurements and from the published ones."""

from pathlib import Path

import pandas as pd
import pytest

from clme_lib.editors.registry import get_editor, resolve_hparams
from clme_lib.study.appendices import encoder_settings, lookups, selection, statistics, weight_updates
from clme_lib.study.tables import read_csv
from clme_lib.subjects.settings import load_settings
from clme_lib.support.errors import StudyError

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_selection_marks_the_chosen_setting():
    row = {
        "editor": "rome",
        "cases": 10,
        "generalization_em": 0.0,
        "specificity_rate": 0.02,
        "loss": 0.5,
        "criterion": 0.1,
    }
    measured = pd.DataFrame(
        [
            {**row, "setting": "layer 5", "effectiveness_em": 0.1, "chosen": False},
            {**row, "setting": "layer 10", "effectiveness_em": 0.7, "chosen": True},
        ]
    )
    table = selection.selection_table(measured, label="tab-grid")
    assert list(table.data["Setting"]) == ["layer 5", "**layer 10**"] and list(table.data["Eff."]) == [
        "10.0",
        "**70.0**",
    ]
    assert list(table.data["Neighbours unchanged"]) == ["2.0", "**2.0**"] and table.label == "tab-grid"


def test_presets_stand_together_by_dataset():
    row = {"cases": 20, "generalization_em": 0.1, "specificity_rate": 0.0, "loss": 0.2}
    made = {
        editor: pd.DataFrame(
            [
                {
                    **row,
                    "setting": setting,
                    "dataset": dataset,
                    "effectiveness_em": effect,
                    "released_budget_em": effect / 2,
                }
                for setting, effect in (("clean", 0.6), ("defects", 0.1))
                for dataset in ("cnle", "csne")
            ]
        )
        for editor in ("pmet", "rome")
    }
    table = selection.preset_table(made, label="tab").data
    assert list(table["Editor"]) == ["ROME"] * 4 + ["PMET"] * 4
    assert list(table["Data"][:4]) == ["CNLE", "CNLE", "CSNE", "CSNE"]
    assert list(table["Setting"][:4]) == ["clean", "defects"] * 2
    assert list(table["Eff."][:2]) == ["60.0", "10.0"] and list(table["Eff., released budget"][:2]) == ["30.0", "5.0"]


def test_subjects_have_the_values_that_were_selected():
    """Every chosen setting follows from its table by the stated rule, and is what the subject's file has."""
    files = sorted((RESULTS / "selection").glob("*.csv"))
    assert len(files) >= 27
    for file in files:
        subject, editor = file.stem.rsplit(".", 1)
        grid = pd.read_csv(file)
        values = resolve_hparams(editor, subject, load_settings(subject).subject.blocks)
        score = "generalization_em" if get_editor(editor).selects_reach else "effectiveness_em"
        for dataset, rows in grid.groupby("dataset") if "dataset" in grid else [("", grid)]:
            assert selection.choose(rows, score)["chosen"].tolist() == rows["chosen"].tolist(), (file.name, dataset)
            (setting,) = rows[rows["chosen"]]["setting"]
            names = [part.split(" ")[0] for part in setting.split(", ")]
            now = selection.describe_setting({name: getattr(values, name) for name in names}, dataset)
            assert now == setting, (file.name, dataset)


def test_published_measurements_are_shown_whole():
    def read(name):
        return pd.read_csv(RESULTS / name)

    for name, table in (
        ("diagnosis/smollm2-135m.csv", weight_updates.diagnosis_table),
        ("diagnosis/smollm2-135m.pmet.csv", weight_updates.pmet_table),
        ("statistics/smollm2-135m.csv", statistics.statistics_table),
    ):
        measured = read(name)
        shown = table(measured, label="tab").data
        assert len(shown) == len(measured) and not shown.isna().any(axis=None)
    for file in (RESULTS / "selection").glob("*.csv"):
        measured = pd.read_csv(file)
        choices = measured["dataset"].nunique() if "dataset" in measured else 1
        shown = selection.selection_table(measured, label="tab").data
        assert shown["Setting"].str.startswith("**").sum() == choices


@pytest.mark.parametrize(
    "name, columns",
    [
        ("encoders/smollm2-135m.csv", encoder_settings.COLUMNS),
        ("lookups/smollm2-135m-code.rome.csv", lookups.COLUMNS),
        ("selection/smollm2-135m.rome.csv", selection.COLUMNS),
        ("presets/smollm2-135m.rome.csv", selection.PRESET_COLUMNS),
        ("end_of_target/smollm2-135m-code.grace.csv", selection.END_COLUMNS),
        ("statistics/smollm2-135m.csv", (statistics.COLUMNS, [])),
        ("diagnosis/smollm2-135m.csv", weight_updates.COLUMNS),
        ("diagnosis/smollm2-135m.pmet.csv", weight_updates.PARTS_COLUMNS),
    ],
)
def test_a_column_that_is_missing_or_spoilt_is_named(tmp_path, name, columns):
    numbers, others = columns
    measured = read_csv(RESULTS / name, numbers, others)
    file = tmp_path / "table.csv"
    for column in (*numbers, *others):
        measured.drop(columns=column).to_csv(file, index=False)
        with pytest.raises(StudyError, match=f"table.csv: column '{column}' is missing: remove the file"):
            read_csv(file, numbers, others)
    for column in numbers:
        measured.assign(**{column: "much"}).to_csv(file, index=False)
        with pytest.raises(StudyError, match=f"table.csv: column '{column}' has something else than numbers"):
            read_csv(file, numbers, others)


def test_encoder_tables_are_means_over_both_halves():
    row = {"dataset": "cnle", "editor": "a-grace", "architecture": "released", "selection": "training", "patience": 5, "margin": 2.0,
           "accuracy": 0.5, "inside": 1.0, "neighbours_inside": 0.0, "best": 0.6, "best_radius": 1.0, "held_out": 0.5}  # fmt: skip
    measured = pd.DataFrame(
        [
            {**row, "fold": fold, "cases": cases, "accuracy": accuracy}
            for fold, cases, accuracy in (
                (0, 342, 0.8),
                (1, 343, 0.7),
                (0, 50, 0.5),
                (1, 50, 0.6),
                (0, 100, 0.6),
                (1, 100, 0.6),
            )
        ]
        + [{**row, "fold": fold, "cases": 342 + fold, "margin": 1.0, "accuracy": 0.5} for fold in (0, 1)]
    )
    settings = encoder_settings.setting_table(measured, label="tab").data
    sizes = encoder_settings.size_table(measured, label="tab").data
    assert list(settings["Margin"]) == ["2", "1"] and list(settings["Other half"]) == ["0.750", "0.500"]
    assert list(sizes["Training cases"]) == ["50", "100", "343"]
    assert list(sizes["Other half"]) == ["0.550", "0.600", "0.750"]
