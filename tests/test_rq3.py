"""RQ3: tables, figures and the small files that a run keeps beside its records."""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_runs import config

from clme_lib.evaluation.records import SCORED, UNSCORED
from clme_lib.study import runs
from clme_lib.study.comparisons import paired_p
from clme_lib.study.config import ReportConfig
from clme_lib.study.copies import publish
from clme_lib.study.rq3 import measurements
from clme_lib.study.rq3 import tables as rq3
from clme_lib.study.tables import read_csv
from clme_lib.support.errors import StudyError

EDITORS = "none,grace,a-grace,a-grace-wo-cl,a-grace-wo-mean"


@pytest.fixture
def both(tiny, source, tmp_path):
    """A clean run of four cases and its compat counterpart."""
    chosen = config(source, tmp_path / "rq3", editors=EDITORS, cases=4, name="rq3")
    return chosen, runs.run(chosen), measurements.compat_run(chosen)


@pytest.mark.slow
def test_tables_are_functions_of_records(both, tmp_path):
    _, clean, compat = both
    assert clean["error"].isna().all() and compat["error"].isna().all()
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.name.startswith("rq3")) == [
        "rq3",
        "rq3-compat",
    ]
    assert set(compat["preset"]) == {"compat"} and set(compat["run"]) == {"rq3-compat"}
    shown = rq3.ablation_table(clean, label="tab").data
    assert list(shown["Editor"]) == ["GRACE", "A-GRACE", "A-GRACE w/o CL", "A-GRACE w/o Mean"]
    mean = 100 * clean[clean["editor"] == "a-grace"]["generalization_bleu"].mean()
    assert f"{mean:.2f}" in shown.set_index("Editor").loc["A-GRACE", "Gen. BLEU"]
    presets = rq3.preset_table(clean, compat, label="tab").data
    assert len(presets) == 1 + 2 * 4 and set(presets["Preset"]) == {"–", "clean", "compat"}
    released = presets[(presets["Editor"] == "A-GRACE") & (presets["Preset"] == "compat")].iloc[0]
    assert released["Spec. EM"] == "100.00"
    assert rq3.preset_table(clean.assign(state=UNSCORED), compat.assign(state=UNSCORED), label="tab").data.empty
    fewer = rq3.preset_table(clean, compat[compat["case_id"] != clean["case_id"].iloc[0]], label="tab").data
    assert set(presets["n"]) == {"4"} and set(fewer["n"]) == {"3"}, "only cases that both presets have are compared"
    (compared,) = rq3.findings(clean, compat)
    assert (compared["data"], compared["cases"], compared["released"]) == ("CNLE", 4, (100.0, 4))
    kept = 100 * clean[clean["editor"] == "a-grace-wo-mean"]["specificity_rate"].mean()
    assert compared["means"].loc["a-grace-wo-mean", "specificity_rate"] == pytest.approx(kept)
    exact = 100 * clean[clean["editor"] == "a-grace"]["specificity_em"].mean()
    assert compared["repaired"] == (pytest.approx(exact), 4)
    assert next(rq3.findings(clean, compat.assign(state=UNSCORED)))["released"] is None
    assert not list(rq3.findings(clean[clean["editor"] == "grace"], compat)), "nothing to compare"


def test_paired_differences_by_hand():
    """Six cases: exact match won four times and lost never, so p = 2 / 2^4; BLEU by scipy's own test on the differences.

    By Holm the smallest of the table's ten p values is multiplied by ten, the second by nine.
    """
    won, lost = [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]
    bleu = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.3]), np.array([0.2, 0.1, 0.4, 0.1, 0.3, 0.0])
    rows = []
    for editor, em, scores in (("a-grace", won, bleu[0]), ("grace", lost, bleu[1])):
        for case, (hit, score) in enumerate(zip(em, scores)):
            row = dict.fromkeys(rq3.PAPER_SCORES, 1.0)
            row |= {"dataset": "cnle", "editor": editor, "case_id": case, "state": SCORED}
            rows.append(row | {"generalization_em": float(hit), "generalization_bleu": score})
    row_of_table = rq3.paired_table(pd.DataFrame(rows), label="tab").data.iloc[0]
    assert row_of_table["n"] == "6" and row_of_table["Eff. EM"] == "0.00<br><small>the same</small>"
    assert row_of_table["Gen. EM"].startswith("+66.67") and "p = 1.000" in row_of_table["Gen. EM"]
    assert paired_p(np.array(won)) == 0.125
    p = stats.wilcoxon(bleu[0] - bleu[1]).pvalue
    assert paired_p(bleu[0] - bleu[1]) == p
    p = 10 * p if p < 0.125 else min(1, 9 * p)
    assert (
        f"{100 * (bleu[0] - bleu[1]).mean():+.2f}" in row_of_table["Gen. BLEU"]
        and f"p = {p:.3f}" in row_of_table["Gen. BLEU"]
    )


