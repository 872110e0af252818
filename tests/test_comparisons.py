"""Paired tests, Holm's correction, and which rows of a table are in bold."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clme_lib.evaluation.records import SCORED
from clme_lib.metrics.base import get_metric
from clme_lib.metrics.paper import PAPER_METRICS
from clme_lib.study.comparisons import SIGNIFICANT, as_good_as_the_best, holm, paired_p
from clme_lib.study.rq1 import prompt_findings, prompt_table, protocol_table, reach_table, transfer_findings
from clme_lib.study.tables import interval, mean_over_tokens, score_rows


def test_paired_tests_are_exact_for_shares_and_ranks_else():
    assert paired_p(np.zeros(9)) == 1.0
    assert paired_p(np.array([1] * 6 + [0] * 4)) == 2 / 2**6
    assert paired_p(np.array([1, 1, 1, -1])) == stats.binomtest(3, 4).pvalue
    differences = np.array([0.2, -0.1, 0.3, 0.0, 0.4])
    assert paired_p(differences) == stats.wilcoxon(differences[differences != 0]).pvalue
    assert paired_p(np.array([0.0, 0.4, 0.0])) == 1.0 and paired_p(np.array([0.4, 0.2])) == 0.5
    # exact with ties as well: of the 2^10 signs, two are at least as far apart; differences equal but for rounding are ties
    tied = np.array([0.1 + 0.2, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.4, 0.4] + [0.0] * 90)
    assert paired_p(tied) == pytest.approx(2 / 2**10)
    assert paired_p(tied) == paired_p(np.where(tied == 0.1 + 0.2, 0.3, tied))


def test_of_equal_means_the_row_with_most_cases_is_compared_with():
    """Three fewer cases would make the difference of the third row look like chance."""
    few, all_of_them, worse = [1] * 5 + [None] * 15, [1] * 20, [1] * 10 + [0] * 10
    bold = {
        editor
        for _, editor, _ in as_good_as_the_best(
            rows(few=few, whole=all_of_them, worse=worse), [get_metric("effectiveness_em")]
        )
    }
    assert bold == {"few", "whole"}


def test_holm_by_hand():
    # (m - rank) times the p value, never less than one before it
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_only_raises(p_values):
    adjusted = holm(dict(enumerate(p_values)))
    for n, p in enumerate(p_values):
        assert p <= adjusted[n] <= 1
        assert all(adjusted[n] <= adjusted[m] for m, other in enumerate(p_values) if p < other)
    assert min(adjusted.values()) == pytest.approx(min(1, len(p_values) * min(p_values)))


def rows(**values) -> pd.DataFrame:
    """Records of editors with these effectivenesses, for cases 0, 1, ...; None where an editor lacks a case."""
    made = []
    for editor, of_editor in values.items():
        for case_id, value in enumerate(of_editor):
            if value is not None:
                row = dict.fromkeys(PAPER_METRICS, 0.5) | {"effectiveness_em": float(value), "fluency": 4.0}
                row |= {
                    "dataset": "cnle",
                    "editor": editor.replace("_", "-"),
                    "case_id": case_id,
                    "position": 1,
                    "state": SCORED,
                }
                made.append(row)
    return pd.DataFrame(made)


def bold(records) -> set[str]:
    names = as_good_as_the_best(records, [get_metric("effectiveness_em")])
    return {editor for _, editor, _ in names}


def test_what_is_not_significantly_worse_than_the_best_is_in_bold():
    best, near, far = [1] * 20, [1] * 17 + [0] * 3, [1] * 8 + [0] * 12
    assert bold(rows(grace=best, rome=near, memit=far)) == {"grace", "rome"}
    assert 2 / 2**3 > SIGNIFICANT > 2 * 2 / 2**12
    table = {row["Editor"]: row["Eff. EM"] for row in score_rows(rows(grace=best, rome=near, memit=far))}
    assert [name for name, cell in table.items() if "strong" in cell] == ["GRACE", "ROME"]


def test_editors_are_compared_on_the_cases_they_share():
    # On its own cases memit reaches less, on those that it shares with the best as much.
    assert bold(rows(grace=[1] * 12 + [1] * 12, memit=[1] * 12 + [None] * 12)) == {"grace", "memit"}
    worse_there = rows(grace=[1] * 12 + [0] * 1, memit=[0] * 12 + [None])
    assert bold(worse_there) == {"grace"}


def test_one_of_many_comparisons_needs_more():
    """Six of six lost cases are p = 0.03 alone; among twenty editors it is no finding."""
    best, worse = [1] * 12, [1] * 6 + [0] * 6
    assert bold(rows(grace=best, rome=worse)) == {"grace"}
    others = {f"other_{n}": [1] * 7 + [0] * 5 for n in range(20)}
    assert "rome" in bold(rows(grace=best, rome=worse, **others))


def test_the_unedited_row_is_never_best_and_its_own_answers_are_no_finding():
    records = rows(none=[1] * 10, grace=[0] * 10)
    assert bold(records) == {"grace"}
    shown = {row["Editor"]: row for row in score_rows(records)}
    assert "small" not in shown["unedited"]["Spec. EM"] and "small" in shown["unedited"]["Eff. EM"]


def test_a_metric_that_a_record_lacks_is_not_measured():
    records = rows(grace=[1, 0, 1], rome=[1, 1, 1]).assign(free_effectiveness_em=[1.0, None, 0.0, None, None, None])
    shown = {row["Editor"]: row for row in score_rows(records, ["free_effectiveness_em", "stops"])}
    assert shown["ROME"]["Eff. free EM"] == "–" and "n = 2" in shown["GRACE"]["Eff. free EM"]
    assert shown["GRACE"]["Stops"] == "–" and shown["GRACE"]["n"] == "3"


def beside_the_prompt(**effectiveness) -> pd.DataFrame:
    """Records whose three measures are all given by ``effectiveness``, but for a memory, which keeps the neighbours and nothing else."""
    made = rows(**effectiveness)
    same = made["effectiveness_em"]
    kept = same.where(made["editor"] != "grace", 1.0)
    return made.assign(generalization_em=same, specificity_rate=kept)


def test_editors_beside_the_case_in_the_prompt_by_hand():
    half = [1] * 10 + [0] * 10
    worse, better = [0] * 20, [1] * 20
    made = beside_the_prompt(
        **{
            "none": worse,
            "in_context": half,
            "rome": better,
            "grace": worse,
            "memit": half,
            "lora": [1] * 5 + [None] * 15,
        }
    )
    (of_dataset,) = prompt_findings(made).values()
    assert of_dataset["metrics"]["effectiveness_em"] == {"better": ["ROME"], "worse": ["GRACE"]}
    assert of_dataset["metrics"]["specificity_rate"] == {"better": ["ROME", "GRACE"], "worse": []}
    assert of_dataset["ahead"] == ["ROME"], "neither the one that is also worse nor the one with few cases"
    shown = {row["Editor"]: row for row in prompt_table(made, label="tab").data.to_dict("records")}
    assert list(shown) == ["ROME", "MEMIT", "GRACE", "LoRA"]
    # ten of ten cases won: 2 / 2^10, and Holm over the twelve comparisons of the table
    assert shown["ROME"]["Eff. EM"].startswith("+50.00") and f"p = {12 * 2 / 2**10:.3f}" in shown["ROME"]["Eff. EM"]
    assert "the same" in shown["MEMIT"]["Gen. EM"] and shown["LoRA"]["n"] == "5"
    without = made[made["editor"] != "in-context"]
    assert prompt_findings(without) == {} and prompt_table(without, label="tab").data.empty


def protocol_records() -> pd.DataFrame:
    """Two editors with ten cases; the first loses six hits in free writing, the second none; five cases of either have a check."""
    made = []
    for editor, free in (("rome", [1] * 3 + [0] * 7), ("memit", [1] * 9 + [0])):
        for case in range(10):
            paper = float(case < 9)
            made.append(
                {"dataset": "cnle", "editor": editor, "position": 1, "case_id": case, "state": SCORED, "effectiveness_em": paper,
                 "free_effectiveness_em": float(free[case]), "free_effectiveness_executes": 1.0 if case % 2 else None}
            )  # fmt: skip
    return pd.DataFrame(made)


def test_what_the_protocol_hides_by_hand():
    made = protocol_records()
    unedited = made[made["editor"] == "rome"].assign(editor="none")
    rome, memit = protocol_table(pd.concat([unedited, made]), label="tab").data.to_dict("records")
    free, executes = "Eff. EM → Eff. free EM", "Eff. EM → Eff. executes"
    assert rome["Editor"] == "ROME" and list(rome)[2:] == [free, executes]
    # six cases lost, none won: 2 / 2^6, and Holm over the four comparisons of the table
    assert rome[free].startswith("90.00 → 30.00<br>-60.00") and f"p = {4 * 2 / 2**6:.3f}" in rome[free]
    assert rome[free].endswith("n = 10</small>")
    assert memit[free].startswith("90.00 → 90.00<br>0.00") and "the same" in memit[free]
    # of the cases with a check alone: 4 of 5 were right, all pass
    assert memit[executes].startswith("80.00 → 100.00<br>+20.00") and memit[executes].endswith("n = 5</small>")
    assert protocol_table(
        made.drop(columns=["free_effectiveness_em", "free_effectiveness_executes"]), label="t"
    ).data.empty


def test_a_codebooks_generalization_is_taken_apart():
    made = protocol_records().assign(generalization_em=0.0, fires=None, right_where_fired=None)
    assert reach_table(made, label="tab").data.empty
    codebook = made[made["editor"] == "rome"].assign(editor="grace", fires=[1.0] * 4 + [0.0] * 6)
    codebook["right_where_fired"] = [1.0, 1.0, 1.0, 0.0] + [None] * 6
    codebook["generalization_em"] = [1.0] * 3 + [0.0] * 7
    (row,) = reach_table(pd.concat([made, codebook]), label="tab").data.to_dict("records")
    shown = [row[title].split("%")[0] for title in ("Fires", "Right where fired", "Gen. EM")]
    assert row["Editor"] == "GRACE" and shown == ["40.0", "75.0", "30.0"] and row["Right where fired"].endswith("of 4")


def test_the_order_of_the_tasks_is_tested_by_editor():
    """Fisher's test by hand: 20 of 20 against 5 of 20 differs, 10 against 11 of 20 does not; an editor with one dataset is left out."""

    def rows(editor, dataset, held, n=20):
        return [
            {"editor": editor, "dataset": dataset, "case_id": k, "state": SCORED, "effectiveness_em": float(k < held)}
            for k in range(n)
        ]

    records = pd.DataFrame(
        rows("ft-l", "cnle", 20) + rows("ft-l", "csne", 5) + rows("rome", "cnle", 3) + rows("rome", "csne", 18)
        + rows("grace", "cnle", 10) + rows("grace", "csne", 11) + rows("pmet", "cnle", 20) + rows("none", "cnle", 0) + rows("none", "csne", 9)
    )  # fmt: skip
    assert transfer_findings(records) == {"more": ["FT-L"], "less": ["ROME"], "alike": ["GRACE"]}
    assert transfer_findings(records[records["dataset"] == "cnle"]) == {"more": [], "less": [], "alike": []}


