"""The verdicts: each follows from its records, and turns when they do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from clme_lib.study import scorecard
from clme_lib.study.rq1 import transfer_findings
from clme_lib.study.scorecard import INVALID, NOT_TESTABLE, REPLICATED, REVERSED, UNDECIDED, Evidence

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = "smollm2-135m"


@pytest.fixture(scope="module")
def published() -> Evidence:
    return scorecard.load_evidence(ROOT / "results", [SUBJECT])[SUBJECT]


def verdicts(evidence: Evidence, claim: str) -> dict[str, str]:
    """By dataset or editor, of the claim that begins so."""
    (of_claim,) = [outcomes["x"] for each, outcomes in scorecard.judged({"x": evidence}) if each.says.startswith(claim)]
    return {outcome.data: verdict for outcome, verdict, _ in of_claim}


def changed(evidence: Evidence, editor: str, dataset: str, **scores: float) -> Evidence:
    records = evidence.records.copy()
    rows = (records["editor"] == editor) & (records["dataset"] == dataset)
    for name, score in scores.items():
        records.loc[rows, name] = score
    return Evidence(records, evidence.compat, evidence.measured)


@pytest.mark.parametrize(
    ("claim", "data", "verdict", "changes", "opposite"),
    [
        ("GRACE is the most effective", "CSNE", REPLICATED, [("grace", {"effectiveness_em": 0.0})], REVERSED),
        ("GRACE is the most effective", "CNLE", UNDECIDED, [("ft-l", {"effectiveness_em": 0.0}), ("malmen", {"effectiveness_em": 0.0})], REPLICATED),
        ("GRACE is the most specific", "CNLE", REPLICATED, [("grace", {"specificity_em": 0.0}), ("ft-l", {"specificity_em": 1.0})], REVERSED),
        ("Generalization is poor", "CNLE", REVERSED, [("malmen", {"generalization_em": 0.0})], REPLICATED),
        ("A-GRACE generalizes", "CSNE", REPLICATED, [("a-grace", {"generalization_em": 0.0})], REVERSED),
        ("A-GRACE is as effective", "CNLE", REPLICATED, [("a-grace", {"effectiveness_em": 0.0})], REVERSED),
        ("Without the encoder", "CSNE", REVERSED, [("a-grace-wo-cl", {"generalization_em": 0.0})], REPLICATED),
    ],
)  # fmt: skip
def test_each_verdict_turns_with_its_records(published, claim, data, verdict, changes, opposite):
    """A verdict that cannot change would say nothing; those of the other dataset stay."""
    before, evidence = verdicts(published, claim), published
    for editor, scores in changes:
        evidence = changed(evidence, editor, data.lower(), **scores)
    assert before[data] == verdict
    assert verdicts(evidence, claim) == before | {data: opposite}


def test_where_editors_are_missing_nothing_is_replicated_but_much_can_be_reversed(published):
    records = published.records[published.records["editor"].isin(["none", "grace", "ft-l"])]
    few = Evidence(records, published.compat, published.measured)
    assert set(verdicts(few, "GRACE is the most effective").values()) == {UNDECIDED}
    low = changed(few, "ft-l", "csne", generalization_em=0.0)
    assert verdicts(low, "Generalization is poor")["CSNE"] == UNDECIDED
    high = changed(few, "ft-l", "csne", generalization_em=1.0)
    assert verdicts(high, "Generalization is poor")["CSNE"] == REVERSED


def test_the_defect_is_seen_and_would_not_be_if_one_case_differed(published):
    claims = ["A-GRACE is about as specific", "A-GRACE's texts"]
    assert {verdict for claim in claims for verdict in verdicts(published, claim).values()} == {INVALID}
    compat = published.compat.copy()
    row = compat.index[(compat["editor"] == "a-grace") & (compat["dataset"] == "cnle")][0]
    compat.loc[row, ["specificity_em", "fluency"]] = 0.0, 1.0
    repaired = Evidence(published.records, compat, published.measured)
    for claim in claims:
        assert verdicts(repaired, claim) == {"CNLE": UNDECIDED, "CSNE": INVALID}


def test_times_are_those_of_the_papers_editors_alone(published):
    """Set-ups, batches and editors that the paper does not have count nowhere."""

    def of(claim, measured):
        evidence = Evidence(published.records[:0], published.compat[:0], measured)
        (outcomes,) = [by["x"] for each, by in scorecard.judged({"x": evidence}) if each.says.startswith(claim)]
        return {outcome.data: (outcome.n, outcome.here, verdict) for outcome, verdict, _ in outcomes}

    seconds = {"ft-l": 3.0, "rome": 8.0, "memit": 12.0, "pmet": 11.0, "malmen": 0.2, "grace": 5.0}
    rows = [
        {"kind": "edit", "editor": editor, "dataset": dataset, "case_id": case, "seconds": factor * time + case / 100}
        for editor, time in seconds.items() for dataset, factor in (("cnle", 1.0), ("csne", 2.0)) for case in range(10)
    ]  # fmt: skip
    others = [
        {
            "kind": kind,
            "editor": editor,
            "dataset": dataset,
            "case_id": 0,
            "seconds": 99.0 if dataset == "cnle" else 0.0,
        }
        for kind, editor in (("edit", "in-context"), ("edit", "a-grace"), ("setup", "grace"), ("throughput", "rome"))
        for dataset in ("cnle", "csne")
    ]
    measured = pd.DataFrame(rows + others)
    assert of("MALMEN is the fastest", measured) == {
        data: (10, f"MALMEN {least:.1f} s, FT-L {next_to_it:.1f} s", REPLICATED)
        for data, least, next_to_it in (("CNLE", 0.2, 3.0), ("CSNE", 0.4, 6.0))
    }
    # PMET is the faster of the two, ROME the slowest of the others
    assert of("MEMIT and PMET are the slowest", measured)["CNLE"] == (10, "PMET 11.0 s, ROME 8.0 s", REPLICATED)
    as_slow = measured.copy()
    turns = (as_slow["editor"] == "rome") & (as_slow["kind"] == "edit") & (as_slow["case_id"] % 2 == 0)
    as_slow.loc[turns, "seconds"] *= 2
    assert of("MEMIT and PMET are the slowest", as_slow)["CNLE"][2] == UNDECIDED
    assert of("Edits take longer", measured)[""][:2] == (120, "6 of 6 editors")
    slow = measured.assign(seconds=measured["seconds"].where(measured["editor"] != "malmen", 50.0))
    assert {verdict for *_, verdict in of("MALMEN is the fastest", slow).values()} == {REVERSED}
    assert of("Edits take longer", slow)[""][:2] == (120, "5 of 6 editors")
    apart = (measured["editor"] == "rome") == (measured["dataset"] == "cnle")
    assert of("Edits take longer", measured[apart & measured["editor"].isin(["rome", "grace"])]) == {}


def test_a_claim_without_evidence_is_not_testable_and_one_without_records_not_measured(published):
    shown = scorecard.scorecard_table(
        {"x": Evidence(published.records[:0], published.compat[:0], published.measured[:0])}, label="tab"
    ).data
    untestable = [claim.evidence is None for claim in scorecard.CLAIMS]
    assert 0 < sum(untestable) < len(untestable)
    for said, cell in zip(untestable, shown["x"], strict=True):
        assert (NOT_TESTABLE if said else "not measured") in cell


def test_p_values_are_those_of_the_tests_named_and_corrected_over_the_table(published):
    judged = scorecard.judged({"x": published})
    of = {claim.says[:20]: [outcome for outcome, _, _ in by["x"]] for claim, by in judged}
    wide = published.records.pivot(index=["dataset", "case_id"], columns="editor", values="generalization_em").astype(
        float
    )
    both = wide.loc["csne", ["grace", "a-grace"]].dropna()
    only = int(((both["a-grace"] == 1) & (both["grace"] == 0)).sum())
    lost = int(((both["a-grace"] == 0) & (both["grace"] == 1)).sum())
    (csne,) = [outcome for outcome in of["A-GRACE generalizes "] if outcome.data == "CSNE"]
    assert csne.p == pytest.approx(stats.binomtest(only, only + lost).pvalue) and csne.n == len(both)
    # Bonferroni's smallest and Holm's agree on the smallest of all
    tested = [(outcome.p, p) for _, by in judged for outcome, _, p in by["x"] if outcome.p is not None]
    least, corrected = min(tested)
    assert corrected == pytest.approx(min(1.0, least * len(tested))) and all(p >= raw for raw, p in tested)


def test_the_order_of_the_tasks_is_rq1s(published):
    directions = transfer_findings(published.records)
    judged = verdicts(published, "All editors are less effective")
    assert sorted(name for name, verdict in judged.items() if verdict == REVERSED) == sorted(directions["more"])
    assert not directions["less"] and REPLICATED not in judged.values()


def test_counts_are_those_of_the_table(published):
    evidence = {"x": published}
    of_table = pd.Series(" ".join(scorecard.scorecard_table(evidence, label="tab").data["x"]).split("<strong>")[1:])
    counted = of_table.str.partition("</strong>")[0].value_counts().to_dict()
    assert scorecard.counts(evidence)["x"] == counted


def test_an_editor_with_fewer_cases_says_so(published):
    """The second best of CSNE, on twenty cases; the others have as many as GRACE."""
    records = published.records
    rest = records.index[(records["editor"] == "malmen") & (records["dataset"] == "csne")][20:]
    fewer = Evidence(records.drop(rest), published.compat, published.measured)
    (claim,) = [each for each in scorecard.CLAIMS if each.says.startswith("GRACE is the most effective")]
    cnle, csne = claim.evidence(fewer)
    assert "(n = 20)" in csne.here.partition("MALMEN")[2].partition(",")[0] and csne.here.count("n =") == 1
    assert "n =" not in cnle.here and (cnle.n, csne.n) == (100, 100)
