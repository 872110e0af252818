"""RQ3's tables, figures and findings: A-GRACE beside GRACE and its ablations.

Most are functions of records. What is not (the sweep of the radius, the picture of one case, the times of edits made alone) is
computed once and kept as a small CSV in the run's folder, so that a published run needs no model to be shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ...metrics.base import MEASURES, get_metric
from ...metrics.paper import PAPER_SCORES
from ..paper import A_GRACE_VARIANTS
from ..tables import (
    RESAMPLES,
    Table,
    column_name,
    dataset_name,
    editor_colour,
    editor_name,
    percent,
    score_rows,
    scored,
)

# places in seaborn's colourblind palette of the edit prompt (OI), the rephrased prompt (GRI) and the neighbours (SRI)
_KIND_COLOURS = {"edit": 7, "rephrased": 0, "neighbour": 1}
_EXACT = [f"{measure}_em" for measure in MEASURES]
_PRESET_SCORES = [*_EXACT, "specificity_rate", "specificity_bleu", "fluency"]
_RADIUS = 1.0  # the paper's


def ablation_table(records: pd.DataFrame, label: str, caption: str = "A-GRACE without its parts (Table VI).") -> Table:
    """The paper's Table VI: the ten scores of GRACE, A-GRACE and its two ablations."""
    return Table(score_rows(records[records["editor"].isin(A_GRACE_VARIANTS)]), caption, label)


def paired_table(records: pd.DataFrame, label: str, caption: str = "A-GRACE minus GRACE, in points.") -> Table:
    """What A-GRACE has over GRACE on the same cases.

    Differences of means in points with a 95 % bootstrap interval over cases; p by McNemar's exact test for
    exact match, by Wilcoxon's signed-rank test for everything else; not corrected for the number of tests.
    """
    rows = []
    for dataset, of_dataset in scored(records).groupby("dataset", sort=False):
        wide = of_dataset.pivot(index="case_id", columns="editor", values=list(PAPER_SCORES))
        if not {"a-grace", "grace"} <= set(of_dataset["editor"]):
            continue
        row = {"Data": dataset_name(str(dataset))}
        for score in PAPER_SCORES:
            pairs = wide[score][["a-grace", "grace"]].dropna().astype(float)
            row["n"] = str(len(pairs))
            row[column_name(score)] = _difference(
                (pairs["a-grace"] - pairs["grace"]).to_numpy(), get_metric(score).binary
            )
        rows.append(row)
    return Table(pd.DataFrame(rows), caption, label)


def _difference(difference: np.ndarray, binary: bool) -> str:
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


def preset_table(
    clean: pd.DataFrame, compat: pd.DataFrame, label: str, caption: str = "Both presets on the same cases."
) -> Table:
    """Each variant with the codebook active in every generation, and with the released defects, on the cases that both have."""
    presets = {"clean": scored(clean), "compat": scored(compat)}
    rows = []
    for dataset in clean["dataset"].unique():
        of_preset = {name: records[records["dataset"] == dataset] for name, records in presets.items()}
        # nothing was wrong with leaving a model unedited, so the compat run has no such row
        edited = [
            set(of_editor["case_id"])
            for records in of_preset.values()
            for editor, of_editor in records.groupby("editor")
            if editor != "none"
        ]
        shared = set.intersection(*edited) if edited else set()
        for editor in ("none", *A_GRACE_VARIANTS):
            for preset, records in of_preset.items():
                compared = records[(records["editor"] == editor) & records["case_id"].isin(shared)]
                if compared.empty:
                    continue
                row = {"Data": dataset_name(dataset), "Editor": editor_name(editor)}
                row |= {"Preset": "–" if editor == "none" else preset, "n": str(len(compared))}
                scores = {column_name(score): f"{100 * compared[score].mean():.2f}" for score in _PRESET_SCORES}
                rows.append(row | scores)
    return Table(pd.DataFrame(rows), caption, label)


