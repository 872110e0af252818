"""RQ1's tables, figure and findings, all computed from records.

Scores are shown times 100, as in the paper (fluency too, which is in bits). Intervals are 95%: Wilson's for
exact match, percentile bootstrap over cases for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..datasets.base import dataset_title
from ..datasets.cases import Case
from ..datasets.paper import CNLE, CSNE, PAPER_DATASET_NAMES
from ..metrics.base import MEASURES, get_metric
from ..metrics.executes import EXECUTION_METRICS
from ..metrics.free import FREE_METRICS
from ..metrics.paper import COMPARISONS
from ..support.display import Markup, inline_code
from .comparisons import SIGNIFICANT, holm, paired_p
from .figures import bars, legend, panels, plain
from .paper import PAPER_EDITORS, UNEDITED
from .tables import (
    Interval,
    cells,
    difference_cell,
    editor_colour,
    editor_name,
    in_order,
    interval,
    percent,
    score_rows,
    scored,
    table,
)

# the paper's Table IV
proficiency_table = table(score_rows)


@table
def free_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Scores beside the paper's (metrics/free.py, metrics/executes.py): a column for each metric that any record has."""
    rows = list(score_rows(records, [*FREE_METRICS, *EXECUTION_METRICS[:2]]))
    measured = [name for row in rows for name, cell in row.items() if cell != "–"]
    kept = [name for name in (rows[0] if rows else ()) if name in measured]
    # rows without any score are left out
    yield from ({name: row[name] for name in kept} for row in rows if any(row[name] != "–" for name in kept[3:]))


@table
def failure_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """How the snippets that are run fail: the share of cases for each kind of failure, in percent."""
    names = [name for name in EXECUTION_METRICS if name.startswith("fails_") and name in records]
    for (dataset, editor), rows in scored(records).groupby(["dataset", "editor"], sort=False):
        checked = rows.dropna(subset=names) if names else rows[:0]
        if len(checked):
            row = {"Data": dataset_title(str(dataset)), "Editor": editor_name(str(editor)), "n": str(len(checked))}
            yield row | {
                get_metric(name).title.removeprefix("Fails: "): percent(checked[name].mean()) for name in names
            }


_BESIDE = ("effectiveness_em", "generalization_em", "specificity_rate")
PROMPT = "in-context"  # the editor that puts the case into the prompt


@table
def prompt_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Whether editing does better than the case in the prompt: each editor's differences from it on the cases that both edited.

    Means in points with 95% bootstrap intervals over cases; p of McNemar's exact test or, for neighbours, Wilcoxon's signed-rank test,
    with Holm's correction over the table. ``records`` are of one subject.
    """
    differences = _differences_from_prompt(records)
    for dataset, editor in dict.fromkeys(key[:2] for key in differences):
        row = {"Data": dataset_title(dataset), "Editor": editor_name(editor)}
        for name in _BESIDE:
            if (dataset, editor, name) in differences:
                difference, p = differences[dataset, editor, name]
                row["n"] = str(len(difference))
                row[get_metric(name).title] = difference_cell(difference, p)
        yield row


def prompt_findings(records: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Which editors do significantly better or worse than the case in the prompt.

    Returns:
        For each dataset ``metrics``: for each metric, the editors that are ``better`` and ``worse``; and ``ahead``: the editors that are
        better by some metric and worse by none, among those with the most cases (with few cases hardly any difference is significant).
    """
    differences = _differences_from_prompt(records)
    findings: dict[str, dict[str, Any]] = {}
    for dataset in dict.fromkeys(key[0] for key in differences):
        of_dataset = {key[1:]: both for key, both in differences.items() if key[0] == dataset}
        signs = {
            key: 0 if p >= SIGNIFICANT else int(np.sign(difference.sum()))
            for key, (difference, p) in of_dataset.items()
        }
        most = max(len(difference) for difference, _ in of_dataset.values())
        compared = [
            editor for editor, name in of_dataset if name == _BESIDE[0] and len(of_dataset[editor, name][0]) == most
        ]
        of_editors = {
            editor: [signs[editor, name] for name in _BESIDE if (editor, name) in signs] for editor in compared
        }
        findings[dataset_title(dataset)] = {
            "metrics": {
                name: {
                    direction: [
                        editor_name(editor) for (editor, metric), s in signs.items() if (metric, s) == (name, sign)
                    ]
                    for direction, sign in (("better", 1), ("worse", -1))
                }
                for name in _BESIDE
            },
            "ahead": [
                editor_name(editor) for editor, of_editor in of_editors.items() if max(of_editor) > 0 <= min(of_editor)
            ],
        }
    return findings


