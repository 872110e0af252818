"""The paper's claims, and what the records say about each: the first table of the book.

A claim is a sentence of the paper, with its figures if they are known, and a function that looks for evidence in the records of one
subject. No result is stated here: figures, p values and verdicts are computed. p values are two-sided, with Holm's correction over the
whole table, including all subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..datasets.base import dataset_title
from ..datasets.paper import CNLE, CSNE, PAPER_DATASET_NAMES
from ..metrics.base import get_metric
from ..support.display import Markup, inline
from .comparisons import SIGNIFICANT, as_good_as_the_best, holm, paired_p
from .paper import A_GRACE, PAPER_EDITORS, UNEDITED
from .rq2.measure import load_measurements
from .run_folder import load_run
from .tables import editor_name, interval, scored, table

REPLICATED, REVERSED, UNDECIDED = "replicated", "reversed", "undecided"
NOT_TESTABLE, INVALID = "not testable here", "invalid by a defect"
# "as good as" may be worse by this many points; so absence of evidence is not taken for evidence of absence
MARGIN = 10.0


@dataclass(frozen=True)
class Evidence:
    """All evidence about one subject.

    Attributes:
        records: its run's records.
        compat: records of the same cases with the released program's defects; may be empty.
        measured: the subject's rows of RQ2's measurements (rq2/measure.py); may be empty.
    """

    records: pd.DataFrame
    compat: pd.DataFrame
    measured: pd.DataFrame


@dataclass(frozen=True)
class Outcome:
    """What the records of one dataset say about a claim.

    Attributes:
        data: the dataset's title, or a name for whatever else was compared.
        here: the figures.
        n: the number of cases behind them.
        agrees: whether the figures point in the paper's direction.
        p: two-sided p of the difference, not yet corrected; None if nothing was tested.
        decided: the verdict, if ``p`` does not determine it.
        low: for claims that nothing is lost, the lower bound of the difference's 95% interval, in points.
    """

    data: str
    here: str
    n: int
    agrees: bool
    p: float | None = None
    decided: str | None = None
    low: float | None = None

    def verdict(self, p: float | None) -> str:
        """The verdict, given a corrected ``p``. A claim that nothing is lost is replicated if a loss of ``MARGIN`` points or more is ruled out."""
        if self.decided is not None:
            return self.decided
        if self.low is not None:
            lost = p is not None and p < SIGNIFICANT and not self.agrees
            return REVERSED if lost else REPLICATED if self.low > -MARGIN else UNDECIDED
        if p is None or p >= SIGNIFICANT:
            return UNDECIDED
        return REPLICATED if self.agrees else REVERSED


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: the paper's finding or answer that makes the claim.
        says: the claim in our words, with the paper's figures if they are known.
        test: what is tested here, or why nothing can be tested.
        page: label of the page or table that shows the figures in full.
        evidence: computes the outcomes from a subject's evidence; None if the claim cannot be tested.
    """

    name: str
    says: str
    test: str
    page: str
    evidence: Callable[[Evidence], Iterator[Outcome]] | None = None


def _of(records: pd.DataFrame, editors: Sequence[str] | None = None) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each dataset and its scored records, of the given editors only (None: all)."""
    rows = scored(records)
    rows = rows if editors is None else rows[rows["editor"].isin(editors)]
    for dataset in rows["dataset"].unique():
        yield str(dataset), rows[rows["dataset"] == dataset]


def _measured(editors: int) -> tuple[bool, str]:
    """Whether these are all of the paper's six editors, and a remark if they are not."""
    return editors == len(PAPER_EDITORS), "" if editors == len(PAPER_EDITORS) else f"; editors measured: {editors}"


def _best(metric: str, known: Evidence) -> Iterator[Outcome]:
    """GRACE is better than each of the paper's other five; reversed where another is better, else undecided. Undecided, too, while some
    have not been measured."""
    for dataset, rows in _of(known.records, PAPER_EDITORS):
        means = 100 * rows.groupby("editor")[metric].mean()
        if "grace" not in means or len(means) < 2:
            continue
        best = {name for _, name, _ in as_good_as_the_best(rows, [get_metric(metric)])}
        alone = best == {"grace"}
        sizes = rows.groupby("editor").size()
        fewer = {name: f" (n = {size})" for name, size in sizes.items() if size != sizes["grace"]}
        others = ", ".join(
            f"{editor_name(name)} {mean:.1f}%{fewer.get(name, '')}"
            for name, mean in means.drop("grace").nlargest(2).items()
        )
        complete, of = _measured(len(means))
        verdict = REVERSED if "grace" not in best else REPLICATED if alone and complete else UNDECIDED
        yield Outcome(dataset_title(dataset), f"GRACE {means['grace']:.1f}%, then {others}{of}", int(sizes["grace"]),
                      alone, decided=verdict)  # fmt: skip


