"""The spot check: cases of a published run, edited and generated again on this machine, compared string by string."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from ..evaluation.evaluate import SINGLE
from ..metrics.base import FREE_TEXTS, MEASURES, TEXTS
from ..metrics.paper import COMPARISONS
from ..support.errors import StudyError
from .paper import UNEDITED
from .tables import table

GREEDY_AGREEMENT = 0.90  # if an editor's share is lower, the check fails
UNEDITED_POINTS = 1.0  # tolerated change of a score of the unedited row, in points
_SCORES = [f"{measure}_{metric}" for measure in MEASURES for metric in COMPARISONS]


@dataclass(frozen=True)
class Difference:
    """One text that came out differently; ``published`` is None where only its hash is published."""

    dataset: str
    editor: str
    case_id: int
    measure: str
    published: str | None
    here: str | None


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        table: per dataset and editor: cases, greedy and sampled texts, and how many of each are the same.
        differences: every text that differs.
        moved: scores of the unedited row that changed by more than a point.
    """

    table: pd.DataFrame
    differences: list[Difference]
    moved: list[str]

    @property
    def agreement(self) -> pd.Series:
        """Share of greedy texts that are the same, by editor."""
        sums = self.table.groupby("editor", sort=False)[["greedy_same", "greedy"]].sum()
        return sums["greedy_same"] / sums["greedy"]

    @property
    def passed(self) -> bool:
        return bool((self.agreement >= GREEDY_AGREEMENT).all()) and not self.moved


def compare(here: pd.DataFrame, published: pd.DataFrame) -> Comparison:
    """Compare records of the same cases. Where a model holds many edits, only states that hold the same ones are compared.

    Raises:
        StudyError: the records have nothing in common, or a case has changed.
    """
    keys = ["subject", "dataset", "editor", "preset", "protocol", "position", "case_id"]
    here, published = (records.assign(edits=_edits_held(records)) for records in (here, published))
    pairs = here.merge(published, on=[*keys, "held_out", "edits"], suffixes=("", "_published"))
    if pairs.empty:
        raise StudyError("the run and the published records have no case and editor in common: nothing to compare")
    changed = pairs[pairs["case_sha256"] != pairs["case_sha256_published"]]
    if len(changed):
        case = f"case {changed.iloc[0]['case_id']} of {changed.iloc[0]['dataset']}"
        raise StudyError(f"{case} has changed since the published run; publish again")
    rows, differences, moved = [], [], []
    for (dataset, editor), of_editor in pairs.groupby(["dataset", "editor"], sort=False):
        pairs_of_editor = of_editor.to_dict("records")
        # Older records have no free texts.
        free = [
            name
            for name in FREE_TEXTS
            if of_editor[[f"sha256_{name}", f"sha256_{name}_published"]].notna().all(axis=None)
        ]
        texts = [text for pair in pairs_of_editor for name in (*TEXTS, *free) for text in _texts(pair, name)]
        differences += [text for same, text in texts if not same]
        row = {"dataset": dataset, "editor": editor, "cases": len(of_editor)}
        for kind, measures in (("greedy", (*MEASURES, *FREE_TEXTS)), ("sampled", TEXTS[len(MEASURES) :])):
            of_kind = [same for same, text in texts if text.measure in measures]
            row |= {kind: len(of_kind), f"{kind}_same": sum(of_kind)}
        rows.append(row)
        if editor == UNEDITED:
            for score in _SCORES:
                shift = 100 * (of_editor[score].mean() - of_editor[f"{score}_published"].mean())
                if abs(shift) > UNEDITED_POINTS:
                    moved.append(f"{dataset} {score}: {shift:+.2f} points")
    return Comparison(pd.DataFrame(rows), differences, moved)


def _edits_held(records: pd.DataFrame) -> pd.Series:
    """Of each record the cases that the model held, as text: alone its own, else all that were edited and evaluated at its position."""
    held = records["case_id"].astype(str)
    many = records[records["protocol"] != SINGLE]
    for _, rows in many.groupby(["dataset", "editor", "preset", "protocol", "position"]):
        held[rows.index] = " ".join(map(str, sorted(rows[~rows["held_out"]]["case_id"])))
    return held


def describe(comparison: Comparison) -> str:
    """The comparison as plain text."""
    lines = [comparison.table.to_string(index=False)]
    for text in comparison.differences:
        published = "(text not published)" if text.published is None else repr(text.published)
        case = f"{text.dataset} {text.editor} case {text.case_id} {text.measure}"
        lines.append(f"differs: {case}: {published} -> {text.here!r}")
    lines += [f"unedited row moved: {score}" for score in comparison.moved]
    verdict = "passed" if comparison.passed else "FAILED"
    least = f"at least {100 * comparison.agreement.min():.1f}% of every editor's greedy texts are the same"
    return "\n".join([*lines, f"spot check {verdict}: {least} (needed: {100 * GREEDY_AGREEMENT:.0f}%)"])


@table
def agreement_table(comparison: Comparison) -> pd.DataFrame:
    """How many texts came out the same, a row for each dataset and editor."""
    names = ["Data", "Editor", "cases", "greedy texts", "the same", "sampled texts", "the same"]
    return comparison.table.astype(str).set_axis(names, axis=1)


def _texts(pair: dict, measure: str) -> Iterator[tuple[bool, Difference]]:
    """Each text of a measure: whether it is the same, by its hash, and what differs."""
    hashes, texts = (
        (pair[f"{kind}_{measure}_published"], pair[f"{kind}_{measure}"]) for kind in ("sha256", "generated")
    )
    case = pair["dataset"], pair["editor"], pair["case_id"]
    if not all(isinstance(of_run, list) for of_run in hashes) or len(hashes[0]) != len(hashes[1]):
        raise StudyError(f"case {case[2]} of {case[0]} by {case[1]}: {measure} was not recorded twice")
    for number, (published, here) in enumerate(zip(*hashes)):
        shown = (of_run[number] if isinstance(of_run, list) else None for of_run in texts)
        yield published == here, Difference(*case, measure, *shown)
