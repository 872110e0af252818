"""RQ4: the runs of protocols and samples, and what table, figure and findings say of their records."""

import json
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import write_source

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.evaluation.records import SCORED
from clme_lib.study import rq4
from clme_lib.study.config import ManyEditsConfig, make_config
from clme_lib.study.copies import publish
from clme_lib.study.tables import editor_name
from clme_lib.support.errors import StudyError

SMALL = "rome.layer=1,rome.steps=3,grace.layer=2,grace.steps=3"


@pytest.fixture
def config(tiny, tmp_path):
    return make_config(
        ManyEditsConfig, subject="tiny-llama", dataset="cnle", editors="none,grace,rome", cases=3, held_out=2, samples="0,1", set=SMALL,
        source=str(write_source(tmp_path)), out=tmp_path / "many", name="tiny",
    )  # fmt: skip


@pytest.mark.slow
def test_each_protocol_and_sample_is_a_run_of_its_own(config):
    records = rq4.run_many(config)
    assert sorted(path.name for path in config.out.iterdir()) == sorted(
        f"{protocol}-{sample}" for protocol in ("sequential", "batch", "simie") for sample in (0, 1)
    )
    assert set(records["run"]) == {f"tiny-{path.name}" for path in config.out.iterdir()}
    # an editor that updates no weights cannot be joined by SimIE
    editors = records.groupby("protocol")["editor"].unique().map(set).to_dict()
    assert editors == {"sequential": {"none", "grace", "rome"}, "batch": {"none", "grace", "rome"}, "simie": {"rome"}}
    for sample in (0, 1):
        order = [case.case_id for case in sample_cases(load_cases("cnle", config.source), 5, sample)]
        own = records[records["sample"] == sample]
        assert {row.turn: row.case_id for row in own.itertuples()} == dict(enumerate(order))
        of_edits = own[~own["held_out"]]
        assert (of_edits["turn"] < of_edits["position"]).all() and (own[own["held_out"]]["turn"] >= 3).all()
        assert len(of_edits) == 7 * (1 + 3) and len(own) - len(of_edits) == 7 * 2 * 2
    assert sorted(records["position"].unique()) == [1, 3]
    again = rq4.run_many(config)
    assert list(again["start"]) == list(records["start"]), "nothing was made anew"
    # published runs may have different editors, datasets, samples and held-out cases
    published = config.model_copy(update={"out": config.out.parent / "published", "dataset": ("cnle", "csne")})
    for protocol in config.protocols:
        publish(config.out / f"{protocol}-0", published.out / f"{protocol}-0")
    (published.out / "batch-0" / "records" / "cnle.grace.jsonl").unlink()
    publish(config.out / "sequential-1", published.out / "sequential-1")
    for file in (published.out / "sequential-1" / "records").iterdir():
        lines = [line for line in file.read_text().splitlines(True) if not json.loads(line)["held_out"]]
        file.write_text("".join(lines))
    of_published = rq4.run_many(published)
    assert set(of_published["dataset"]) == {"cnle"}
    editors = of_published.groupby(["protocol", "sample"])["editor"].unique().map(set).to_dict()
    everyone = {"none", "grace", "rome"}
    assert editors == {
        ("sequential", 0): everyone, ("sequential", 1): everyone, ("batch", 0): {"none", "rome"}, ("simie", 0): {"rome"}
    }  # fmt: skip
    assert of_published.groupby("sample")["held_out"].any().to_dict() == {0: True, 1: False}
    assert not (published.out / "batch-1").exists(), "what was not published is left out, not made"
    with pytest.raises(
        StudyError, match="none of grace has records of samples 0, 1 in .*published, or can be joined by simie"
    ):
        rq4.run_many(published.model_copy(update={"editors": ("grace",), "protocols": ("simie",)}))
    with pytest.raises(StudyError, match="records of samples 9 in .*published"):
        rq4.run_many(published.model_copy(update={"samples": (9,)}))
    assert not list(published.out.glob("*-9"))
    # every row of table and figure is there
    shown = rq4.retention_table(records, label="tab").data
    assert len(shown) == 2 * (3 + 3 + 1) and set(shown["n"]) == {"2", "6"}
    figure = rq4.retention_figure(records)
    # a row of panels for each protocol and kind of editor; the unedited model is in none
    panels = [
        (axis.get_legend().get_title().get_text(), axis.get_legend_handles_labels()[1]) for axis in figure.axes[2::3]
    ]
    updated, kept = ("weights updated", ["ROME"]), ("weights unchanged", ["GRACE"])
    assert panels == [updated, kept, updated, kept, updated] and len(figure.axes) == 15
    drawn = [axis.get_legend_handles_labels() for axis in figure.axes]
    markers = {label: bars[0].get_marker() for handles, labels in drawn for bars, label in zip(handles, labels)}
    assert len(set(markers.values())) == len(markers) == 2, "each editor has a shape of its own"
    plt.close(figure)
    # datasets are not pooled
    both = pd.concat([records, records.assign(dataset="csne", effectiveness_em=0.25)])
    figure = rq4.retention_figure(both)
    labels = [axis.get_ylabel() for axis in figure.axes[::3]]
    assert len(labels) == 10 and len(set(labels)) == 6
    assert {label.split(",")[0] for label in labels} == {"CNLE", "CSNE"}
    plt.close(figure)


