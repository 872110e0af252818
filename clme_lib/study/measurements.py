"""The appendices' measurements by name (``clme measure``). Each is defined next to its table and writes a CSV file."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pandas as pd

from ..datasets.paper import PAPER_DATASET_NAMES
from ..datasets.registry import selection_cases
from ..evaluation.loading import load_subject
from ..support.errors import StudyError
from .config import MeasureConfig

# name -> where it is defined, and what it measures
MEASUREMENTS = {
    "selection": ("appendices.selection:select", "scores of each setting in an editor's hyperparameter grid"),
    "presets": ("appendices.selection:compare_presets", "effect of the released program's defects on an editor"),
    "end-of-target": ("appendices.selection:compare_ends", "effect of also learning to stop after the target"),
    "weight-updates": (
        "appendices.weight_updates:diagnose_editors",
        "effect of weight updates on losses, before any text is generated",
    ),
    "pmet-parts": (
        "appendices.weight_updates:take_pmet_apart",
        "what PMET loses by omitting the attention's vector and by spreading the update",
    ),
    "lookups": (
        "appendices.lookups:sweep_lookups",
        "an editor's updates under lookup-aware statistics, and at another token",
    ),
    "conflicts": (
        "conflicts:measure_conflicts",
        "two edits of one prompt: with two targets, and with the original answer as the second target",
    ),
    "interference": (
        "interference:measure_interference",
        "what edits made one after another do to each other",
    ),
    "statistics": (
        "appendices.statistics:compare_statistics",
        "MEMIT's updates under statistics from more and from less text",
    ),
    "radius": ("rq3.measurements:sweep_radius", "A-GRACE's scores as a function of margin and radius"),
    "encoders": (
        "appendices.encoder_settings:compare_encoders",
        "A-GRACE's encoder under several settings and training-set sizes",
    ),
}
_FLAGS = {"file": "--out", "datasets": "--dataset", "editor": "--editor", "editors": "--editor", "cases": "--cases"}


def measure(config: MeasureConfig) -> pd.DataFrame:
    """Make a measurement and return its table.

    Raises:
        StudyError: no such measurement, an option that it does not take, a required option that is missing, or more selection cases
            than there are.
    """
    if config.measurement not in MEASUREMENTS:
        raise StudyError(f"unknown measurement {config.measurement!r}; known: {', '.join(MEASUREMENTS)}")
    module, _, name = MEASUREMENTS[config.measurement][0].partition(":")
    function = getattr(import_module(f"clme_lib.study.{module}"), name)
    taken = dict(list(inspect.signature(function).parameters.items())[1:])
    options: dict[str, Any] = {
        "file": config.out,
        "cases": config.cases,
        "datasets": config.dataset,
        "editors": config.editors,
    }
    if "editor" in taken and config.editors is not None and len(config.editors) == 1:
        options["editor"] = options.pop("editors")[0]
    given = {name: value for name, value in options.items() if value is not None}
    needed = [name for name, parameter in taken.items() if parameter.default is parameter.empty]
    if unknown := [name for name in given if name not in taken]:
        raise StudyError(f"measure {config.measurement}: does not take {_FLAGS[unknown[0]]}, or takes only one value")
    if missing := [name for name in needed if name not in given]:
        raise StudyError(f"measure {config.measurement}: needs {_FLAGS[missing[0]]}")
    if config.cases is not None:  # too many are refused before a model is loaded
        default = taken["datasets"].default if "datasets" in taken else PAPER_DATASET_NAMES
        for dataset in config.dataset or default:
            selection_cases(dataset, config.cases)
    return function(load_subject(config.subject, config.device), **given)