def test_cases_of_one_model_are_not_independent():
    """Three models, of which one holds none of its edits: the cases alone would say that the share is known well."""
    samples = np.repeat([0, 1, 2], 30)
    values = np.where(samples == 2, 0.0, 1.0)
    pooled, of_samples = interval(values, binary=True), interval(values, binary=True, samples=samples)
    assert of_samples.mean == pooled.mean == pytest.approx(2 / 3) and of_samples.n == 90
    # the mean of three draws from 1, 1 and 0: one draw in 27 is all zeros, eight are all ones
    assert (of_samples.low, of_samples.high) == (0.0, 1.0) and pooled.high - pooled.low < 0.2
    alike = np.tile([0.0, 1.0], 45)
    spread, free = (interval(alike, binary=False, samples=of) for of in (samples, None))
    assert spread.high - spread.low == pytest.approx(free.high - free.low, rel=0.2), (
        "where samples agree it is the cases'"
    )
    assert interval(values, True, samples=np.zeros(90)) == pooled
    assert interval(np.ones(90), True, samples=samples) == interval(np.ones(90), True)
    gaps = np.where(np.arange(90) % 3 == 0, np.nan, values)
    assert interval(gaps, True, samples=samples).n == 60
    # sizes may differ, and a loss counts by its tokens
    unequal = mean_over_tokens([1.0, 1.0, 3.0], [1, 1, 2], [0, 0, 1])
    assert (unequal.mean, unequal.low, unequal.high) == (2.0, 1.0, 3.0)
    assert mean_over_tokens([1.0, 2.0], [1, 1], [5, 5]) == mean_over_tokens([1.0, 2.0], [1, 1])