def _none_generalizes(known: Evidence) -> Iterator[Outcome]:
    for dataset, rows in _of(known.records, PAPER_EDITORS):
        shares = rows.groupby("editor")["generalization_em"].agg(["mean", "sum", "size"])
        name, (mean, right, n) = shares["mean"].idxmax(), shares.loc[shares["mean"].idxmax()]
        p = stats.binomtest(int(right), int(n), 0.5).pvalue
        complete, of = _measured(len(shares))
        yield Outcome(
            dataset_title(dataset),
            f"at most {100 * mean:.1f}% ({editor_name(str(name))}){of}",
            int(n),
            bool(mean < 0.5),
            float(p),
            decided=UNDECIDED if mean < 0.5 and not complete else None,
        )


def _task(known: Evidence) -> Iterator[Outcome]:
    for editor in PAPER_EDITORS:
        scores = {name: rows["effectiveness_em"] for name, rows in _of(known.records, [editor])}
        if set(PAPER_DATASET_NAMES) <= set(scores):
            cnle, csne = scores[CNLE.name], scores[CSNE.name]
            counts = [[int(held.sum()), int((1 - held).sum())] for held in (cnle, csne)]
            p = float(stats.fisher_exact(counts).pvalue)
            here = f"{100 * csne.mean():.1f} → {100 * cnle.mean():.1f}%"
            yield Outcome(editor_name(editor), here, len(cnle) + len(csne), bool(cnle.mean() < csne.mean()), p)


def _longer(known: Evidence) -> Iterator[Outcome]:
    medians = _medians(known)
    if set(PAPER_DATASET_NAMES) <= set(medians):
        pairs = medians.dropna()
        if pairs.empty:
            return  # no editor was timed on both
        longer = int((pairs[CSNE.name] > pairs[CNLE.name]).sum())
        p = float(stats.binomtest(longer, len(pairs)).pvalue)
        timed = _single_edits(known)
        n = int(timed["editor"].isin(pairs.index).sum())
        yield Outcome("", f"{longer} of {len(pairs)} editors", n, longer > len(pairs) / 2, p)


def _order(editors: Sequence[str], sign: int, known: Evidence) -> Iterator[Outcome]:
    """Some of the paper's editors take less time (``sign`` 1) or more time (-1) than every other: the nearest two are compared."""
    of_datasets = _medians(known)
    for dataset, medians in of_datasets.items():
        timed = _single_edits(known)
        six = (sign * medians.dropna()).sort_values()
        named, others = six[six.index.isin(editors)], six[~six.index.isin(editors)]
        if len(named) < len(editors) or others.empty:
            continue
        last, next_to_it = str(named.index[-1]), str(others.index[0])
        of_dataset = timed[timed["dataset"] == dataset]
        pairs = of_dataset.pivot(index="case_id", columns="editor", values="seconds")[[last, next_to_it]].dropna()
        difference = sign * (pairs[next_to_it] - pairs[last]).to_numpy()
        here = f"{editor_name(last)} {abs(six[last]):.1f} s, {editor_name(next_to_it)} {abs(six[next_to_it]):.1f} s"
        agrees = bool(six[last] < six[next_to_it])
        yield Outcome(dataset_title(str(dataset)), here, len(pairs), agrees, paired_p(difference))


def _medians(known: Evidence) -> pd.DataFrame:
    """Median seconds of an edit made alone, by editor of the paper (rows) and dataset."""
    if known.measured.empty:
        return pd.DataFrame()
    return _single_edits(known).groupby(["editor", "dataset"])["seconds"].median().unstack()


def _single_edits(known: Evidence) -> pd.DataFrame:
    """Measurements of edits made alone by the paper's six editors."""
    measured = known.measured
    return measured[(measured["kind"] == "edit") & measured["editor"].isin(PAPER_EDITORS)]


def _farther(known: Evidence) -> Iterator[Outcome]:
    for dataset, rows in _of(known.records, ["grace"]):
        distances = np.array([row[1:] for row in rows["distances"].dropna()], dtype=float)
        if len(distances):
            rephrased, neighbours = distances[:, 0], distances[:, 1:].mean(axis=1)
            here = f"OI–GRI {rephrased.mean():.2f} (SD {rephrased.std(ddof=1):.2f}), OI–SRI {distances[:, 1:].mean():.2f} (SD {distances[:, 1:].std(ddof=1):.2f})"
            difference = rephrased - neighbours
            yield Outcome(
                dataset_title(dataset), here, len(distances), bool(difference.mean() > 0), paired_p(difference)
            )


