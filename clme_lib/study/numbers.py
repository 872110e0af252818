"""The numbers in the book's prose, computed from the published records and written to files that its pages read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ..metrics.base import MEASURES
from ..support.journal import write_text
from .appendices.selection import differing_values
from .run_folder import load_manifest, load_run
from .tables import editor_name, in_order, interval, percent, to_markdown

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
        "run_table": provenance_table(load_manifest(folder)["starts"], counts),
    }
    for (dataset, editor), rows in records.groupby(["dataset", "editor"]):
        for measure in MEASURES:
            share = interval(rows[f"{measure}_em"], binary=True).mean
            numbers[f"{dataset}_{editor.replace('-', '_')}_{measure}"] = f"{percent(share)} %"
    return numbers


def provenance_table(starts: list[dict], counts: pd.Series) -> str:
    """A Markdown table: on what, with what and from which commit each editor's records were made.

    Args:
        starts: of the run, as its ``run.json`` lists them.
        counts: records by data set and editor.
    """
    rows = []
    by_editor = dict(iter(counts.groupby("editor")))
    for editor in in_order(by_editor):
        cases = by_editor[editor]
        # the first start that finished what is published (later ones had nothing to do), else the last that worked on it
        worked = [s for s in starts if editor in s["hyperparameters"] and max(s["cases"].values()) >= cases.max()]
        start = ([s for s in worked if "finished" in s] or worked[-1:])[0]
        hardware, versions = start["hardware"], start["versions"]
        threads = "" if hardware["device"] == "cuda" else f", {hardware['threads']} thread(s)"
        known = start["commit"] != "unknown"
        rows.append(
            {
                "Editor": editor_name(editor),
                "Cases": " + ".join(map(str, cases)),
                "Hardware": hardware["name"] + threads,
                "PyTorch": versions["torch"],
                "Transformers": versions["transformers"],
                "Program": f"commit `{start['commit'][:10]}`" if known else f"library `{start['library'][:10]}`",
            }
        )
    return to_markdown(pd.DataFrame(rows))


if __name__ == "__main__":
    write_numbers(Path("results"))
