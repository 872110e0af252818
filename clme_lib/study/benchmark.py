"""What the benchmark chapter shows of a dataset: the paper's Tables II and III for whatever was built, and sample cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from ..datasets.base import get_dataset
from ..datasets.cases import Case
from ..datasets.construction import pipeline
from ..datasets.construction.checking import lengths
from ..support.display import code_block
from .tables import percent, read_csv, table


def level_counts(build: Path) -> pd.DataFrame:
    """Pairs by relevance level of a CNLE that was built, or of a table of levels (``benchmarks/relevance.py``)."""
    return read_csv(build, ["pairs", "share"], ["level"]) if build.suffix == ".csv" else pipeline.level_counts(build)


@table
def level_table(counts: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table II: pairs by relevance level (:func:`level_counts`)."""
    shares = [f"{percent(share)}%" for share in counts["share"]]
    return pd.DataFrame({"Relevance": counts["level"], "Pairs": counts["pairs"].astype(str), "Share": shares})


@table
def length_table(cases_of: dict[str, Sequence[Case]]) -> Iterator[dict[str, str]]:
    """The paper's Table III: number, mean and median length of each kind of text, for each dataset by its name."""
    for name, cases in cases_of.items():
        for kind in lengths(cases):
            row = {"Data": name, "Text": kind.text, "Number": str(kind.number)}
            yield row | {"Mean": f"{kind.mean:.1f}", "Median": f"{kind.median:.0f}"}


def sample_cases(cases: Sequence[Case], count: int = 3) -> str:
    """The first cases as HTML tables: edit prompt, target, rephrased prompt, nearest neighbour."""
    tables = []
    for case in cases[:count]:
        text = get_dataset(case.dataset).text
        texts = {"edit input": case.text, "target": case.target}
        texts |= {"rephrased": text(case.rephrased[0]), "nearest neighbour": text(case.unrelated[0])}
        rows = [f"<tr><td>{title}</td><td>{code_block(text)}</td></tr>" for title, text in texts.items()]
        tables.append(f"<table class='table'><tbody>{''.join(rows)}</tbody></table>")
    return "\n\n".join(tables)
