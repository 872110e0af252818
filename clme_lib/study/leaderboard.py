"""The leaderboard's files, which its page sorts, filters and opens without a server.

``board.js`` has a row for each result (a run's subject, dataset, editor, preset, protocol and number of edits) and describes its columns;
``cases/NAME.js`` has the cases behind a row; ``prompts/DATASET.js`` their prompts and targets. Each calls ``clme.loaded(NAME, DATA)`` with JSON,
because a page opened from a disk may load scripts but not data. Texts of datasets that may not be published are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ..datasets.base import dataset_title, get_dataset
from ..datasets.registry import load_cases
from ..metrics.base import get_metric, list_metrics
from ..metrics.executes import EXECUTION_METRICS
from ..metrics.free import FREE_METRICS
from ..metrics.paper import PAPER_METRICS
from ..support.journal import write_text
from ..support.reading import read_json
from .protocols import protocol_title
from .run_folder import load_run
from .submissions import FILE
from .tables import cells, editor_name, interval, scored, to_markdown

SUBMISSIONS = "submissions"
GROUPS = {"the paper's scores": PAPER_METRICS, "free writing": FREE_METRICS, "running the code": EXECUTION_METRICS}
_BY = ["subject", "dataset", "editor", "preset", "protocol", "position"]
# fields of a record that are shown for a single case, in addition to its scores and texts
_OF_A_CASE = ("fold", "steps", "loss", "edit_seconds", "distances", "fired", "start", "commit", "library")
_SHOWN_PLAIN = ("effectiveness_em", "generalization_em", "specificity_em", "specificity_rate", "fluency")


def run_folders(results: Path) -> list[Path]:
    """Folders of published runs: the study's own, RQ4's (many edits in one model), and submissions."""
    patterns = ("runs/*/run.json", "many/*/*/run.json", f"{SUBMISSIONS}/*/run.json")
    return [file.parent for pattern in patterns for file in sorted(results.glob(pattern))]


def board(results: Path) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each result's row, and the records from which it is computed."""
    for folder in run_folders(results):
        records = scored(load_run(folder))
        records = records[~records["held_out"]]
        submission = read_json(folder / FILE) if folder.parent.name == SUBMISSIONS else {}
        for key, rows in records.groupby(_BY, sort=False):
            subject, dataset, editor, preset, protocol, position = key
            columns = [name for name in list_metrics() if name in rows and rows[name].notna().any()]
            yield (
                {
                    "run": folder.relative_to(results).as_posix(),
                    "authors": submission.get("authors"),
                    "about": submission.get("about"),
                    "subject": subject,
                    "dataset": dataset_title(str(dataset)),
                    "editor": editor_name(str(editor)),
                    "preset": preset,
                    "protocol": protocol_title(str(protocol)),
                    "edits": int(position),
                    "n": len(rows),
                    "scores": {name: _score(rows[name], name) for name in columns},
                },
                rows,
            )


def _score(values: pd.Series, name: str) -> list[float | None]:
    """Mean, bounds of the 95% interval and the number of cases; a bound that does not exist is None."""
    metric = get_metric(name)
    score = interval(values.astype(float), metric.binary, shares=metric.highest == 1)
    numbers = (score.mean, score.low, score.high)
    return [*(None if math.isnan(number) else round(number, 6) for number in numbers), score.n]


def write(results: Path, target: Path, local: bool = False) -> str:
    """Write the leaderboard of a folder of results; returns its rows as a Markdown table, for readers without JavaScript.

    Args:
        local: whether the site stays on this machine, so that it may show prompts and targets of all embedded datasets.
    """
    rows: list[dict[str, Any]] = []
    prompts: dict[str, bool] = {}
    for number, (row, records) in enumerate(board(results)):
        name = f"cases/{number}"
        _write(target, name, list(map(_case, records.to_dict("records"))))
        dataset, source = records["dataset"].iloc[0], records["source"].iloc[0]
        rows.append({**row, "cases": name, "prompts": f"prompts/{dataset}" if source == "embedded" else None})
        prompts[str(dataset)] = source == "embedded" and (local or get_dataset(str(dataset)).publish_texts)
    for dataset, shown in prompts.items():
        cases = load_cases(dataset) if shown else []
        about = {
            case.case_id: {
                "sha256": case.sha256,
                "prompt": case.prompt,
                "target": case.target,
                "rephrased": case.rephrased,
                "neighbours": case.unrelated,
            }
            for case in cases
        }
        _write(target, f"prompts/{dataset}", about)
    columns = {
        name: {
            "title": get_metric(name).title,
            "group": next((group for group, names in GROUPS.items() if name in names), "other"),
            "better": get_metric(name).higher_is_better,
        }
        for name in list_metrics()
    }
    _write(target, "board", {"columns": columns, "rows": rows})
    return to_markdown(cells(_plain_rows(rows)).fillna(""))


def _case(record: dict[str, Any]) -> dict[str, Any]:
    shown = {name: _plain(record.get(name)) for name in _OF_A_CASE}
    scores = {name: _plain(record[name]) for name in list_metrics() if name in record}
    texts = {
        name.removeprefix("generated_"): value
        for name, value in record.items()
        if name.startswith("generated_") and isinstance(value, list)
    }
    about = {"id": int(record["case_id"]), "sha256": record["case_sha256"], "scores": scores, "texts": texts or None}
    return {**about, **shown}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(target: Path, name: str, content: Any) -> None:
    file = target / f"{name}.js"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    write_text(file, f"clme.loaded({json.dumps(name)},{text});\n")


def _plain_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for row in rows:
        editor = row["editor"] + (f" (submitted by {row['authors']})" if row["authors"] else "")
        about = {"Subject": row["subject"], "Data": row["dataset"], "Editor": editor, "Preset": row["preset"]}
        protocol = row["protocol"] + (f", {row['edits']} edits" if row["edits"] > 1 else "")
        scores = {
            get_metric(name).title: f"{100 * row['scores'][name][0]:.1f}"
            for name in _SHOWN_PLAIN
            if name in row["scores"]
        }
        yield about | {"Protocol": protocol, "Run": row["run"], "n": str(row["n"])} | scores
