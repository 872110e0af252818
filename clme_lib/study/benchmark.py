"""What the benchmark chapter shows of a data set: the paper's Tables II and III for whatever was built, and sample cases."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd

from ..datasets.base import get_dataset
from ..datasets.cases import Case
from ..datasets.construction.checking import lengths
from .tables import Table


def level_table(counts: pd.DataFrame, what: str) -> Table:
    """Table II: pairs by relevance level (:func:`.pipeline.level_counts`)."""
    shown = pd.DataFrame(
        {
            "Relevance": counts["level"],
            "Pairs": counts["pairs"].astype(str),
            "Share": [f"{100 * one:.1f} %" for one in counts["share"]],
        }
    )
    return Table(shown, f"Pairs by relevance (the paper's Table II): {what}.", "tab-levels")


def length_table(cases_of: dict[str, Sequence[Case]]) -> Table:
    """Table III: number, mean and median length of each kind of text, a row a kind and data set (under the name given)."""
    rows = [
        {
            "Data": name,
            "Text": one.text,
            "Number": str(one.number),
            "Mean": f"{one.mean:.1f}",
            "Median": f"{one.median:.0f}",
        }
        for name, cases in cases_of.items()
        for one in lengths(cases)
    ]
    return Table(pd.DataFrame(rows), "Lengths in words and symbols (the paper's Table III).", "tab-lengths")


def sample_cases(cases: Sequence[Case], count: int = 3) -> str:
    """Markdown that shows the first cases: edit prompt, target, rephrased prompt, nearest neighbour."""
    parts = []
    for case in cases[:count]:
        texts = {
            "edit input": case.text,
            "target": case.target,
            "rephrased": get_dataset(case.dataset).text(case.rephrased[0]),
            "nearest neighbour": get_dataset(case.dataset).text(case.unrelated[0]),
        }
        cells = [f"<td>{title}</td><td><pre>{_cell(text)}</pre></td>" for title, text in texts.items()]
        parts.append(f"<table class='table'><tbody>{''.join(f'<tr>{one}</tr>' for one in cells)}</tbody></table>")
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    """Code inside HTML inside Markdown: an empty line would end it, and braces would be substituted."""
    shown = html.escape(text).replace("{", "&#123;").replace("}", "&#125;")
    return shown.replace("\n\n", "\n&#8203;\n")
