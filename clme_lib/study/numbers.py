"""The numbers in the book's prose, computed from the published records and written to files that its pages read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ..datasets.base import dataset_title
from ..evaluation.records import UNKNOWN
from ..metrics.base import MEASURES
from ..support.display import Markup, inline_code
from ..support.journal import write_text
from .appendices.selection import differing_values
from .run_folder import load_manifest, load_run
from .tables import cells, editor_name, in_order, interval, percent, to_markdown

PUBLISHED = "smollm2-135m"


def write_numbers(results: Path) -> None:
    """Write what the pages read: ``numbers.json``, by name and as text, and ``hyperparameters.csv``, the values in which the
    published run's subject differs from the paper's."""
    write_text(results / "numbers.json", json.dumps(prose_numbers(results), indent=1, ensure_ascii=False) + "\n")
    differing_values(own=PUBLISHED).to_csv(results / "hyperparameters.csv", index=False)


def prose_numbers(results: Path) -> dict[str, str]:
    """Every number of the prose by the name that pages call it by, as ``{{ name }}``."""
    folder = results / "runs" / PUBLISHED
    records = load_run(folder)
    counts = records.groupby(["dataset", "editor"]).size()
    numbers = {
        "run_cases": " to ".join(map(str, dict.fromkeys((counts.min(), counts.max())))),
        "run_folder": f"`results/runs/{folder.name}`",
        "run_table": provenance_table(load_manifest(folder)["starts"], records),
    }
    for (dataset, editor), rows in records.groupby(["dataset", "editor"]):
        for measure in MEASURES:
            share = interval(rows[f"{measure}_em"], binary=True).mean
            numbers[f"{dataset}_{editor.replace('-', '_')}_{measure}"] = f"{percent(share)} %"
    return numbers


def provenance_table(starts: list[dict], records: pd.DataFrame) -> str:
    """A Markdown table of a run's starts: when, on what and by which program each worked, and how many of the records it made.

    Args:
        starts: as the run's ``run.json`` lists them.
        records: of the run; of those whose maker cannot be proved the last rows say so, by editor.
    """
    rows = []
    for start in sorted(starts, key=lambda start: start["started"]):
        hardware, versions = start["hardware"], start["versions"]
        threads = "" if hardware["device"] == "cuda" else f", threads: {hardware['threads']}"
        made_by = (
            Markup(f"library {inline_code(start['library'][:10])}")
            if start["commit"] == UNKNOWN
            else _commit(start["commit"])
        )
        rows.append(
            {
                "Start": start["started"][:16].replace("T", " "),
                "Editors": ", ".join(map(editor_name, in_order(start["hyperparameters"]))),
                "Records": _counted(records[records["start"] == start["id"]]),
                "Hardware": hardware["name"] + threads,
                "PyTorch, Transformers": f"{versions['torch']}, {versions['transformers']}",
                "Program": made_by,
            }
        )
    unknown = records[records["start"] == UNKNOWN]
    for editor in in_order(unknown["editor"].unique()):
        of_editor = unknown[unknown["editor"] == editor]
        commits = of_editor["commit"].unique()
        row = {"Start": UNKNOWN, "Editors": editor_name(editor), "Records": _counted(of_editor)}
        rows.append(row | {"Program": _commit(commits[0]) if len(commits) == 1 else UNKNOWN})
    return to_markdown(cells(rows).fillna(""))


def _commit(commit: str) -> str:
    return UNKNOWN if commit == UNKNOWN else Markup(f"commit {inline_code(commit[:10])}")


def _counted(records: pd.DataFrame) -> str:
    counts = records.groupby("dataset", sort=False).size()
    return (
        ", ".join(f"{count} {dataset_title(str(dataset))}" for dataset, count in counts.items())
        or "none that can be proved"
    )


if __name__ == "__main__":
    write_numbers(Path("results"))
