"""RQ3's tables and figures: A-GRACE beside GRACE and its ablations.

Most are functions of records. What is not (the sweep of the radius, the picture of one case) is computed once and kept
as a small CSV in the run's folder, so that a published run needs no model to be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from .datasets import load_cases
from .errors import StudyError
from .records import SCORES
from .report import BINARY, RESAMPLES, Table, column_name, dataset_name, editor_name, score_rows, scored
from .runs import RunConfig, is_published, run, sampled

VARIANTS = ("grace", "a-grace", "a-grace-wo-cl", "a-grace-wo-mean")


def compat_run(config: RunConfig) -> pd.DataFrame:
    """The same cases with the released program's defects, in the folder ``<out>-compat``."""
    folder = config.out.with_name(f"{config.out.name}-compat")
    # nothing was wrong with leaving a model unedited
    editors = tuple(name for name in config.editors if name in VARIANTS)
    changed = {"preset": "compat", "out": folder, "name": f"{config.name}-compat", "editors": editors}
    return run(config.model_copy(update=changed))


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
        wide = mine.pivot(index="case_id", columns="editor", values=list(SCORES))
        if (SCORES[0], one) not in wide or (SCORES[0], other) not in wide:
            continue
        row = {"Data": dataset_name(str(dataset))}
        for score in SCORES:
            pairs = wide[score][[one, other]].dropna()
            row["n"] = str(len(pairs))
            row[column_name(score)] = _difference(
                pairs[one].to_numpy(float), pairs[other].to_numpy(float), score in BINARY
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
    """Specificity and fluency of each variant with the codebook active in every generation, and as released."""
    wanted = ("generalization_em", "specificity_em", "specificity_bleu", "specificity_rouge_l", "fluency")
    rows = []
    for dataset in clean["dataset"].unique():
        for editor in ("none", *VARIANTS):
            for preset, records in (("clean", clean), ("compat", compat)):
                mine = scored(records)
                mine = mine[(mine["dataset"] == dataset) & (mine["editor"] == editor)]
                if mine.empty:
                    continue
                row = {
                    "Data": dataset_name(dataset),
                    "Editor": editor_name(editor),
                    "Preset": preset,
                    "n": str(len(mine)),
                }
                rows.append(row | {column_name(score): f"{100 * mine[score].mean():.2f}" for score in wanted})
    caption = "Both presets side by side: the codebook active in every generation (clean), and in the first one only (compat)."
    return Table(pd.DataFrame(rows), caption, "tab-rq3-presets")


def overhead_table(records: pd.DataFrame) -> Table:
    """Edit time and peak memory of each variant beside GRACE's, from the run's own records."""
    rows = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        medians = mine.groupby("editor")[["edit_seconds", "peak_memory_mib"]].median()
        for editor in [one for one in VARIANTS if one in medians.index]:
            row = {"Data": dataset_name(str(dataset)), "Editor": editor_name(editor)}
            for name, (column, unit) in {
                "time": ("edit_seconds", "s"),
                "peak memory": ("peak_memory_mib", "MiB"),
            }.items():
                value = medians.loc[editor, column]
                row[f"{name} ({unit})"] = f"{value:.2f}" if unit == "s" else f"{value:.0f}"
                if "grace" in medians.index:
                    row[f"{name} / GRACE"] = f"{value / medians.loc['grace', column]:.2f}"
            rows.append(row)
    caption = (
        "Median edit time and peak memory, from the run with the released program's defects, which one machine made "
        "in one go. The encoder's training is not part of an edit and not in here."
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
    near, far = sns.color_palette("colorblind", 2)
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
    datasets = list(places["dataset"].unique())
    titles = {"last": "last-token key", "mean": "encoded mean key"}
    figure, axes = _panels(len(titles), len(datasets), height=3.2)
    for row, (query, title) in zip(axes, titles.items()):
        for axis, dataset in zip(row, datasets):
            mine = places[(places["query"] == query) & (places["dataset"] == dataset)]
            for (kind, points), marker in zip(mine.groupby("kind", sort=False), ("*", "o", "X")):
                axis.scatter(points["x"], points["y"], marker=marker, s=90, label=kind)
                for _, point in points.iterrows():
                    if kind != "edit":
                        axis.annotate(
                            f"{point['distance']:.2f}",
                            (point["x"], point["y"]),
                            xytext=(5, 5),
                            textcoords="offset points",
                        )
            axis.set_title(f"{dataset_name(dataset)} case {mine['case_id'].iloc[0]}, {title}")
            axis.margins(0.2)
    return _with_legend(figure, axes, top=1.04, columns=3)


def radius_figure(sweep: pd.DataFrame):
    """Generalization against specificity as the radius grows, a curve a margin; a dot where the radius is the paper's 1."""
    import seaborn as sns

    datasets = list(sweep["dataset"].unique())
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
                color="0.4",
                label=editor_name(editor),
            )
        for margin in margins:
            curve = mine[(mine["editor"] == "a-grace") & (mine["margin"] == margin)]
            axis.plot(
                100 * curve["specificity_rate"],
                100 * curve["generalization"],
                color=colours[margin],
                label=f"A-GRACE, margin {margin:g}",
            )
            at_one = curve[curve["radius"] == 1]
            axis.plot(100 * at_one["specificity_rate"], 100 * at_one["generalization"], "o", color=colours[margin])
        axis.set_title(f"{dataset_name(dataset)}, {mine['cases'].iloc[0]} selection cases")
        axis.set_xlabel("neighbours unchanged (%)")
    axes[0][0].set_ylabel("generalization, exact match (%)")
    return _with_legend(figure, axes, top=1.14, columns=4)


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


def sweep(config: RunConfig) -> pd.DataFrame:
    """The sweep of the radius that belongs to a run (radius.py), made when its folder does not have it."""
    from .radius import sweep_radius

    return _kept(config, "radius.csv", lambda subject, file: sweep_radius(subject, file, min(config.cases or 30, 30)))


def projection(config: RunConfig) -> pd.DataFrame:
    """The places of one case of each data set (case_study.py), made when the run's folder does not have them."""
    from .case_study import project

    def make(subject, file) -> pd.DataFrame:
        parts = [
            project(subject, load_cases(name, config.source), sampled(config, name), config.seed)
            for name in config.dataset
        ]
        table = pd.concat(parts, ignore_index=True).round(5)
        table.to_csv(file, index=False)
        return table

    return _kept(config, "case_study.csv", make)


def _kept(config: RunConfig, name: str, make: Callable[..., Any]) -> pd.DataFrame:
    from .subjects import load_subject

    file = config.out / name
    if not file.is_file():
        if is_published(config.out):
            raise StudyError(f"{file} is missing: a published run of RQ3 has it; restore it from the repository")
        make(load_subject(config.subject, config.device, config.dtype), file)
    return pd.read_csv(file)


def reading(records: pd.DataFrame, compat: pd.DataFrame) -> str:
    """Markdown that says what the tables show; every figure is computed here."""
    sentences = []
    for dataset, mine in scored(records).groupby("dataset", sort=False):
        means = (
            100
            * mine.groupby("editor")[
                ["effectiveness_em", "generalization_em", "specificity_em", "specificity_rate"]
            ].mean()
        )
        if not {"grace", "a-grace"} <= set(means.index):
            continue
        before, after = means.loc["grace"], means.loc["a-grace"]
        name = dataset_name(str(dataset))
        sentences.append(
            f"On {name}, A-GRACE carries {after['generalization_em']:.1f} % of the edits over to the rephrased prompt, GRACE "
            f"{before['generalization_em']:.1f} %; effectiveness goes from {before['effectiveness_em']:.1f} to "
            f"{after['effectiveness_em']:.1f} %. With the codebook active in every generation, A-GRACE leaves "
            f"{after['specificity_rate']:.1f} % of the neighbours unchanged, and all five of a case in "
            f"{after['specificity_em']:.1f} % of the cases (GRACE: {before['specificity_em']:.1f} %)."
        )
        released = scored(compat)
        released = released[(released["dataset"] == dataset) & (released["editor"] == "a-grace")]
        if len(released):
            sentences.append(
                f"As released, where the codebook is not consulted there, the same measure reads "
                f"{100 * released['specificity_em'].mean():.1f} %."
            )
    return " ".join(sentences) or "_GRACE and A-GRACE are needed for a comparison: add them to `editors`._"
