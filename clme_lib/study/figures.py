"""What the figures have in common: panels, bars side by side, a legend above."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..support.display import printable

# what tells series apart beside their colour
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "**", "--", "||")


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    """A figure and its axes, in rows; width and height are a panel's, in inches."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper", rc={"svg.hashsalt": "clme"})
    if "ipykernel" in sys.modules:  # in a notebook figures are vectors, and of the same data the same
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **shared)


def bars(axis: Any, place: int, places: int, heights: Any, counts: Sequence[int] = (), **look: Any) -> np.ndarray:
    """A series of bars, the ``place``-th of ``places`` that share each tick, with its number of cases under each; returns where the
    bars stand."""
    middles = positions(axis, place, places, len(heights), counts)
    axis.bar(
        middles, heights, 0.8 / places, hatch=HATCHES[place % len(HATCHES)], edgecolor="white", linewidth=0, **look
    )
    return middles


def positions(axis: Any, place: int, places: int, ticks: int, counts: Sequence[int] = ()) -> np.ndarray:
    """Where the ``place``-th of ``places`` series that share each tick stands, with its number of cases written there."""
    middles = np.arange(ticks) + (place - (places - 1) / 2) * 0.8 / places
    axis.grid(axis="x", visible=False)
    for middle, count in zip(middles, counts):
        # In the axis's own height, so that it stands below the axis whatever the scale is.
        place_below = {"xy": (middle, 0), "xycoords": axis.get_xaxis_transform(), "textcoords": "offset points"}
        axis.annotate(str(count), xytext=(0, -2), rotation=90, ha="center", va="top", fontsize=5, **place_below)
    if len(counts):
        axis.tick_params(axis="x", pad=12)
    return middles


def plain(text: str) -> str:
    """A name in a figure, where a pair of dollar signs would begin a formula."""
    return printable(text).replace("$", r"\$")


def legend(figure: Any, axes: Any, top: float, columns: int, loc: str = "upper center") -> Any:
    """One legend above all panels, with what the first shows; returns the figure."""
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc=loc, bbox_to_anchor=(0.5, top), ncol=columns)
    figure.tight_layout()
    return figure
