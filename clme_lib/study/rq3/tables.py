"""RQ3's tables and figures: A-GRACE beside GRACE and its ablations.

Most are functions of records. What is not (the sweep of the radius, the picture of one case, the times of edits made alone) is
computed once and kept as a small CSV in the run's folder, so that a published run needs no model to be shown.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from ...metrics.base import get_metric
from ...metrics.paper import PAPER_SCORES
from ..tables import RESAMPLES, Table, column_name, dataset_name, editor_colour, editor_name, score_rows, scored
from .measurements import VARIANTS

# of the edit prompt (OI), the rephrased prompt (GRI) and the neighbours (SRI)
_KIND_COLOURS = (7, 0, 1)


def ablation_table(records: pd.DataFrame) -> Table:
    """The paper's Table VI: the ten scores of GRACE, A-GRACE and its two ablations."""
    caption = (
        f"GRACE, A-GRACE and A-GRACE without one of its parts on {', '.join(records['subject'].unique())} (the paper's "
        "Table VI): exact match, BLEU and ROUGE-L (R-L) times 100, fluency times 100, with 95 % intervals below; best in bold."
    )
    return Table(score_rows(records[records["editor"].isin(VARIANTS)]), caption, "tab-rq3-ablation")


def paired_table(records: pd.DataFrame, one: str = "a-grace", other: str = "grace") -> Table:
    """What one editor has over another on the same cases.

    Differences of means in points with a 95 % bootstrap interval over cases; p by McNemar's exact test for
    exact match, by Wilcoxon's signed-rank test for everything else.
    """
    rows = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        wide = mine.pivot(index="case_id", columns="editor", values=list(PAPER_SCORES))
        if (PAPER_SCORES[0], one) not in wide or (PAPER_SCORES[0], other) not in wide:
            continue
        row = {"Data": dataset_name(str(dataset))}
        for score in PAPER_SCORES:
            pairs = wide[score][[one, other]].dropna()
            row["n"] = str(len(pairs))
            row[column_name(score)] = _difference(
                pairs[one].to_numpy(float), pairs[other].to_numpy(float), get_metric(score).binary
            )
        rows.append(row)
    caption = (
        f"{editor_name(one)} minus {editor_name(other)} on the same cases, in points, with 95 % intervals, and p (exact match: "
        "McNemar's exact test; otherwise Wilcoxon's signed-rank test; not corrected for the number of tests)."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq3-paired")


def _difference(one: np.ndarray, other: np.ndarray, binary: bool) -> str:
    difference = one - other
    if not difference.any():
        return "0.00<br><small>the same</small>"
    if binary:
        p = stats.binomtest(int((difference > 0).sum()), int((difference != 0).sum())).pvalue
    else:
        p = stats.wilcoxon(difference, zero_method="zsplit").pvalue
    bounds = stats.bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    shown = "p &lt; 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{100 * difference.mean():+.2f}<br><small>{100 * bounds.low:+.1f} to {100 * bounds.high:+.1f}<br>{shown}</small>"


def preset_table(clean: pd.DataFrame, compat: pd.DataFrame) -> Table:
    """Each variant with the codebook active in every generation, and with the released defects, on the cases that both have."""
    wanted = (
        "effectiveness_em",
        "generalization_em",
        "specificity_em",
        "specificity_rate",
        "specificity_bleu",
        "fluency",
    )
    presets = {"clean": scored(clean), "compat": scored(compat)}
    rows = []
    for dataset in clean["dataset"].unique():
        mine = {name: one[one["dataset"] == dataset] for name, one in presets.items()}
        # nothing was wrong with leaving a model unedited, so the compat run has no such row
        edited = [
            set(own["case_id"]) for one in mine.values() for editor, own in one.groupby("editor") if editor != "none"
        ]
        shared = set.intersection(*edited) if edited else set()
        for editor in ("none", *VARIANTS):
            for preset, records in mine.items():
                own = records[(records["editor"] == editor) & records["case_id"].isin(shared)]
                if own.empty:
                    continue
                row = {
                    "Data": dataset_name(dataset),
                    "Editor": editor_name(editor),
                    "Preset": "–" if editor == "none" else preset,
                    "n": str(len(own)),
                }
                rows.append(row | {column_name(score): f"{100 * own[score].mean():.2f}" for score in wanted})
    caption = (
        "Both presets on the same cases. Compat repeats the released program's defects with this subject's values: the codebook of A-GRACE "
        "and of w/o CL is not consulted after the first generation, the encoders of A-GRACE and of w/o Mean are chosen by the edited cases, "
        "and every text may have as many tokens as the target tokenised alone."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq3-presets")


def overhead_table(alone: pd.DataFrame) -> Table:
    """Edit time and memory of each variant beside GRACE's.

    Args:
        alone: edits made one at a time (:func:`overhead`).
    """
    rows = []
    for dataset, mine in alone.groupby("dataset", sort=False):
        seconds = mine.pivot(index="case_id", columns="editor", values="seconds")
        peaks = mine.groupby("editor")["peak_mib"].median()
        for editor in [one for one in VARIANTS if one in seconds]:
            rows.append(
                {
                    "Data": dataset_name(str(dataset)),
                    "Editor": editor_name(editor),
                    "n": str(seconds[editor].count()),
                    "time (s)": f"{seconds[editor].median():.2f}",
                    "time / GRACE": f"{(seconds[editor] / seconds['grace']).median():.2f}",
                    "peak memory (MiB)": f"{peaks[editor]:.0f}",
                    "memory / GRACE": f"{peaks[editor] / peaks['grace']:.2f}",
                }
            )
    place = alone[["machine", "threads"]].drop_duplicates().iloc[0]
    caption = (
        f"Median time and peak memory of one edit made alone ({place['machine']}, {place['threads']} thread(s)), and the median ratio of a "
        "case's time to GRACE's. On a CPU the peak is the whole process's. The encoder's training is not part of an edit and not in here."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq3-overhead")


def distance_figure(records: pd.DataFrame, radius: float = 1.0, editors: tuple[str, ...] = ("grace", "a-grace")):
    """How far the rephrased prompt (GRI) and the neighbours (SRI) are from the edit prompt (OI), for each kind of key.

    One panel a data set and editor; cases in the order of their OI-GRI distance; the band goes from a case's nearest
    to its farthest neighbour. A matplotlib figure.
    """
    import seaborn as sns

    datasets = list(records["dataset"].unique())
    figure, axes = _panels(len(editors), len(datasets), height=2.6)
    near, far = (sns.color_palette("colorblind", 10)[place] for place in _KIND_COLOURS[1:])
    for row, editor in zip(axes, editors):
        for axis, dataset in zip(row, datasets):
            mine = scored(records)
            mine = mine[(mine["editor"] == editor) & (mine["dataset"] == dataset)]
            found = np.array([one[1:] for one in mine["distances"] if one is not None], dtype=float)
            if not len(found):
                continue
            found = found[found[:, 0].argsort()]
            places = np.arange(len(found))
            axis.fill_between(
                places,
                found[:, 1:].min(1),
                found[:, 1:].max(1),
                color=far,
                alpha=0.35,
                lw=0,
                label="OI–SRI, nearest to farthest",
            )
            axis.plot(places, found[:, 0], color=near, label="OI–GRI")
            axis.axhline(radius, color="0.2", ls="--", lw=0.8, label="radius")
            axis.set_title(f"{dataset_name(dataset)}, {editor_name(editor)}'s keys")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("cases")
        row[0].set_ylabel("distance")
    return _with_legend(figure, axes, top=1.05, columns=3)


def projection_figure(places: pd.DataFrame):
    """One case's prompts in the plane of their first two principal components, for each kind of key; a matplotlib figure."""
    import seaborn as sns

    datasets = list(places["dataset"].unique())
    titles = {"last": "last-token key", "mean": "encoded mean key"}
    palette = sns.color_palette("colorblind", 10)
    looks = dict(zip(("edit", "rephrased", "neighbour"), zip("*oX", _KIND_COLOURS, (200, 70, 70))))
    figure, axes = _panels(len(titles), len(datasets), height=3.2)
    for row, (query, title) in zip(axes, titles.items()):
        for axis, dataset in zip(row, datasets):
            mine = places[(places["query"] == query) & (places["dataset"] == dataset)]
            for kind, (marker, colour, size) in looks.items():
                points = mine[mine["kind"] == kind]
                axis.scatter(points["x"], points["y"], marker=marker, s=size, color=palette[colour], label=kind)
            axis.set_title(f"{dataset_name(dataset)} case {mine['case_id'].iloc[0]}, {title}")
            axis.set_xlabel("first component")
            axis.set_ylabel("second component")
            axis.margins(0.15)
    return _with_legend(figure, axes, top=1.04, columns=3)


def projection_table(places: pd.DataFrame, radius: float = 1.0) -> Table:
    """How far the prompts of the pictured case are from its edit prompt, in the whole space of each kind of key."""
    rows = []
    for (dataset, query), mine in places.groupby(["dataset", "query"], sort=False):
        rephrased = mine[mine["kind"] == "rephrased"]["distance"].iloc[0]
        neighbours = sorted(mine[mine["kind"] == "neighbour"]["distance"])
        inside = sum(one <= radius for one in neighbours)
        rows.append(
            {
                "Case": f"{dataset_name(str(dataset))} {mine['case_id'].iloc[0]}",
                "Key": {"last": "last token (GRACE)", "mean": "encoded mean (A-GRACE)"}[str(query)],
                "Rephrased": f"{rephrased:.2f}",
                "Neighbours": ", ".join(f"{one:.2f}" for one in neighbours),
                f"Within {radius:g}": f"{'the rephrased prompt' if rephrased <= radius else 'not the rephrased prompt'}, "
                f"{inside} of {len(neighbours)} neighbours",
            }
        )
    caption = "The pictured cases: distances from the edit prompt in the whole space of the keys."
    return Table(pd.DataFrame(rows), caption, "tab-rq3-case")


def radius_figure(sweep: pd.DataFrame):
    """Generalization against specificity as the radius grows, a curve a margin; a dot where the radius is the paper's 1."""
    import seaborn as sns

    datasets = list(sweep["dataset"].unique())
    widths = np.linspace(5, 1.2, sweep["margin"].nunique())  # curves that coincide stay visible
    figure, axes = _panels(1, len(datasets), height=3.6)
    margins = sorted(sweep["margin"].dropna().unique())
    colours = dict(zip(margins, sns.color_palette("viridis", len(margins))))
    for axis, dataset in zip(axes[0], datasets):
        mine = sweep[sweep["dataset"] == dataset]
        for editor, style in (("grace", ":"), ("a-grace-wo-cl", "--")):
            curve = mine[mine["editor"] == editor]
            axis.plot(
                100 * curve["specificity_rate"],
                100 * curve["generalization"],
                style,
                color=editor_colour(editor),
                label=editor_name(editor),
            )
        for margin, width in zip(margins, widths):
            curve = mine[(mine["editor"] == "a-grace") & (mine["margin"] == margin)]
            axis.plot(
                100 * curve["specificity_rate"],
                100 * curve["generalization"],
                color=colours[margin],
                lw=width,
                label=f"A-GRACE, margin {margin:g}",
            )
            at_one = curve[curve["radius"] == 1]
            axis.plot(100 * at_one["specificity_rate"], 100 * at_one["generalization"], "o", color=colours[margin])
        axis.set_title(f"{dataset_name(dataset)}, {mine['cases'].iloc[0]} selection cases")
        axis.set_xlabel("neighbours unchanged (%)")
    axes[0][0].set_ylabel("generalization, exact match (%)")
    return _with_legend(figure, axes, top=1.14, columns=4)


def radius_table(sweep: pd.DataFrame) -> Table:
    """Generalization and unchanged neighbours at the paper's radius of 1, and at the radius where their mean is largest."""
    rows = []
    for (dataset, editor, margin), curve in sweep.groupby(["dataset", "editor", "margin"], sort=False, dropna=False):
        best = _balanced(curve)
        (ours,) = curve[curve["radius"] == 1].to_dict("records")
        rows.append(
            {
                "Data": dataset_name(dataset),
                "Editor": editor_name(editor),
                "Margin": "–" if margin != margin else f"{margin:g}",
                "Gen. EM, radius 1": f"{100 * ours['generalization']:.1f}",
                "Spec. kept, radius 1": f"{100 * ours['specificity_rate']:.1f}",
                "Best radius": f"{best['radius']:.2f}",
                "Gen. EM, best": f"{100 * best['generalization']:.1f}",
                "Spec. kept, best": f"{100 * best['specificity_rate']:.1f}",
            }
        )
    caption = (
        f"The same sweep ({sweep['cases'].iloc[0]} selection cases of each data set): the paper's radius, and the one with the largest mean of "
        "generalization and unchanged neighbours. The best is chosen and measured on the same cases, and so flatters itself."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq3-radius")


def _balanced(points: pd.DataFrame) -> pd.Series:
    """Of a sweep's points the one with the largest mean of generalization and unchanged neighbours, by the smallest radius."""
    balance = points["generalization"] + points["specificity_rate"]
    return points.loc[points[balance == balance.max()]["radius"].idxmin()]


def radius_reading(sweep: pd.DataFrame) -> str:
    """What a radius of its own would make of GRACE, beside A-GRACE's best of all margins; every figure is computed here."""
    sentences = []
    for dataset, mine in sweep.groupby("dataset", sort=False):
        grace, encoded = (_balanced(mine[mine["editor"] == name]) for name in ("grace", "a-grace"))
        sentences.append(
            f"On {dataset_name(str(dataset))}, GRACE at its best radius ({grace['radius']:.2f}) generalizes in {100 * grace['generalization']:.1f} % and "
            f"leaves {100 * grace['specificity_rate']:.1f} % of the neighbours unchanged; A-GRACE at its best (margin {encoded['margin']:g}, radius "
            f"{encoded['radius']:.2f}) {100 * encoded['generalization']:.1f} % and {100 * encoded['specificity_rate']:.1f} %."
        )
    return " ".join(sentences)


def _panels(rows: int, columns: int, height: float):
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    return plt.subplots(rows, columns, figsize=(4.4 * columns, height * rows), squeeze=False)


def _with_legend(figure, axes, top: float, columns: int):
    """One legend above all panels."""
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="upper center", bbox_to_anchor=(0.5, top), ncol=columns)
    figure.tight_layout()
    return figure


def distance_reading(records: pd.DataFrame, radius: float = 1.0) -> str:
    """Markdown that says what the distances show; every figure is computed here."""
    sentences = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        for editor in ("grace", "a-grace"):
            found = [one[1:] for one in mine[mine["editor"] == editor]["distances"] if one is not None]
            if not found:
                continue
            distances = np.array(found, dtype=float)
            rephrased, nearest = distances[:, 0], distances[:, 1:].min(1)
            sentences.append(
                f"On {dataset_name(str(dataset))} with {editor_name(editor)}'s keys, the rephrased prompt is nearer than every neighbour in "
                f"{(rephrased < nearest).sum()} of {len(distances)} cases, and within the radius in {(rephrased <= radius).sum()}; a neighbour "
                f"is within it in {(nearest <= radius).sum()}."
            )
    return " ".join(sentences)


def reading(records: pd.DataFrame, compat: pd.DataFrame) -> str:
    """Markdown that says what the tables show; every figure is computed here, on the cases that all variants have."""
    sentences = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        mine = mine[mine["editor"].isin(VARIANTS)]
        if not {"grace", "a-grace"} <= set(mine["editor"]):
            continue
        shared = set.intersection(*(set(own["case_id"]) for _, own in mine.groupby("editor")))
        mine = mine[mine["case_id"].isin(shared)]
        shown = ["effectiveness_em", "generalization_em", "specificity_em", "specificity_rate"]
        means = 100 * mine.groupby("editor")[shown].mean()
        before, after = means.loc["grace"], means.loc["a-grace"]
        sentences.append(
            f"On the {len(shared)} {dataset_name(str(dataset))} cases that all variants edited, the target follows the rephrased prompt in "
            f"{after['generalization_em']:.1f} % with A-GRACE and in {before['generalization_em']:.1f} % with GRACE; effectiveness goes from "
            f"{before['effectiveness_em']:.1f} to {after['effectiveness_em']:.1f} %. With the codebook active in every generation, "
            f"{after['specificity_rate']:.1f} % of the neighbours stay unchanged, and all five in {after['specificity_em']:.1f} % of the cases "
            f"(GRACE: {before['specificity_em']:.1f} %)."
        )
        for name, left_out in (("a-grace-wo-cl", "the encoder"), ("a-grace-wo-mean", "the mean over the prompt")):
            if name in means.index:
                one = means.loc[name]
                sentences.append(
                    f"Without {left_out} ({editor_name(name)}) it generalizes in {one['generalization_em']:.1f} % and keeps "
                    f"{one['specificity_rate']:.1f} % of the neighbours."
                )
        released = scored(compat)
        released = released[(released["dataset"] == dataset) & (released["editor"] == "a-grace")]
        if len(released):
            own = mine[(mine["editor"] == "a-grace") & mine["case_id"].isin(released["case_id"])]
            sentences.append(
                f"With the released program's defects all five neighbours stay unchanged in {100 * released['specificity_em'].mean():.1f} % of "
                f"{len(released)} cases; without them, in {100 * own['specificity_em'].mean():.1f} % of {len(own)} of the same cases."
            )
    return " ".join(sentences) or "_GRACE and A-GRACE are needed for a comparison: add them to `editors`._"