def _differences(records: pd.DataFrame, metric: str, editor: str, other: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each dataset and a table with a column for each of two editors, on the cases that both have."""
    for dataset, rows in _of(records, [editor, other]):
        wide = rows.pivot(index="case_id", columns="editor", values=metric).astype(float)
        if {editor, other} <= set(wide):
            yield dataset, wide[[editor, other]].dropna()


def _higher(metric: str, editor: str, other: str, known: Evidence) -> Iterator[Outcome]:
    """One editor's score is higher than another's."""
    for dataset, both in _differences(known.records, metric, editor, other):
        difference = (both[editor] - both[other]).to_numpy()
        here = f"{100 * both[other].mean():.1f} → {100 * both[editor].mean():.1f}%"
        yield Outcome(dataset_title(dataset), here, len(both), bool(difference.mean() > 0), paired_p(difference))


def _kept(metric: str, editor: str, other: str, known: Evidence, sign: int = 1) -> Iterator[Outcome]:
    """One editor's score is no lower (with ``sign`` -1: no higher) than another's."""
    unit = "%" if get_metric(metric).highest == 1 else ""
    for dataset, both in _differences(known.records, metric, editor, other):
        difference = sign * 100 * (both[editor] - both[other]).to_numpy()
        if difference.any():
            low = interval(difference, binary=False, shares=False).low
        else:  # no case has lost anything: the bound is the largest loss that n cases cannot rule out
            low = -100 * interval(difference, binary=True).high
        here = f"{100 * both[other].mean():.1f} → {100 * both[editor].mean():.1f}{unit}"
        yield Outcome(
            dataset_title(dataset),
            here,
            len(both),
            bool(difference.mean() >= 0),
            paired_p(difference / 100),
            low=low,
        )


def _disabled(metric: str, known: Evidence) -> Iterator[Outcome]:
    """With the released program's defects the score equals the unedited model's; the score without the defects is also shown."""
    unit = "%" if get_metric(metric).highest == 1 else ""
    repaired = dict(_differences(known.records, metric, A_GRACE, UNEDITED))
    for dataset, released in _of(known.compat, [A_GRACE]):
        if dataset not in repaired:
            continue
        wide = repaired[dataset]
        wide["released"] = released.set_index("case_id")[metric].astype(float)
        wide = wide.dropna()
        equal = int(np.isclose(wide["released"], wide[UNEDITED]).sum())
        here = (
            f"as released {100 * wide['released'].mean():.1f}{unit}, as without an edit in {equal} of {len(wide)} cases; "
            f"repaired {100 * wide[A_GRACE].mean():.1f}{unit}"
        )
        decided = INVALID if equal == len(wide) else UNDECIDED
        yield Outcome(dataset_title(dataset), here, len(wide), False, decided=decided)


CLAIMS = (
    Claim("F1", "GRACE is the most effective of the six editors.", "paired with the best, Holm", "rq1", partial(_best, "effectiveness_em")),
    Claim("F1", "GRACE is the most specific.", "paired with the best, Holm", "rq1", partial(_best, "specificity_em")),
    Claim("F2", "Editing is less effective on code models than on general ones.", "needs a general benchmark and model, which this study does not have", "rq1"),
    Claim("F1", "Generalization is poor for all six.", "the best editor against half of the cases, binomial", "rq1", _none_generalizes),
    Claim("F3", "All editors are less effective on CNLE than on CSNE.", "each editor, CSNE → CNLE, Fisher", "tab-rq1-transfer", _task),
    Claim("RQ2", "Edits take longer on CSNE than on CNLE.", "editors by medians, sign test", "rq2", _longer),
    Claim("RQ2", "MALMEN is the fastest (about 2 s per edit).", "MALMEN and the next, paired, Wilcoxon", "rq2", partial(_order, ["malmen"], 1)),
    Claim("RQ2", "MEMIT and PMET are the slowest.", "the faster of them and the slowest other, paired, Wilcoxon", "rq2", partial(_order, ["memit", "pmet"], -1)),
    Claim("RQ2", "Editing needs less than 48 GB in nearly all cases, about 30 GB for CodeLlama on CSNE.", "needs a GPU and the paper's models", "rq2"),
    Claim("RQ3", "By GRACE's keys a rephrased prompt (GRI) is farther from the edit prompt (OI) than a neighbour (SRI) is: on CodeLlama and CNLE 12.10 (SD 3.99) and 10.56 (SD 5.04).",
          "paired with the mean of its neighbours, Wilcoxon", "fig-rq3-distances", _farther),
    Claim("RQ3", "A-GRACE generalizes far better than GRACE: 80.86% on CNLE (from a digest of the paper, which leaves open whether this is the level or the gain).",
          "GRACE → A-GRACE, McNemar", "tab-rq3-ablation", partial(_higher, "generalization_em", A_GRACE, "grace")),
    Claim("RQ3", "A-GRACE is as effective as GRACE.", "GRACE → A-GRACE, McNemar", "tab-rq3-ablation", partial(_kept, "effectiveness_em", A_GRACE, "grace")),
    Claim("RQ3", "A-GRACE is about as specific as GRACE.", "whether the released program's score is the unedited model's", "defect", partial(_disabled, "specificity_em")),
    Claim("RQ3", "A-GRACE's texts are as fluent.", "whether the released program's score is the unedited model's", "defect", partial(_disabled, "fluency")),
    Claim("Ablation", "Without the encoder (w/o CL) nothing is gained over GRACE in generalization.", "GRACE → w/o CL, McNemar", "tab-rq3-ablation",
          partial(_kept, "generalization_em", "a-grace-wo-cl", "grace", sign=-1)),
    Claim("Ablation", "Without the mean over the prompt (w/o Mean) nothing is gained over GRACE in generalization.", "GRACE → w/o Mean, McNemar", "tab-rq3-ablation",
          partial(_kept, "generalization_em", "a-grace-wo-mean", "grace", sign=-1)),
)  # fmt: skip


def load_evidence(results: Path, subjects: Sequence[str]) -> dict[str, Evidence]:
    """The evidence about some subjects in a folder of results, by the subject's name.

    Raises:
        StudyError: the folder has no published run of a subject.
    """
    measured = load_measurements(results / "efficiency")
    of_subjects = {}
    for subject in subjects:
        run, compat = results / "runs" / subject, results / "runs" / f"{subject}-compat"
        records = load_run(run)
        own = (measured["subject"] == subject) & ~measured["random_weights"].astype(bool)
        of_subjects[subject] = Evidence(records, load_run(compat) if compat.is_dir() else records[:0], measured[own])
    return of_subjects


def judged(of_subjects: dict[str, Evidence]) -> list[tuple[Claim, dict[str, list[tuple[Outcome, str, float | None]]]]]:
    """Each claim with its outcomes by subject, each outcome with its verdict and its corrected p."""
    outcomes = {
        (number, subject, place): outcome
        for number, claim in enumerate(CLAIMS)
        for subject, evidence in of_subjects.items()
        for place, outcome in enumerate(claim.evidence(evidence) if claim.evidence else ())
    }
    corrected = holm({key: outcome.p for key, outcome in outcomes.items() if outcome.p is not None})
    cards = []
    for number, claim in enumerate(CLAIMS):
        of_claim: dict[str, list[tuple[Outcome, str, float | None]]] = {subject: [] for subject in of_subjects}
        for key, outcome in outcomes.items():
            if key[0] == number:
                of_claim[key[1]].append((outcome, outcome.verdict(corrected.get(key)), corrected.get(key)))
        cards.append((claim, of_claim))
    return cards


@table
def scorecard_table(of_subjects: dict[str, Evidence]) -> Iterator[dict[str, Any]]:
    """A row for each claim: the paper's words, what the records say for each subject, and how it was tested.

    Args:
        of_subjects: evidence by the subject's name.
    """
    for claim, of_claim in judged(of_subjects):
        row: dict[str, Any] = {"": Markup(f"[{claim.name}](#{claim.page})"), "The paper": claim.says}
        for subject, outcomes in of_claim.items():
            verdict = NOT_TESTABLE if claim.evidence is None else "not measured"
            row[subject] = Markup("<br>".join(map(_shown, outcomes)) or f"<strong>{verdict}</strong>")
        yield row | {"Test": claim.test}


def _shown(judgement: tuple[Outcome, str, float | None]) -> str:
    outcome, verdict, p = judgement
    tested = "" if p is None else f", p {'&lt; 0.001' if p < 0.001 else f'= {p:.3f}'}"
    data = f"{outcome.data}: " if outcome.data else ""
    return f"<strong>{verdict}</strong><br><small>{inline(data + outcome.here)}; n = {outcome.n}{tested}</small>"


def counts(of_subjects: dict[str, Evidence]) -> dict[str, dict[str, int]]:
    """For each subject, the number of outcomes with each verdict; a claim that cannot be tested counts once."""
    by_subject: dict[str, dict[str, int]] = {subject: {} for subject in of_subjects}
    for claim, of_claim in judged(of_subjects):
        for subject, outcomes in of_claim.items():
            verdicts = [verdict for _, verdict, _ in outcomes] or [NOT_TESTABLE] * (claim.evidence is None)
            for verdict in verdicts:
                by_subject[subject][verdict] = by_subject[subject].get(verdict, 0) + 1
    return by_subject