@pytest.mark.slow
def test_distances_are_drawn_as_recorded(both):
    _, clean, _ = both
    figure = rq3.distance_figure(clean)
    for axis, editor in zip(figure.axes, ("grace", "a-grace")):
        recorded = sorted(distances[1] for distances in clean[clean["editor"] == editor]["distances"])
        assert axis.lines[0].get_ydata().tolist() == recorded
        assert axis.lines[1].get_ydata()[0] == 1.0, "the radius"
    plt.close(figure)
    counted, encoded = rq3.distance_findings(clean)
    distances = np.array([recorded[1:] for recorded in clean[clean["editor"] == "grace"]["distances"]], dtype=float)
    nearer = sum(of_case[0] < min(of_case[1:]) for of_case in distances)
    assert (counted["editor"], counted["cases"], counted["nearer"]) == ("GRACE", 4, nearer)
    assert encoded["editor"] == "A-GRACE" and counted["rephrased"] == (distances[:, 0] <= 1).sum()


def test_presets_are_compared_by_the_notebook_itself(source, tmp_path):
    with pytest.raises(StudyError, match="RQ3 runs both presets by itself"):
        measurements.compat_run(config(source, tmp_path / "rq3", editors=EDITORS, preset="compat"))


def test_the_best_radius_by_hand():
    points = [(0.0, 0.0, 1.0), (1.0, 0.2, 0.9), (2.0, 0.6, 0.8), (3.0, 0.8, 0.6), (4.0, 1.0, 0.1)]
    columns = ["radius", "generalization", "specificity_rate"]
    curve = pd.DataFrame(points, columns=columns).assign(dataset="cnle", cases=4)
    swept = pd.concat([curve.assign(editor="grace", margin=None), curve[:3].assign(editor="a-grace", margin=1.5)])
    table = rq3.radius_table(swept.reset_index(drop=True), label="tab").data
    assert table["Margin"].tolist() == ["–", "1.5"]
    assert table["Gen. EM, radius 1"].tolist() == ["20.0", "20.0"], "the paper's radius"
    assert table["Best radius"].tolist() == ["2.00", "2.00"], "0.6 + 0.8, and the smaller radius of two as good"
    assert table["Spec. kept, best"].tolist() == ["80.0", "80.0"]
    for best in rq3.radius_findings(swept.reset_index(drop=True))["CNLE"]:
        assert best[columns].tolist() == [2.0, 0.6, 0.8]
    assert best["margin"] == 1.5


