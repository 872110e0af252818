"""Sphinx extension: the numbers in the prose come from a file that is computed from the published records, never typed."""

import json
from pathlib import Path


def load_numbers(app, config):
    """Make every number of ``results/numbers.json`` available as ``{{ name }}``."""
    numbers = json.loads((Path(app.srcdir) / "results" / "numbers.json").read_text(encoding="utf-8"))
    config.myst_substitutions = {**config.myst_substitutions, **numbers}


def setup(app):
    app.connect("config-inited", load_numbers)
    return {"parallel_read_safe": True, "version": "1"}
