"""RQ3's tables, figures and findings: A-GRACE beside GRACE and its ablations.

Most are computed from records. The others (the sweep of the deferral radius, the figure of one case, the times of edits made alone)
come from small CSV files, made once and kept in the run's folder, so that showing a published run needs no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ...datasets.base import dataset_title
from ...metrics.base import MEASURES, get_metric
from ...metrics.paper import PAPER_SCORES
from ..appendices.selection import criterion
from ..comparisons import holm, paired_p
from ..figures import legend, panels, plain
from ..paper import A_GRACE, A_GRACE_VARIANTS, TUNED_GRACE, UNEDITED
from ..run_folder import shared_cases
from ..tables import difference_cell, editor_colour, editor_name, percent, score_rows, scored, table

# indices into seaborn's colourblind palette for the edit prompt (OI), the rephrased prompt (GRI) and the neighbours (SRI)
_KIND_COLOURS = {"edit": 7, "rephrased": 0, "neighbour": 1}
_PRESET_SCORES = [*(f"{measure}_em" for measure in MEASURES), "specificity_rate", "specificity_bleu", "fluency"]
_COMPARED = ["grace", A_GRACE]
_RADIUS = 1.0  # the paper's


@table
def ablation_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The paper's Table VI: the ten scores of GRACE, A-GRACE and its two ablations; and those of GRACE with a selected radius."""
    return score_rows(records[records["editor"].isin((*A_GRACE_VARIANTS, TUNED_GRACE))])


@table
def paired_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """A-GRACE's scores minus GRACE's, on the same cases.

    Differences of means in points with a 95% bootstrap interval over cases; p from a paired test, with Holm's correction over the table.
    """
    differences: dict[tuple[str, str], np.ndarray] = {}
    compared = scored(records)[lambda rows: rows["editor"].isin(_COMPARED)]
    for dataset, of_dataset in compared.groupby("dataset", sort=False):
        wide = of_dataset.pivot(index="case_id", columns="editor", values=list(PAPER_SCORES)).astype(float)
        if of_dataset["editor"].nunique() == len(_COMPARED):
            for score in PAPER_SCORES:
                differences[str(dataset), score] = (wide[score][A_GRACE] - wide[score]["grace"]).dropna().to_numpy()
    p_values = holm({key: paired_p(of_score) for key, of_score in differences.items()})
    for dataset in dict.fromkeys(name for name, _ in differences):
        shown = {score: differences[dataset, score] for score in PAPER_SCORES}
        row = {"Data": dataset_title(dataset), "n": str(len(shown[PAPER_SCORES[0]]))}
        yield row | {
            get_metric(score).title: difference_cell(shown[score], p_values[dataset, score]) for score in shown
        }


