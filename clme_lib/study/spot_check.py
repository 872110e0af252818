"""The spot check: cases of a published run, edited and generated again on this machine, compared string by string."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from ..metrics.base import MEASURES, TEXTS
from ..metrics.paper import COMPARISONS
from ..support.errors import StudyError

GREEDY_AGREEMENT = 0.90  # below this share for an editor, the check fails
UNEDITED_POINTS = 1.0  # a score of the unedited row may move by this much, in points
_GREEDY = MEASURES
_SCORES = tuple(f"{measure}_{metric}" for measure in MEASURES for metric in COMPARISONS)


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
    """What was compared.

    Attributes:
        table: per data set and editor: cases, greedy and sampled texts, and how many of each are the same.
        differences: every text that differs.
        moved: scores of the unedited row that moved by more than a point.
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
    """Compare records of the same cases.

    Raises:
        StudyError: nothing in common, or a case that is not the same case any more.
    """
    keys = ["subject", "dataset", "editor", "preset", "protocol", "position", "case_id"]
    pairs = here.merge(published, on=keys, suffixes=("", "_published"))
    if pairs.empty:
        raise StudyError("the run and the published records have no case and editor in common: nothing to compare")
    changed = pairs[pairs["case_sha256"] != pairs["case_sha256_published"]]
    if len(changed):
        raise StudyError(
            f"case {changed.iloc[0]['case_id']} of {changed.iloc[0]['dataset']} has changed since the published run; publish anew"
        )
    rows, differences, moved = [], [], []
    for (dataset, editor), mine in pairs.groupby(["dataset", "editor"], sort=False):
        counts = dict.fromkeys(("greedy", "greedy_same", "sampled", "sampled_same"), 0)
        for _, pair in mine.iterrows():
            for measure in TEXTS:
                kind = "greedy" if measure in _GREEDY else "sampled"
                for same, difference in _texts(pair, measure):
                    counts[kind] += 1
                    counts[f"{kind}_same"] += same
                    if not same:
                        differences.append(difference)
        rows.append({"dataset": dataset, "editor": editor, "cases": len(mine), **counts})
        if editor == "none":
            for score in _SCORES:
                shift = 100 * (mine[score].mean() - mine[f"{score}_published"].mean())
                if abs(shift) > UNEDITED_POINTS:
                    moved.append(f"{dataset} {score}: {shift:+.2f} points")
    return Comparison(pd.DataFrame(rows), differences, moved)


def describe(comparison: Comparison) -> str:
    """The comparison as plain text."""
    lines = [comparison.table.to_string(index=False)]
    for one in comparison.differences:
        published = "(text not published)" if one.published is None else repr(one.published)
        lines.append(
            f"differs: {one.dataset} {one.editor} case {one.case_id} {one.measure}: {published} -> {one.here!r}"
        )
    lines += [f"unedited row moved: {what}" for what in comparison.moved]
    worst = comparison.agreement.min()
    lines.append(
        f"spot check {'passed' if comparison.passed else 'FAILED'}: at least {100 * worst:.1f} % of every editor's greedy "
        f"texts are the same (needed: {100 * GREEDY_AGREEMENT:.0f} %)"
    )
    return "\n".join(lines)


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: a table, and every difference."""
    names = ["Data", "Editor", "cases", "greedy texts", "the same", "sampled texts", "the same"]
    rows = [names, ["---"] * len(names), *comparison.table.to_numpy().tolist()]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    parts = [
        f"```{{table}} Texts generated again on this machine.\n:name: tab-spot-check\n\n{table}\n```",
        "",
    ]
    if not comparison.differences:
        parts.append("Every text came out the same, character by character.")
    for one in comparison.differences:
        published = "(only its hash is published)" if one.published is None else one.published
        parts.append(
            f"Case {one.case_id} of {one.dataset}, {one.editor}, {one.measure}; published, then here:\n\n"
            f"````text\n{published}\n────\n{one.here}\n````\n"
        )
    return "\n".join(parts)


def _texts(pair: pd.Series, measure: str) -> Iterator[tuple[bool, Difference]]:
    published, here = pair[f"sha256_{measure}_published"], pair[f"sha256_{measure}"]
    if not isinstance(published, list) or not isinstance(here, list) or len(published) != len(here):
        raise StudyError(
            f"case {pair['case_id']} of {pair['dataset']} by {pair['editor']}: {measure} was not recorded twice"
        )
    texts, old = pair[f"generated_{measure}"], pair[f"generated_{measure}_published"]
    for n, (one, other) in enumerate(zip(published, here)):
        yield (
            one == other,
            Difference(
                pair["dataset"],
                pair["editor"],
                pair["case_id"],
                measure,
                old[n] if isinstance(old, list) else None,
                texts[n] if isinstance(texts, list) else None,
            ),
        )