def overhead_table(alone: pd.DataFrame, label: str, caption: str = "Time and memory of one edit made alone.") -> Table:
    """Median edit time and memory of each variant beside GRACE's, and the median ratio of a case's time to GRACE's.

    Args:
        alone: edits made one at a time (:func:`.measurements.overhead`).
    """
    rows = []
    for dataset, of_dataset in alone.groupby("dataset", sort=False):
        seconds = of_dataset.pivot(index="case_id", columns="editor", values="seconds")
        peaks = of_dataset.groupby("editor")["peak_mib"].median()
        rows += [
            {
                "Data": dataset_name(str(dataset)),
                "Editor": editor_name(editor),
                "n": str(seconds[editor].count()),
                "time (s)": f"{seconds[editor].median():.2f}",
                "time / GRACE": f"{(seconds[editor] / seconds['grace']).median():.2f}",
                "peak memory (MiB)": f"{peaks[editor]:.0f}",
                "memory / GRACE": f"{peaks[editor] / peaks['grace']:.2f}",
            }
            for editor in A_GRACE_VARIANTS
            if editor in seconds
        ]
    return Table(pd.DataFrame(rows), caption, label)


def _distances(records: pd.DataFrame) -> np.ndarray:
    """Distances (cases, 1 + neighbours) of the rephrased prompt and of the neighbours from the edit prompt."""
    recorded = [distances[1:] for distances in records["distances"] if distances is not None]
    return np.array(recorded, dtype=float)


def distance_figure(records: pd.DataFrame):
    """How far the rephrased prompt (GRI) and the neighbours (SRI) are from the edit prompt (OI), by GRACE's and A-GRACE's keys.

    A panel for each data set and editor; cases in the order of their OI-GRI distance; the band goes from a case's nearest
    to its farthest neighbour. A matplotlib figure.
    """
    datasets = list(records["dataset"].unique())
    figure, axes, palette = _panels(2, len(datasets), height=2.6)
    near, far = (palette[_KIND_COLOURS[kind]] for kind in ("rephrased", "neighbour"))
    recorded = scored(records)
    for row, editor in zip(axes, ("grace", "a-grace")):
        for axis, dataset in zip(row, datasets):
            distances = _distances(recorded[(recorded["editor"] == editor) & (recorded["dataset"] == dataset)])
            if not len(distances):
                continue
            distances = distances[distances[:, 0].argsort()]
            order, band = np.arange(len(distances)), (distances[:, 1:].min(1), distances[:, 1:].max(1))
            axis.fill_between(order, *band, color=far, alpha=0.35, lw=0, label="OI–SRI, nearest to farthest")
            axis.plot(order, distances[:, 0], color=near, label="OI–GRI")
            axis.axhline(_RADIUS, color="0.2", ls="--", lw=0.8, label="radius")
            axis.set_title(f"{dataset_name(dataset)}, {editor_name(editor)}'s keys")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("cases")
        row[0].set_ylabel("distance")
    return _with_legend(figure, axes, top=1.05, columns=3)