@table
def preset_table(clean: pd.DataFrame, compat: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Each variant with the codebook active in every generation, and with the released defects, on the cases in both runs."""
    records = scored(pd.concat([clean, compat]))
    for dataset, of_dataset in records.groupby("dataset", sort=False):
        # the released defects do not affect the unedited model, so the compat run leaves it out
        edited = of_dataset[of_dataset["editor"] != UNEDITED]
        same = of_dataset[of_dataset["case_id"].isin(shared_cases(edited, ["preset", "editor"]))]
        for editor in (UNEDITED, *A_GRACE_VARIANTS):
            for preset, rows in same[same["editor"] == editor].groupby("preset"):
                row = {"Data": dataset_title(str(dataset)), "Editor": editor_name(editor)}
                row |= {"Preset": "–" if editor == UNEDITED else str(preset), "n": str(len(rows))}
                yield row | {get_metric(score).title: f"{100 * rows[score].mean():.2f}" for score in _PRESET_SCORES}


@table
def overhead_table(alone: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Median edit time and memory of each variant beside GRACE's, and the median ratio of a case's time to GRACE's.

    Args:
        alone: edits made one at a time (:func:`.measurements.overhead`).
    """
    for dataset, of_dataset in alone.groupby("dataset", sort=False):
        seconds = of_dataset.pivot(index="case_id", columns="editor", values="seconds")
        peaks = of_dataset.groupby("editor")["peak_mib"].median()
        for editor in [name for name in A_GRACE_VARIANTS if name in seconds]:
            yield {
                "Data": dataset_title(str(dataset)),
                "Editor": editor_name(editor),
                "n": str(seconds[editor].count()),
                "time (s)": f"{seconds[editor].median():.2f}",
                "time / GRACE": f"{(seconds[editor] / seconds['grace']).median():.2f}",
                "peak memory (MiB)": f"{peaks[editor]:.0f}",
                "memory / GRACE": f"{peaks[editor] / peaks['grace']:.2f}",
            }


def _distances(records: pd.DataFrame, editor: str) -> np.ndarray:
    """Distances (cases, 1 + neighbours) of the rephrased prompt and of the neighbours from the edit prompt."""
    recorded = scored(records)[lambda rows: rows["editor"] == editor]["distances"].dropna()
    return np.array([distances[1:] for distances in recorded], dtype=float)


def distance_figure(records: pd.DataFrame):
    """Distances of the rephrased prompt (GRI) and the neighbours (SRI) from the edit prompt (OI), for GRACE's and A-GRACE's keys.

    A panel for each dataset and editor, with cases in the order of their OI-GRI distance; the band extends from a case's nearest
    to its farthest neighbour. A matplotlib figure.
    """
    figure, axes = _panels(2, records["dataset"].nunique(), height=2.6)
    colours = _colours()
    for row, editor in zip(axes, _COMPARED):
        for axis, (dataset, of_dataset) in zip(row, records.groupby("dataset", sort=False)):
            distances = _distances(of_dataset, editor)
            if not len(distances):
                continue
            distances = distances[distances[:, 0].argsort()]
            order, band = np.arange(len(distances)), (distances[:, 1:].min(1), distances[:, 1:].max(1))
            label = "OI–SRI, nearest to farthest"
            axis.fill_between(order, *band, color=colours["neighbour"], alpha=0.35, lw=0, label=label)
            axis.plot(order, distances[:, 0], color=colours["rephrased"], label="OI–GRI")
            axis.axhline(_RADIUS, color="0.2", ls="--", lw=0.8, label="radius")
            axis.set_title(f"{plain(dataset_title(str(dataset)))}, {editor_name(editor)}'s keys")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("cases")
        row[0].set_ylabel("distance")
    return legend(figure, axes, top=1.05, columns=3)


def distance_findings(records: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each dataset, and for GRACE's and A-GRACE's keys: in how many of the ``cases`` the rephrased prompt is ``nearer`` than
    every neighbour, in how many the ``rephrased`` prompt is within the radius, and in how many some ``neighbour`` is."""
    for dataset, of_dataset in records.groupby("dataset", sort=False):
        for editor in _COMPARED:
            distances = _distances(of_dataset, editor)
            if len(distances):
                rephrased, nearest = distances[:, 0], distances[:, 1:].min(1)
                yield {
                    "data": dataset_title(str(dataset)),
                    "editor": editor_name(editor),
                    "cases": len(distances),
                    "nearer": int((rephrased < nearest).sum()),
                    "rephrased": int((rephrased <= _RADIUS).sum()),
                    "neighbour": int((nearest <= _RADIUS).sum()),
                }


def projection_figure(places: pd.DataFrame):
    """One case's prompts, projected onto two principal components, for each kind of key; a matplotlib figure."""
    titles = {"last": "last-token key", "mean": "encoded mean key"}
    looks = {"edit": ("*", 200), "rephrased": ("o", 70), "neighbour": ("X", 70)}
    figure, axes = _panels(len(titles), places["dataset"].nunique(), height=3.2)
    colours = _colours()
    for row, (query, title) in zip(axes, titles.items()):
        for axis, (dataset, prompts) in zip(row, places[places["query"] == query].groupby("dataset", sort=False)):
            for kind, (marker, size) in looks.items():
                points = prompts[prompts["kind"] == kind]
                axis.scatter(points["x"], points["y"], marker=marker, s=size, color=colours[kind], label=kind)
            axis.set_title(f"{plain(dataset_title(str(dataset)))} case {prompts['case_id'].iloc[0]}, {title}")
            axis.set_xlabel("first component")
            axis.set_ylabel("second component")
            axis.margins(0.15)
    return legend(figure, axes, top=1.04, columns=3)


@table
def projection_table(places: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Distances of the projected case's prompts from its edit prompt, in the whole space of each kind of key."""
    keys = {"last": "last token (GRACE)", "mean": "encoded mean (A-GRACE)"}
    for (dataset, query), prompts in places.groupby(["dataset", "query"], sort=False):
        rephrased = prompts[prompts["kind"] == "rephrased"]["distance"].iloc[0]
        neighbours = prompts[prompts["kind"] == "neighbour"]["distance"].sort_values()
        holds, inside = "" if rephrased <= _RADIUS else "not ", (neighbours <= _RADIUS).sum()
        yield {
            "Case": f"{dataset_title(dataset)} {prompts['case_id'].iloc[0]}",
            "Key": keys[query],
            "Rephrased": f"{rephrased:.2f}",
            "Neighbours": ", ".join(f"{distance:.2f}" for distance in neighbours),
            f"Within {_RADIUS:g}": f"{holds}the rephrased prompt, {inside} of {len(neighbours)} neighbours",
        }


def radius_figure(sweep: pd.DataFrame):
    """Generalization against specificity as the radius grows, a curve for each margin; a dot marks the paper's radius of 1."""
    import seaborn as sns

    figure, axes = _panels(1, sweep["dataset"].nunique(), height=3.6)
    margins = sorted(sweep["margin"].dropna().unique())
    colours = sns.color_palette("viridis", len(margins))
    widths = np.linspace(5, 1.2, len(margins))  # curves that coincide stay visible
    for axis, (dataset, of_dataset) in zip(axes[0], sweep.groupby("dataset", sort=False)):
        measured = of_dataset.assign(
            kept=100 * of_dataset["specificity_rate"], general=100 * of_dataset["generalization"]
        )
        curves = {editor: curve.set_index("kept") for editor, curve in measured.groupby("editor")}
        for editor, look in (("grace", ":"), ("a-grace-wo-cl", "--")):
            axis.plot(curves[editor]["general"], look, color=editor_colour(editor), label=editor_name(editor))
        for margin, colour, width in zip(margins, colours, widths):
            curve = curves[A_GRACE][curves[A_GRACE]["margin"] == margin]
            axis.plot(curve["general"], "-", color=colour, lw=width, label=f"A-GRACE, margin {margin:g}")
            axis.plot(curve[curve["radius"] == _RADIUS]["general"], "o", color=colour)
        axis.set_title(f"{plain(dataset_title(str(dataset)))}, {of_dataset['cases'].iloc[0]} selection cases")
        axis.set_xlabel("neighbours unchanged (%)")
    axes[0][0].set_ylabel("generalization, exact match (%)")
    return legend(figure, axes, top=1.14, columns=4)


@table
def radius_table(sweep: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Generalization and neighbours unchanged, at the paper's radius of 1 and at the radius where their harmonic mean is largest."""
    for (dataset, editor, margin), curve in sweep.groupby(["dataset", "editor", "margin"], sort=False, dropna=False):
        best, papers = _balanced(curve), curve[curve["radius"] == _RADIUS].iloc[0]
        yield {
            "Data": dataset_title(dataset),
            "Editor": editor_name(editor),
            "Margin": "–" if pd.isna(margin) else f"{margin:g}",
            "Gen. EM, radius 1": percent(papers["generalization"]),
            "Spec. kept, radius 1": percent(papers["specificity_rate"]),
            "Best radius": f"{best['radius']:.2f}",
            "Gen. EM, best": percent(best["generalization"]),
            "Spec. kept, best": percent(best["specificity_rate"]),
        }


def radius_findings(sweep: pd.DataFrame) -> dict[str, tuple[pd.Series, pd.Series]]:
    """For each dataset, the best point of the sweep for GRACE, and for A-GRACE over all margins."""
    return {
        dataset_title(str(dataset)): tuple(_balanced(points[points["editor"] == name]) for name in _COMPARED)
        for dataset, points in sweep.groupby("dataset", sort=False)
    }


def reached(point: pd.Series) -> float:
    """The selection criterion at a point of a sweep, with generalization in place of effectiveness."""
    return criterion(point["generalization"], point["specificity_rate"])


def _balanced(points: pd.DataFrame) -> pd.Series:
    """The point of a sweep with the highest selection criterion; among equals, the point with the smallest radius."""
    of_points = points.apply(reached, axis=1)
    return points.loc[points[of_points == of_points.max()]["radius"].idxmin()]


def findings(records: pd.DataFrame, compat: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What the tables show for each dataset that has GRACE and A-GRACE, on the cases that all variants have.

    Yields:
        ``data``, its title; ``cases``, their number; ``means``, scores times 100 by editor; ``released``, the share of A-GRACE's
        cases with all neighbours unchanged under the released program's defects, in percent, and the number of these cases (None
        if there are none); and ``repaired``, the same for these cases without the defects.
    """
    of_variants = scored(records)[lambda rows: rows["editor"].isin(A_GRACE_VARIANTS)]
    with_defects = scored(compat)[lambda rows: rows["editor"] == A_GRACE]
    for dataset, variants in of_variants.groupby("dataset", sort=False):
        if not set(_COMPARED) <= set(variants["editor"]):
            continue
        shared = shared_cases(variants, ["editor"])
        variants = variants[variants["case_id"].isin(shared)]
        kept = with_defects[with_defects["dataset"] == dataset]
        same = variants[(variants["editor"] == A_GRACE) & variants["case_id"].isin(kept["case_id"])]
        released, repaired = ((100 * rows["specificity_em"].mean(), len(rows)) for rows in (kept, same))
        yield {
            "data": dataset_title(str(dataset)),
            "cases": len(shared),
            "means": 100 * variants.groupby("editor")[_PRESET_SCORES].mean(),
            "released": released if len(kept) else None,
            "repaired": repaired,
        }


def _panels(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    return panels(rows, columns, 4.4, height)


def _colours() -> dict[str, tuple]:
    import seaborn as sns

    palette = sns.color_palette("colorblind", 10)
    return {kind: palette[place] for kind, place in _KIND_COLOURS.items()}