def _differences_from_prompt(records: pd.DataFrame) -> dict[tuple[str, str, str], tuple[np.ndarray, float]]:
    """By dataset, editor and metric: differences from the case in the prompt (cases,), and their p after Holm's correction."""
    edited = scored(records)[lambda rows: rows["editor"] != UNEDITED]
    differences = {}
    for dataset, rows in edited.groupby("dataset", sort=False):
        by_case = rows.set_index(["editor", "position", "case_id"])
        present = list(rows["editor"].unique())
        for editor in in_order(name for name in present if name != PROMPT and PROMPT in present):
            for name in _BESIDE:
                values = by_case[name].astype(float)
                difference = (values[editor] - values[PROMPT]).dropna().to_numpy()
                if len(difference):
                    differences[str(dataset), str(editor), name] = difference
    p_values = holm({key: paired_p(difference) for key, difference in differences.items()})
    return {key: (difference, p_values[key]) for key, difference in differences.items()}


@table
def subjects_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Several subjects' edited rows side by side: exact match after edit and rephrased prompts, and neighbours unchanged."""
    edited = scored(records)[lambda rows: rows["editor"] != UNEDITED]
    subjects = edited["subject"].unique()
    groups = dict(list(edited.groupby(["dataset", "editor"])))
    datasets = edited["dataset"].unique()
    in_turn = [(dataset, editor) for dataset in datasets for editor in in_order(edited["editor"].unique())]
    for dataset, editor in (key for key in in_turn if key in groups):
        rows = groups[dataset, editor]
        row = {"Data": dataset_title(dataset), "Editor": editor_name(editor)}
        for name in _BESIDE:
            for subject in subjects:
                share = interval(rows[rows["subject"] == subject][name], get_metric(name).binary)
                shown = Markup(
                    f"{percent(share.mean)}<br><small>{percent(share.low)}–{percent(share.high)}<br>n = {share.n}</small>"
                )
                row[f"{get_metric(name).title}, {subject}"] = shown if share.n else "–"
        yield row


# a score under the paper's protocol, and its counterpart when nothing about the target is given away
PROTOCOL_CHANGES = (
    ("effectiveness_em", "free_effectiveness_em"),
    ("effectiveness_em", "free_effectiveness_executes"),
    ("generalization_em", "free_generalization_em"),
    ("generalization_em", "free_generalization_executes"),
    ("specificity_rate", "kept_without_fence"),
)


@table
def protocol_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What the paper's protocol hides: for each edited row, the paper's score and its counterpart on the same cases.

    Differences of means in points with a 95% bootstrap interval over cases; p from a paired test, with Holm's correction over the table.
    Scores that no record has are left out.
    """
    edited = scored(records)[lambda rows: rows["editor"] != UNEDITED]
    changes = [change for change in PROTOCOL_CHANGES if set(change) <= set(edited) and edited[change[1]].notna().any()]
    pairs = {
        (*group, *change): rows[list(change)].astype(float).dropna().to_numpy().T
        for group, rows in edited.groupby(["dataset", "editor"], sort=False)
        for change in changes
    }
    pairs = {key: both for key, both in pairs.items() if both.shape[1]}
    p_values = holm({key: paired_p(other - papers) for key, (papers, other) in pairs.items()})
    for dataset, editor in dict.fromkeys(key[:2] for key in pairs):
        row = {"Data": dataset_title(str(dataset)), "Editor": editor_name(str(editor))}
        for change in changes:
            both = pairs.get((dataset, editor, *change))
            if both is not None:
                papers, other = (f"{100 * mean:.2f}" for mean in both.mean(axis=1))
                differs = difference_cell(both[1] - both[0], p_values[dataset, editor, *change])
                cell = f"{papers} → {other}<br>{differs}<br><small>n = {both.shape[1]}</small>"
                row[" → ".join(get_metric(name).title for name in change)] = Markup(cell)
        yield row


@table
def reach_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Generalization of the codebooks in two factors: how often they fire at the rephrased prompt, and how often the text is right when
    they do. Their product is the generalization, except for texts that are right without the edit."""
    names = ["fires", "right_where_fired", "generalization_em"]
    edited = scored(records)
    if not set(names) <= set(edited):
        return
    for (dataset, editor), rows in edited.dropna(subset=["fires"]).groupby(["dataset", "editor"], sort=False):
        row = {"Data": dataset_title(str(dataset)), "Editor": editor_name(str(editor)), "n": str(len(rows))}
        for name in names:
            share = interval(rows[name], get_metric(name).binary)
            row[get_metric(name).title] = f"{share} of {share.n}" if share.n else "–"
        yield row


