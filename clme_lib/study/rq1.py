"""RQ1's tables, figure and findings, all computed from records.

Scores are shown times 100, as in the paper (fluency too, which is in bits). Intervals are 95 %: Wilson's for
exact match, percentile bootstrap over cases for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..datasets.cases import Case
from ..datasets.paper import CNLE, CSNE, PAPER_DATASET_NAMES
from ..metrics.base import MEASURES, get_metric
from ..metrics.paper import COMPARISONS
from ..support.errors import StudyError
from .tables import (
    Table,
    dataset_name,
    editor_colour,
    editor_name,
    inline_code,
    interval,
    score_rows,
    scored,
)


def proficiency_table(records: pd.DataFrame, label: str, caption: str = "Scores by editor (Table IV).") -> Table:
    """The paper's Table IV: ten scores for every editor and data set, with n and 95 % intervals, best in bold."""
    return Table(score_rows(records), caption, label)


def transfer_table(records: pd.DataFrame, label: str, caption: str = "Effectiveness by data set (Table V).") -> Table:
    """The paper's Table V: change of effectiveness from CSNE to CNLE, in points."""
    scores = [f"effectiveness_{name}" for name in COMPARISONS]
    means = scored(records).groupby(["editor", "dataset"], sort=False)[scores].mean() * 100
    rows = []
    for editor in records["editor"].unique():
        if editor == "none" or any((editor, dataset) not in means.index for dataset in PAPER_DATASET_NAMES):
            continue
        row = {"Editor": editor_name(editor)}
        for score in scores:
            csne, cnle = means.loc[(editor, CSNE.name), score], means.loc[(editor, CNLE.name), score]
            row[get_metric(score).title.split()[-1]] = f"{csne:.2f} → {cnle:.2f} ({cnle - csne:+.2f})"
        rows.append(row)
    return Table(pd.DataFrame(rows), caption, label)


def proficiency_figure(records: pd.DataFrame):
    """Exact match of the three measures by editor, a panel for each data set, with 95 % intervals (a matplotlib figure).

    Raises:
        StudyError: no record has scores.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    data = scored(records)
    if data.empty:
        raise StudyError("no record has scores to draw: score the run with `clme score FOLDER` first")
    edited = data[data["editor"] != "none"]
    data = data if edited.empty else edited
    datasets = list(data["dataset"].unique())
    editors = list(data["editor"].unique())
    figure, axes = plt.subplots(1, len(datasets), figsize=(4.2 * len(datasets), 3.1), sharey=True, squeeze=False)
    width = 0.8 / len(editors)
    for axis, dataset in zip(axes[0], datasets):
        of_dataset = data[data["dataset"] == dataset]
        for place, editor in enumerate(editors):
            of_editor = of_dataset[of_dataset["editor"] == editor]
            if of_editor.empty:
                continue
            reached = [interval(of_editor[f"{measure}_em"], binary=True) for measure in MEASURES]
            means, low, high = (
                100 * np.array([getattr(share, end) for share in reached]) for end in ("mean", "low", "high")
            )
            # rounding can put a bound a hair inside the mean
            errors = [np.maximum(means - low, 0), np.maximum(high - means, 0)]
            middle = np.arange(len(MEASURES)) + (place - (len(editors) - 1) / 2) * width
            axis.bar(middle, means, width, color=editor_colour(editor), label=editor_name(editor))
            axis.errorbar(middle, means, yerr=errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=2)
        axis.set_xticks(range(len(MEASURES)), [measure.capitalize() for measure in MEASURES])
        counts = of_dataset.groupby("editor").size()
        size = " to ".join(dict.fromkeys((str(counts.min()), str(counts.max()))))
        axis.set_title(f"{dataset_name(dataset)}, {size} cases an editor")
        axis.set_ylim(0, 105)
        axis.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("exact match (%)")
    bars = axes[0][0].get_legend_handles_labels()
    figure.legend(*bars, loc="upper center", bbox_to_anchor=(0.5, 1.07), ncol=len(editors))
    figure.tight_layout()
    return figure


def examples(records: pd.DataFrame, cases: Sequence[Case], count: int = 3) -> Iterator[tuple[Case, pd.DataFrame]]:
    """The first cases that have texts in every editor's record, each with what every edited model wrote.

    Yields:
        The case, and a table with a row for each editor (``Editor``) and a column for the text of each measure.
    """
    by_id = {case.case_id: case for case in cases}
    texts = scored(records)[lambda rows: rows["generated_effectiveness"].notna() & rows["case_id"].isin(by_id)]
    texts = texts[texts["dataset"].isin({case.dataset for case in cases})]
    editors = texts["editor"].nunique()
    complete = [rows for _, rows in texts.groupby("case_id", sort=True) if len(rows) == editors]
    for rows in complete[:count]:
        written = {name: [inline_code(text[0]) for text in rows[f"generated_{name}"]] for name in MEASURES}
        yield by_id[rows["case_id"].iloc[0]], pd.DataFrame({"Editor": rows["editor"].map(editor_name), **written})


def findings(records: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What the exact matches of the edited models show, by data set.

    Returns:
        For each data set ``best``: by measure the editors with the highest share of cases, and that share's interval;
        and ``careful``: generalization of each editor that makes at least half of the edits hold and keeps all
        neighbours in at least half of the cases.
    """
    by_dataset = {}
    edited = scored(records)[lambda rows: rows["editor"] != "none"]
    for dataset, of_dataset in edited.groupby("dataset", sort=False):
        reached = {
            editor_name(str(editor)): {name: interval(rows[f"{name}_em"], binary=True) for name in MEASURES}
            for editor, rows in of_dataset.groupby("editor", sort=False)
        }
        best = {}
        for name in MEASURES:
            highest = max((shares[name] for shares in reached.values()), key=lambda share: share.mean)
            best[name] = [editor for editor, shares in reached.items() if shares[name].mean == highest.mean], highest
        careful = {
            editor: shares["generalization"].mean
            for editor, shares in reached.items()
            if min(shares["effectiveness"].mean, shares["specificity"].mean) >= 0.5
        }
        by_dataset[dataset_name(str(dataset))] = {"best": best, "careful": careful}
    return by_dataset
