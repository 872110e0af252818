"""What the benchmark chapter shows of a data set: the paper's Tables II and III for whatever was built, and sample cases."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..datasets.base import get_dataset
from ..datasets.cases import Case
from ..datasets.construction import pipeline, relevance, rephrasing
from ..datasets.construction.checking import lengths
from .tables import Table, percent


def level_counts(build: Path | None = None) -> pd.DataFrame:
    """Pairs by relevance level of a CNLE that was built, or of the embedded pairs as the offline scorer judges them."""
    if build is not None:
        return pipeline.level_counts(build)
    with tempfile.TemporaryDirectory() as scratch:
        scorer, rephraser = relevance.OFFLINE_SCORER, rephrasing.GIVEN_INTENTS
        pipeline.build_cnle(Path(scratch), "embedded", scorer, rephraser, targets=None, seed=42)
        return pipeline.level_counts(Path(scratch))


def level_table(counts: pd.DataFrame, label: str, caption: str = "Pairs by relevance (Table II).") -> Table:
    """The paper's Table II: pairs by relevance level (:func:`level_counts`)."""
    shares = [f"{percent(share)} %" for share in counts["share"]]
    shown = {"Relevance": counts["level"], "Pairs": counts["pairs"].astype(str), "Share": shares}
    return Table(pd.DataFrame(shown), caption, label)


def length_table(
    cases_of: dict[str, Sequence[Case]], label: str, caption: str = "Lengths in words and symbols (Table III)."
) -> Table:
    """The paper's Table III: number, mean and median length of each kind of text, for each data set by its name."""
    rows = [
        (name, kind.text, str(kind.number), f"{kind.mean:.1f}", f"{kind.median:.0f}")
        for name, cases in cases_of.items()
        for kind in lengths(cases)
    ]
    return Table(pd.DataFrame(rows, columns=["Data", "Text", "Number", "Mean", "Median"]), caption, label)


def sample_cases(cases: Sequence[Case], count: int = 3) -> str:
    """The first cases as HTML tables: edit prompt, target, rephrased prompt, nearest neighbour."""
    tables = []
    for case in cases[:count]:
        texts = {
            "edit input": case.text,
            "target": case.target,
            "rephrased": get_dataset(case.dataset).text(case.rephrased[0]),
            "nearest neighbour": get_dataset(case.dataset).text(case.unrelated[0]),
        }
        rows = [f"<tr><td>{title}</td><td><pre>{_escaped(text)}</pre></td></tr>" for title, text in texts.items()]
        tables.append(f"<table class='table'><tbody>{''.join(rows)}</tbody></table>")
    return "\n\n".join(tables)


def _escaped(text: str) -> str:
    """Code inside HTML inside Markdown: an empty line would end it, and braces would be substituted."""
    shown = html.escape(text).replace("{", "&#123;").replace("}", "&#125;")
    return shown.replace("\n\n", "\n&#8203;\n")