@table
def transfer_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The paper's Table V: effectiveness on CSNE and CNLE and its relative change, with the mean over the paper's editors; ``n`` gives the
    number of cases of both datasets, in this order."""
    scores = [f"effectiveness_{name}" for name in COMPARISONS]
    groups = scored(records).groupby(["editor", "dataset"], sort=False)
    means, counts = groups[scores].mean() * 100, groups.size()
    changes: dict[str, list[float]] = {score: [] for score in scores}
    for editor in records["editor"].unique():
        if editor != UNEDITED and all((editor, dataset) in means.index for dataset in PAPER_DATASET_NAMES):
            row = {"Editor": editor_name(editor)}
            row["n"] = ", ".join(str(counts[editor, dataset.name]) for dataset in (CSNE, CNLE))
            for score in scores:
                csne, cnle = means.loc[(editor, CSNE.name), score], means.loc[(editor, CNLE.name), score]
                cell = f"{csne:.2f} → {cnle:.2f}"
                if csne:
                    change = 100 * (cnle / csne - 1)
                    changes[score] += [change] * (editor in PAPER_EDITORS)
                    cell += f" ({change:+.1f}%)"
                row[get_metric(score).title.split()[-1]] = cell
            yield row
    if all(map(len, changes.values())):
        row = {"Editor": "mean change of the paper's editors", "n": ""}
        yield row | {get_metric(score).title.split()[-1]: f"{np.mean(changes[score]):+.1f}%" for score in scores}


def transfer_findings(records: pd.DataFrame) -> dict[str, list[str]]:
    """Which of the paper's editors are more effective on CNLE than on CSNE (``more``), less (``less``), or neither (``alike``).

    Exact match is compared by Fisher's exact test (the cases are not paired), two-sided, with Holm's correction over the editors.
    """
    from scipy.stats import fisher_exact

    data, counts = scored(records), dict[str, tuple[tuple[int, int], ...]]()
    for editor, of_editor in data[data["editor"].isin(PAPER_EDITORS)].groupby("editor", sort=False):
        of_datasets = [
            of_editor.loc[of_editor["dataset"] == dataset.name, "effectiveness_em"] for dataset in (CNLE, CSNE)
        ]
        if all(map(len, of_datasets)):
            counts[str(editor)] = tuple((int(scores.sum()), int((1 - scores).sum())) for scores in of_datasets)
    p_values = holm({editor: fisher_exact(table_of).pvalue for editor, table_of in counts.items()})
    directions: dict[str, list[str]] = {"more": [], "less": [], "alike": []}
    for editor, ((held, not_held), (held_csne, not_held_csne)) in counts.items():
        higher = held / (held + not_held) > held_csne / (held_csne + not_held_csne)
        direction = "alike" if p_values[editor] >= SIGNIFICANT else "more" if higher else "less"
        directions[direction].append(editor_name(editor))
    return directions


def proficiency_figure(records: pd.DataFrame):
    """Exact match of the three measures by editor, a panel for each dataset, with 95% intervals (a matplotlib figure); if no
    record has scores, the figure says so."""
    data = scored(records)
    if data.empty:
        figure, axes = panels(1, 1, 4.2, 1.0)
        axes[0][0].text(0.5, 0.5, "no record has scores yet: clme score RUN SCORED", ha="center", va="center")
        axes[0][0].set_axis_off()
        return figure
    edited = data[data["editor"] != UNEDITED]
    data = data if edited.empty else edited
    editors = data["editor"].unique()
    figure, axes = panels(1, data["dataset"].nunique(), 4.2, 3.1, sharey=True)
    for axis, (dataset, of_dataset) in zip(axes[0], data.groupby("dataset", sort=False)):
        for place, editor in enumerate(editors):
            of_editor = of_dataset[of_dataset["editor"] == editor]
            if of_editor.empty:
                continue
            shares = list(_exact_matches(of_editor).values())
            means, low, high = 100 * np.array([(share.mean, share.low, share.high) for share in shares]).T
            look = {"color": editor_colour(editor), "label": plain(editor_name(editor))}
            middles = bars(axis, place, len(editors), means, [share.n for share in shares], **look)
            # rounding can put the mean slightly outside its bounds
            errors = np.maximum([means - low, high - means], 0)
            axis.errorbar(middles, means, yerr=errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=2)
        axis.set_xticks(range(len(MEASURES)), [measure.capitalize() for measure in MEASURES])
        counts = of_dataset.groupby("editor").size()
        size = " to ".join(dict.fromkeys((str(counts.min()), str(counts.max()))))
        axis.set_title(f"{plain(dataset_title(str(dataset)))}, {size} cases per editor")
        axis.set_ylim(0, 105)
    axes[0][0].set_ylabel("exact match (%)")
    return legend(figure, axes, top=1.07, columns=len(editors))


def examples(records: pd.DataFrame, cases: Sequence[Case], count: int = 3) -> Iterator[tuple[Case, pd.DataFrame]]:
    """The first cases for which every editor's record has texts, each with the texts of all edited models.

    Yields:
        The case, and a table with a row for each editor (``Editor``) and a column for each measure's text.
    """
    by_id = {case.case_id: case for case in cases}
    texts = scored(records)[lambda rows: rows["generated_effectiveness"].notna() & rows["case_id"].isin(by_id)]
    texts = texts[texts["dataset"].isin({case.dataset for case in cases})]
    editors = texts["editor"].nunique()
    complete = [rows for _, rows in texts.groupby("case_id", sort=True) if len(rows) == editors]
    for rows in complete[:count]:
        written = {name: [inline_code(text[0]) for text in rows[f"generated_{name}"]] for name in MEASURES}
        yield by_id[rows["case_id"].iloc[0]], cells({"Editor": rows["editor"].map(editor_name), **written})


def findings(records: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What the exact matches of the edited models show, by dataset.

    Returns:
        For each dataset ``best``: for each measure, the editors with the highest share of cases, and that share's interval;
        and ``careful``: the generalization of each editor whose edits succeed in at least half of the cases and leave all
        neighbours unchanged in at least half.
    """
    by_dataset = {}
    edited = scored(records)[lambda rows: rows["editor"] != UNEDITED]
    for dataset, of_dataset in edited.groupby("dataset", sort=False):
        by_editor = of_dataset.groupby("editor", sort=False)
        reached = {editor_name(str(editor)): _exact_matches(rows) for editor, rows in by_editor}
        best = {}
        for name in MEASURES:
            highest = max((shares[name] for shares in reached.values()), key=lambda share: share.mean)
            best[name] = [editor for editor, shares in reached.items() if shares[name].mean == highest.mean], highest
        careful = {
            editor: shares["generalization"].mean
            for editor, shares in reached.items()
            if min(shares["effectiveness"].mean, shares["specificity"].mean) >= 0.5
        }
        by_dataset[dataset_title(str(dataset))] = {"best": best, "careful": careful}
    return by_dataset


def _exact_matches(records: pd.DataFrame) -> dict[str, Interval]:
    return {measure: interval(records[f"{measure}_em"], binary=True) for measure in MEASURES}