@pytest.mark.slow
def test_small_files_are_made_once_and_published(both, monkeypatch, tmp_path):
    chosen, clean, _ = both
    made = []

    def sweep(subject, file, cases):
        made.append(cases)
        table = pd.DataFrame(
            [{"dataset": "cnle", "editor": editor, "margin": margin, "radius": r, "cases": 4, "generalization": r / 2, "specificity_rate": 1 - r / 2}
             for editor, margin in (("grace", None), ("a-grace-wo-cl", None), ("a-grace", 2.0)) for r in (0.0, 1.0, 2.0)]
        )  # fmt: skip
        table.to_csv(file, index=False)

    monkeypatch.setattr(measurements, "sweep_radius", sweep)
    monkeypatch.setattr(measurements, "load_subject", lambda *args: runs.load_subject())
    for _ in range(2):
        swept = measurements.sweep(chosen)
    assert made == [4] and len(swept) == 9
    figure = rq3.radius_figure(swept)
    (dot,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (50.0, 50.0), "the paper's radius"
    places = measurements.projection(chosen)
    assert list(places["query"]) == ["last"] * 7 + ["mean"] * 7 and list(places["kind"][:3]) == [
        "edit",
        "rephrased",
        "neighbour",
    ]
    assert (places[places["kind"] == "edit"]["distance"] == 0).all()
    case = places["case_id"].iloc[0]
    for query, editor in (("last", "grace"), ("mean", "a-grace")):
        (recorded,) = clean[(clean["editor"] == editor) & (clean["case_id"] == case)]["distances"]
        assert places[places["query"] == query]["distance"].tolist()[1:] == pytest.approx(recorded[1:], abs=1e-3)
    figure = rq3.projection_figure(places)
    assert len(figure.axes) == 2
    plt.close("all")
    shown_case = rq3.projection_table(places, label="tab").data
    rephrased = places[(places["query"] == "last") & (places["kind"] == "rephrased")]["distance"].iloc[0]
    assert len(shown_case) == 2 and shown_case["Rephrased"].iloc[0] == f"{rephrased:.2f}"
    alone = measurements.overhead(chosen)
    assert len(alone) == 4 * 4 and (alone["seconds"] > 0).all()
    table = rq3.overhead_table(alone, label="tab").data.set_index("Editor")
    wide = alone.pivot(index="case_id", columns="editor", values="seconds")
    assert table.loc["GRACE", "time / GRACE"] == "1.00"
    assert table.loc["A-GRACE", "time / GRACE"] == f"{(wide['a-grace'] / wide['grace']).median():.2f}"
    publish(chosen.out, tmp_path / "published")
    assert sorted(file.name for file in (tmp_path / "published").glob("*.csv")) == [
        "case_study.csv",
        "overhead.csv",
        "radius.csv",
    ]
    shown = chosen.model_copy(update={"out": tmp_path / "published"})
    assert measurements.projection(shown).equals(places) and made == [4]
    (tmp_path / "published" / "radius.csv").unlink()
    with pytest.raises(StudyError, match="radius.csv is missing from a published run of RQ3"):
        measurements.sweep(shown)


def test_the_sweep_of_another_subject_is_shown_if_there_is_one(tmp_path):
    folder = Path(__file__).parents[1] / "results" / "runs" / "smollm2-135m"
    ((subject, sweep),) = measurements.sweep_beside(ReportConfig(beside=folder)).items()
    assert subject == "smollm2-135m" and sweep.equals(pd.read_csv(folder / "radius.csv"))
    assert set(rq3.radius_findings(sweep)) == {"CNLE", "CSNE"}
    assert measurements.sweep_beside(ReportConfig(beside=tmp_path)) == {} == measurements.sweep_beside(ReportConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dataset,editor\ncnle,grace\n", "radius.csv: column 'margin' is missing: remove the file"),
        ("margin,radius,cases\n1,far,4\n", "radius.csv: column 'radius' has something else than numbers"),
        ("", "radius.csv: cannot be read as CSV"),
        ('a,b\n1,2\n"3,4,5\n', "radius.csv: cannot be read as CSV"),
    ],
)
def test_a_damaged_sweep_is_named(tmp_path, content, message):
    shutil.copy(Path(__file__).parents[1] / "results" / "runs" / "smollm2-135m" / "run.json", tmp_path)
    (tmp_path / "radius.csv").write_text(content)
    with pytest.raises(StudyError, match=message):
        measurements.sweep_beside(ReportConfig(beside=tmp_path))


def test_a_column_of_texts_is_needed_as_well(tmp_path):
    (tmp_path / "table.csv").write_text("share\n1\n")
    with pytest.raises(StudyError, match="table.csv: column 'editor' is missing"):
        read_csv(tmp_path / "table.csv", ["share"], ["editor"])
    (tmp_path / "table.csv").write_text("share,editor\n1,2\n")
    assert read_csv(tmp_path / "table.csv", ["share"], ["editor"]).to_dict("records") == [{"share": 1, "editor": 2}]
