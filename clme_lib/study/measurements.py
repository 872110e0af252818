"""The appendices' measurements by name (``clme measure``): each stands beside its table, and writes a CSV."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pandas as pd

from ..evaluation.loading import load_subject
from ..support.errors import StudyError
from .config import MeasureConfig

# name -> where, and what it measures
MEASUREMENTS = {
    "selection": ("appendices.selection:select", "an editor's grid of hyperparameters"),
    "presets": ("appendices.selection:compare_presets", "what the released program's defects do to an editor"),
    "end-of-target": ("appendices.selection:compare_ends", "what learning to stop after the target changes"),
    "weight-updates": (
        "appendices.weight_updates:diagnose_editors",
        "what weight updates do to losses, before any text is generated",
    ),
    "pmet-parts": (
        "appendices.weight_updates:take_pmet_apart",
        "what leaving out the attention's vector and spreading cost PMET",
    ),
    "lookups": (
        "appendices.lookups:sweep_lookups",
        "an editor's writes under lookup-aware statistics, and at another token",
    ),
    "conflicts": (
        "conflicts:measure_conflicts",
        "what two edits of one prompt leave: two targets, and the original answer restored",
    ),
    "statistics": (
        "appendices.statistics:compare_statistics",
        "MEMIT's writes under statistics of more and of less text",
    ),
    "radius": ("rq3.measurements:sweep_radius", "A-GRACE's measures as a function of margin and radius"),
    "encoders": (
        "appendices.encoder_settings:compare_encoders",
        "A-GRACE's encoder by several settings, trained on more and fewer cases",
    ),
}
_FLAGS = {"file": "--out", "datasets": "--dataset", "editor": "--editor", "editors": "--editor", "cases": "--cases"}


def measure(config: MeasureConfig) -> pd.DataFrame:
    """Make a measurement and return its table.

    Raises:
        StudyError: no such measurement, an option that it does not take, or none where it needs one.
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
        raise StudyError(f"measure {config.measurement}: {_FLAGS[unknown[0]]} is not taken, or only one")
    if missing := [name for name in needed if name not in given]:
        raise StudyError(f"measure {config.measurement}: {_FLAGS[missing[0]]} is needed")
    return function(load_subject(config.subject, config.device), **given)
