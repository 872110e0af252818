"""Starts of a run: what is recorded before the first case."""

from __future__ import annotations

import json
import secrets

from ..datasets.cases import Case, dataset_sha256, folds
from ..datasets.registry import load_cases
from ..support.journal import write_text
from . import provenance, run_folder
from .config import RunConfig


def begin(
    config: RunConfig,
    model: dict,
    hyperparameters: dict[str, dict],
    setup: dict[str, dict],
    chosen: dict[str, list[Case]],
) -> dict:
    """Record provenance before the first case: a start of the run.

    Args:
        model: what :func:`clme_lib.study.provenance.model` says of the subject.
        hyperparameters: those of the editors in this start; ``setup``: what these editors prepared.
    """
    cases = {name: load_cases(name, config.source) for name in config.dataset}
    write_text(config.out / "folds.json", json.dumps({name: folds(cases[name], config.seed) for name in cases}) + "\n")
    start = {
        "id": secrets.token_hex(4),
        "started": provenance.now(),
        "commit": provenance.commit(),
        "library": provenance.library_sha256(),
        "versions": provenance.versions(),
        **model,
        "data": {name: dataset_sha256(loaded) for name, loaded in cases.items()},
        "cases": {name: len(sample) - config.held_out for name, sample in chosen.items()},
        "held_out": config.held_out,
        "sample": config.sample,
        "set": {name: config.set[name] for name in hyperparameters if name in config.set},
        "hyperparameters": hyperparameters,
        "setup": setup,
    }
    run_folder.write_manifest(config, start)
    return start