def distance_findings(records: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each data set and for GRACE's and A-GRACE's keys: in how many of ``cases`` the rephrased prompt is ``nearer`` than
    every neighbour, the ``rephrased`` prompt is within the radius, and a ``neighbour`` is."""
    for dataset, of_dataset in scored(records).groupby("dataset", sort=False):
        for editor in ("grace", "a-grace"):
            distances = _distances(of_dataset[of_dataset["editor"] == editor])
            if len(distances):
                rephrased, nearest = distances[:, 0], distances[:, 1:].min(1)
                counts = {
                    "nearer": rephrased < nearest,
                    "rephrased": rephrased <= _RADIUS,
                    "neighbour": nearest <= _RADIUS,
                }
                names = {"data": dataset_name(str(dataset)), "editor": editor_name(editor), "cases": len(distances)}
                yield names | {name: int(holds.sum()) for name, holds in counts.items()}


def projection_figure(places: pd.DataFrame):
    """One case's prompts in the plane of their first two principal components, for each kind of key; a matplotlib figure."""
    datasets = list(places["dataset"].unique())
    titles = {"last": "last-token key", "mean": "encoded mean key"}
    looks = {"edit": ("*", 200), "rephrased": ("o", 70), "neighbour": ("X", 70)}
    figure, axes, palette = _panels(len(titles), len(datasets), height=3.2)
    for row, (query, title) in zip(axes, titles.items()):
        for axis, dataset in zip(row, datasets):
            prompts = places[(places["query"] == query) & (places["dataset"] == dataset)]
            for kind, (marker, size) in looks.items():
                points = prompts[prompts["kind"] == kind]
                colour = palette[_KIND_COLOURS[kind]]
                axis.scatter(points["x"], points["y"], marker=marker, s=size, color=colour, label=kind)
            axis.set_title(f"{dataset_name(dataset)} case {prompts['case_id'].iloc[0]}, {title}")
            axis.set_xlabel("first component")
            axis.set_ylabel("second component")
            axis.margins(0.15)
    return _with_legend(figure, axes, top=1.04, columns=3)


def projection_table(places: pd.DataFrame, label: str, caption: str = "Distances from the edit prompt.") -> Table:
    """How far the prompts of the pictured case are from its edit prompt, in the whole space of each kind of key."""
    keys = {"last": "last token (GRACE)", "mean": "encoded mean (A-GRACE)"}
    rows = []
    for (dataset, query), prompts in places.groupby(["dataset", "query"], sort=False):
        rephrased = prompts[prompts["kind"] == "rephrased"]["distance"].iloc[0]
        neighbours = sorted(prompts[prompts["kind"] == "neighbour"]["distance"])
        inside = sum(distance <= _RADIUS for distance in neighbours)
        within = (
            f"{'' if rephrased <= _RADIUS else 'not '}the rephrased prompt, {inside} of {len(neighbours)} neighbours"
        )
        rows.append(
            {
                "Case": f"{dataset_name(str(dataset))} {prompts['case_id'].iloc[0]}",
                "Key": keys[str(query)],
                "Rephrased": f"{rephrased:.2f}",
                "Neighbours": ", ".join(f"{distance:.2f}" for distance in neighbours),
                f"Within {_RADIUS:g}": within,
            }
        )
    return Table(pd.DataFrame(rows), caption, label)


def radius_figure(sweep: pd.DataFrame):
    """Generalization against specificity as the radius grows, a curve for each margin; a dot where the radius is the paper's 1."""
    import seaborn as sns

    datasets = list(sweep["dataset"].unique())
    figure, axes, _ = _panels(1, len(datasets), height=3.6)
    margins = sorted(sweep["margin"].dropna().unique())
    colours = sns.color_palette("viridis", len(margins))
    widths = np.linspace(5, 1.2, len(margins))  # curves that coincide stay visible
    for axis, dataset in zip(axes[0], datasets):
        of_dataset = sweep[sweep["dataset"] == dataset]

        def draw(curve: pd.DataFrame, look: str, axis=axis, **style) -> None:
            axis.plot(100 * curve["specificity_rate"], 100 * curve["generalization"], look, **style)

        for editor, look in (("grace", ":"), ("a-grace-wo-cl", "--")):
            curve = of_dataset[of_dataset["editor"] == editor]
            draw(curve, look, color=editor_colour(editor), label=editor_name(editor))
        for margin, colour, width in zip(margins, colours, widths):
            curve = of_dataset[(of_dataset["editor"] == "a-grace") & (of_dataset["margin"] == margin)]
            draw(curve, "-", color=colour, lw=width, label=f"A-GRACE, margin {margin:g}")
            draw(curve[curve["radius"] == 1], "o", color=colour)
        axis.set_title(f"{dataset_name(dataset)}, {of_dataset['cases'].iloc[0]} selection cases")
        axis.set_xlabel("neighbours unchanged (%)")
    axes[0][0].set_ylabel("generalization, exact match (%)")
    return _with_legend(figure, axes, top=1.14, columns=4)


def radius_table(sweep: pd.DataFrame, label: str, caption: str = "The paper's radius, and the best one.") -> Table:
    """Generalization and unchanged neighbours at the paper's radius of 1, and at the radius where their mean is largest."""
    rows = []
    for (dataset, editor, margin), curve in sweep.groupby(["dataset", "editor", "margin"], sort=False, dropna=False):
        best = _balanced(curve)
        (papers,) = curve[curve["radius"] == 1].to_dict("records")
        rows.append(
            {
                "Data": dataset_name(dataset),
                "Editor": editor_name(editor),
                "Margin": "–" if pd.isna(margin) else f"{margin:g}",
                "Gen. EM, radius 1": percent(papers["generalization"]),
                "Spec. kept, radius 1": percent(papers["specificity_rate"]),
                "Best radius": f"{best['radius']:.2f}",
                "Gen. EM, best": percent(best["generalization"]),
                "Spec. kept, best": percent(best["specificity_rate"]),
            }
        )
    return Table(pd.DataFrame(rows), caption, label)


def radius_findings(sweep: pd.DataFrame) -> dict[str, tuple[pd.Series, pd.Series]]:
    """By data set: GRACE's best point of the sweep, and A-GRACE's of all margins."""
    return {
        dataset_name(str(dataset)): tuple(_balanced(points[points["editor"] == name]) for name in ("grace", "a-grace"))
        for dataset, points in sweep.groupby("dataset", sort=False)
    }


def _balanced(points: pd.DataFrame) -> pd.Series:
    """The point of a sweep with the largest mean of generalization and unchanged neighbours, by the smallest radius."""
    balance = points["generalization"] + points["specificity_rate"]
    return points.loc[points[balance == balance.max()]["radius"].idxmin()]


def findings(records: pd.DataFrame, compat: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What the tables show of each data set that has GRACE and A-GRACE, on the cases that all variants have.

    Yields:
        ``data`` (its name); ``cases``, how many; ``means``, scores in percent by editor; ``released``, how many of A-GRACE's
        cases keep all neighbours with the released program's defects, in percent, and their number (None without such
        cases); and ``repaired``, the same of the same cases without the defects.
    """
    for dataset, of_dataset in scored(records).groupby("dataset", sort=False):
        variants = of_dataset[of_dataset["editor"].isin(A_GRACE_VARIANTS)]
        if not {"grace", "a-grace"} <= set(variants["editor"]):
            continue
        shared = set.intersection(*(set(of_editor["case_id"]) for _, of_editor in variants.groupby("editor")))
        variants = variants[variants["case_id"].isin(shared)]
        kept = scored(compat)
        kept = kept[(kept["dataset"] == dataset) & (kept["editor"] == "a-grace")].set_index("case_id")["specificity_em"]
        same = variants[(variants["editor"] == "a-grace") & variants["case_id"].isin(kept.index)]["specificity_em"]
        yield {
            "data": dataset_name(str(dataset)),
            "cases": len(shared),
            "means": 100 * variants.groupby("editor")[list(_PRESET_SCORES)].mean(),
            "released": (100 * kept.mean(), len(kept)) if len(kept) else None,
            "repaired": (100 * same.mean(), len(same)),
        }


def _panels(rows: int, columns: int, height: float):
    """A figure, its axes, and the palette of its points."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, height * rows), squeeze=False)
    return figure, axes, sns.color_palette("colorblind", 10)


def _with_legend(figure, axes, top: float, columns: int):
    """One legend above all panels."""
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="upper center", bbox_to_anchor=(0.5, top), ncol=columns)
    figure.tight_layout()
    return figure
