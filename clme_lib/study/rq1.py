"""Tables, intervals and figures, all computed from records.

Scores are shown times 100, as in the paper (fluency too, which is in bits). Intervals are 95 %: Wilson's for
exact match, percentile bootstrap over cases for everything else.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..datasets.base import get_dataset
from ..datasets.cases import Case
from ..datasets.paper import CNLE, CSNE, PAPER_DATASET_NAMES
from ..metrics.base import MEASURES, get_metric
from ..metrics.paper import COMPARISONS, PAPER_SCORES
from ..support.errors import StudyError
from .tables import (
    Table,
    _percent,
    dataset_name,
    editor_colour,
    editor_name,
    interval,
    score_rows,
    scored,
)


def proficiency_table(records: pd.DataFrame) -> Table:
    """The paper's Table IV: ten scores for every editor and data set, with n and 95 % intervals, best in bold."""
    subject = ", ".join(records["subject"].unique())
    caption = (
        f"Proficiency on {subject} (the paper's Table IV): effectiveness (Eff.), generalization (Gen.), specificity "
        "(Spec.) and fluency (FL.) by exact match, BLEU and ROUGE-L (R-L), times 100, with 95 % intervals below; *kept* is the share of "
        "neighbours left unchanged; best edited row in bold."
    )
    return Table(score_rows(records), caption, "tab-rq1-proficiency")


def transfer_table(records: pd.DataFrame) -> Table:
    """The paper's Table V: change of effectiveness from CSNE to CNLE, in points."""
    means = scored(records).groupby(["editor", "dataset"], sort=False)[list(PAPER_SCORES)].mean() * 100
    rows = []
    for editor in records["editor"].unique():
        if editor == "none" or any((editor, dataset) not in means.index for dataset in PAPER_DATASET_NAMES):
            continue
        row = {"Editor": editor_name(editor)}
        for metric in COMPARISONS:
            score = f"effectiveness_{metric}"
            csne, cnle = means.loc[(editor, CSNE.name), score], means.loc[(editor, CNLE.name), score]
            row[get_metric(score).title.split()[-1]] = f"{csne:.2f} → {cnle:.2f} ({cnle - csne:+.2f})"
        rows.append(row)
    return Table(
        pd.DataFrame(rows),
        "Effectiveness from CSNE to CNLE, in points (the paper's Table V).",
        "tab-rq1-transfer",
    )