def test_a_sample_that_is_named_twice_is_counted_once():
    assert make_config(ManyEditsConfig, samples="1,0,1").samples == (1, 0)


def many(right, held):
    """Records of a sequence of ``held`` edits, of which case ``turn`` is right where ``right(position, turn)`` says so."""
    rows = []
    for position in (1, 10, held):
        for turn in range(position):
            score = float(right(position, turn))
            rows.append(
                {"dataset": "cnle", "protocol": "sequential", "editor": "grace", "position": position, "turn": turn, "case_id": turn, "sample": 0,
                 "state": SCORED, "effectiveness_em": score, "generalization_em": 0.0, "specificity_rate": 0.5,
                 "free_effectiveness_em": None, "edit_seconds": 2.0 + turn, "edits_mib": 0.125 * position, "held_out": False, "steps": 20, "loss": turn / 10}
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_first_and_the_last_edits_are_shown_apart():
    records = many(lambda position, turn: position < 30 or turn >= 25, 30)
    last = rq4.retention_table(records, label="tab").data.set_index("Edits").loc["30"]
    assert last["n"] == "30" and last["Eff. EM"].startswith("16.7 (")
    assert last["Eff. EM, first 10"].startswith("0.0 (") and last["Eff. EM, last 10"].startswith("50.0 (")
    assert last["s / edit"] == "16.50" and last["MiB"] == "3.75"
    ten = rq4.retention_table(records, label="tab").data.set_index("Edits").loc["10"]
    assert ten["Eff. EM"].startswith("100.0 (") and ten["Eff. EM, first 10"] == ten["Eff. EM, last 10"] == "–"
    (state,) = rq4.findings(records)
    assert state["held"] == [1, 30] and state["effectiveness_em"] == pytest.approx([1.0, 5 / 30])
    assert state["specificity_rate"] == [0.5, 0.5]


def test_cases_that_are_held_out_are_shown_apart():
    kept = many(lambda position, turn: True, 12)
    added = pd.DataFrame([
        {**kept.iloc[0].to_dict(), "editor": editor, "position": position, "turn": 12 + n, "case_id": 12 + n, "held_out": True, "effectiveness_em": 0.0, "target_loss": loss,
         "target_tokens": tokens, "free_effectiveness_executes": float(n), "fails_wrong": 1.0 - n}
        for editor, worse in (("none", 0.0), ("grace", 1.0)) for position in (1, 10, 12)
        for n, (loss, tokens) in enumerate([(1.0 + worse, 30), (3.0 + worse, 10)])
    ])  # fmt: skip
    records = pd.concat([kept, added], ignore_index=True)
    with_them = rq4.retention_table(records, label="tab").data
    pd.testing.assert_frame_equal(with_them, rq4.retention_table(kept, label="tab").data)
    assert rq4.findings(records) == rq4.findings(kept)
    shown = rq4.ability_table(records, label="tab").data.set_index(["Editor", "Edits"])
    assert len(shown) == 6 and set(shown["n"]) == {"2"}
    # by hand: (1.0 * 30 + 3.0 * 10) / 40 = 1.5 nats a token, and each case alone at the bounds
    assert (
        shown.loc[editor_name("none"), "12"]["Perplexity"]
        == f"{math.exp(1.5):.3g} ({math.exp(1.0):.3g}–{math.exp(3.0):.3g})"
    )
    assert shown.loc["GRACE", "1"]["Executes"].startswith("50.0 (")
    assert shown.loc["GRACE", "1"]["Runs"].startswith("100.0 (")
    (state,) = rq4.ability_findings(records)
    assert (state["editor"], state["held"]) == ("grace", 12)
    assert state["perplexity"] == pytest.approx([math.exp(2.5), math.exp(1.5)])
    # of pairs: every case has lost the same
    assert state["ratio"] == pytest.approx([math.e] * 3) and state["n"] == 2
    # SimIE cannot hold the unedited model's rows; another protocol's are of the same cases
    joined = records[records["editor"] == "grace"].assign(protocol="simie")
    assert [state["protocol"] for state in rq4.ability_findings(pd.concat([records, joined]))] == [
        "sequential",
        "simie",
    ]
    # a loss that is not finite is null in a record: the mean over the other cases would hide it
    lost = records.copy()
    lost.loc[(lost["editor"] == "grace") & (lost["case_id"] == 13) & (lost["position"] == 12), "target_loss"] = None
    shown = rq4.ability_table(lost, label="tab").data.set_index(["Editor", "Edits"])
    assert shown.loc["GRACE", "12"]["Perplexity"] == "∞" and shown.loc["GRACE", "10"]["Perplexity"] != "∞"
    assert rq4.ability_findings(lost) == []


def test_the_table_of_ends_has_a_common_number_of_edits():
    usual = [many(lambda position, turn: True, 12).assign(editor=editor) for editor in ("grace", "rome", "ft-l")]
    short, long = (
        many(lambda position, turn: True, held).assign(editor=name) for held, name in ((11, "memit"), (30, "pmet"))
    )
    more = long.assign(position=long["position"].replace(10, 12))
    shown = rq4.ends(pd.concat([*usual, short, more]))
    states = shown.groupby("editor")["position"].unique().map(sorted).to_dict()
    assert states == {"grace": [12], "rome": [12], "ft-l": [12], "memit": [11], "pmet": [12, 30]}
    # a number that a single sample reaches is not it, and datasets need not have the same
    twelve = [more[more["position"] < 30].assign(sample=sample) for sample in (1, 2)]
    of_csne = short.assign(dataset="csne")
    shown = rq4.ends(pd.concat([more, *twelve, of_csne]))
    states = shown.groupby(["dataset", "sample"])["position"].unique().map(sorted).to_dict()
    assert states == {("cnle", 0): [12, 30], ("cnle", 1): [12], ("cnle", 2): [12], ("csne", 0): [11]}


def test_samples_are_shown_beside_each_other():
    first = many(lambda position, turn: turn < 3, 12).assign(sample=0)
    second = many(lambda position, turn: turn < 9, 12).assign(sample=2)
    alone = first.assign(editor="rome")
    longer = pd.concat([first, first[first["position"] == 12].assign(position=30), second, alone])
    (row,) = rq4.orders_table(longer, label="tab").data.to_dict("records")
    assert (row["Editor"], row["Edits"]) == ("GRACE", "12"), "ROME has one sample; only one has thirty edits"
    assert (row["Eff. EM, sample 0"], row["Eff. EM, sample 2"]) == ("25.0", "75.0")


def test_later_edits_may_be_learnt_worse():
    losses = many(lambda position, turn: True, 30)
    quick = losses.assign(editor="ultraedit", steps=1)
    few = losses[losses["position"] < 20].assign(editor="ft-l")
    (row,) = rq4.learning_table(pd.concat([losses, quick, few]), label="tab").data.to_dict("records")
    assert (row["Editor"], row["Edits"]) == ("GRACE", "30")
    assert row["Loss, first 10"].startswith("0.45 (") and row["Loss, last 10"].startswith("2.45 (")


def test_failed_edits_are_not_counted():
    records = many(lambda position, turn: True, 12)
    records.loc[records["turn"] == 3, "state"] = "failed"
    shown = rq4.retention_table(records, label="tab").data.set_index("Edits")
    assert shown.loc["12", "n"] == "11" and shown.loc["10", "n"] == "9"