def proficiency_figure(records: pd.DataFrame):
    """Exact match of the three measures by editor, one panel a data set, with 95 % intervals (a matplotlib figure).

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
        for k, editor in enumerate(editors):
            mine = data[(data["dataset"] == dataset) & (data["editor"] == editor)]
            if mine.empty:
                continue
            found = [interval(mine[f"{measure}_em"], binary=True) for measure in MEASURES]
            means = np.array([one.mean for one in found]) * 100
            # rounding can put a bound a hair inside the mean
            low = np.maximum(means - np.array([one.low for one in found]) * 100, 0)
            high = np.maximum(np.array([one.high for one in found]) * 100 - means, 0)
            places = np.arange(len(MEASURES)) + (k - (len(editors) - 1) / 2) * width
            axis.bar(places, means, width, color=editor_colour(editor), label=editor_name(editor))
            axis.errorbar(places, means, yerr=[low, high], fmt="none", ecolor="0.2", elinewidth=0.8, capsize=2)
        axis.set_xticks(range(len(MEASURES)), [measure.capitalize() for measure in MEASURES])
        counts = data[data["dataset"] == dataset].groupby("editor").size()
        size = str(counts.min()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        axis.set_title(f"{dataset_name(dataset)}, {size} cases an editor")
        axis.set_ylim(0, 105)
        axis.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("exact match (%)")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 1.07),
        ncol=len(editors),
    )
    figure.tight_layout()
    return figure


def examples(records: pd.DataFrame, cases: Sequence[Case], count: int = 3) -> str:
    """Markdown: for the first cases that have texts in every editor's record, what each edited model wrote."""
    by_id = {case.case_id: case for case in cases}
    texts = scored(records)
    texts = texts[texts["generated_effectiveness"].notna() & texts["case_id"].isin(by_id)]
    texts = texts[texts["dataset"] == cases[0].dataset] if cases else texts
    editors = list(texts["editor"].unique())
    complete = [one for one, rows in texts.groupby("case_id", sort=True) if len(rows) == len(editors)][:count]
    parts = []
    for number, case_id in enumerate(complete, 1):
        case, rows = by_id[case_id], texts[texts["case_id"] == case_id]
        parts.append(f"**Example {number}** (case {case_id})\n")
        parts.append(_code("edit prompt", case.prompt) + _code("target", case.target))
        parts.append(f"rephrased: {_inline(get_dataset(case.dataset).text(case.rephrased[0]))}; "
                     f"a neighbour: {_inline(get_dataset(case.dataset).text(case.unrelated[0]))}\n")  # fmt: skip
        parts.append(
            "| Editor | writes after the edit prompt | after the rephrased prompt | after the neighbour |\n|---|---|---|---|"
        )
        for _, row in rows.iterrows():
            written = [row[f"generated_{measure}"][0] for measure in MEASURES]
            parts.append(f"| {editor_name(row['editor'])} | " + " | ".join(map(_inline, written)) + " |")
        parts.append("")
    return "\n".join(parts) if parts else "_These records keep no texts to show._"


def reading(records: pd.DataFrame) -> str:
    """Markdown that says what the numbers show, a paragraph a data set; every figure is computed here."""
    paragraphs = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        found = {
            editor: {measure: interval(own[f"{measure}_em"], binary=True) for measure in MEASURES}
            for editor, own in mine.groupby("editor", sort=False)
            if editor != "none"
        }
        if not found:
            continue
        best = {}
        for measure in MEASURES:
            most = max((one[measure] for one in found.values()), key=lambda reached: reached.mean)
            level = [editor_name(editor) for editor, one in found.items() if one[measure].mean == most.mean]
            best[measure] = f"{' and '.join(level)}: {_percent(most)}"
        sentences = [
            f"The most edits hold exactly with {best['effectiveness']}. The target follows the most "
            f"rephrased prompts with {best['generalization']}. All five neighbours of a case stay "
            f"unchanged most often with {best['specificity']}."
        ]
        careful = {
            editor_name(editor): one["generalization"].mean
            for editor, one in found.items()
            if one["effectiveness"].mean >= 0.5 and one["specificity"].mean >= 0.5
        }
        if careful:
            farthest = max(careful, key=careful.__getitem__)
            sentences.append(
                f"Of the editors that make at least half of the edits hold and keep all neighbours in at least half of the cases "
                f"({', '.join(careful)}), the most that any carries over is {100 * careful[farthest]:.1f} % ({farthest})."
            )
        else:
            sentences.append(
                "No editor both makes half of the edits hold and keeps all neighbours in half of the cases."
            )
        paragraphs.append(f"**{dataset_name(str(dataset))}.** " + " ".join(sentences))
    return "\n\n".join(paragraphs) or "_Nothing to read yet: these records have no edited case with scores._"


def _inline(text: str) -> str:
    """Generated text inside a table cell: nothing of it is taken for markup."""
    shown = html.escape(text.strip() or "(nothing)").replace("\n", "⏎").replace("|", "&#124;")
    shown = shown.replace("`", "&#96;").replace("$", "&#36;").replace("*", "&#42;").replace("_", "&#95;")
    shown = shown.replace("[", "&#91;").replace("{", "&#123;").replace("\\", "&#92;")
    return f"<code>{shown}</code>"


def _code(title: str, text: str) -> str:
    return f"{title}:\n\n````text\n{text}\n````\n\n"
