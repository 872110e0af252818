"""Notebooks: checked parameters inside one, and executing one with papermill from its text form.

Text notebooks (jupytext ``py:percent``) are the source; papermill executes them; the book renders what was executed.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..support.errors import StudyError
from ..support.schema import Schema, parse
from .config import RunConfig

_WIDGET = "application/vnd.jupyter.widget-view+json"
# names IPython puts into a notebook's namespace
_IPYTHON = {"In", "Out"}
_PLAIN = (str, int, float, list, tuple, type(None))


Config = TypeVar("Config", bound=Schema)


def config_from_notebook(namespace: Mapping[str, Any], schema: type[Config] = RunConfig) -> Config:  # type: ignore[assignment]
    """The configuration from a notebook's parameters: call it first thing after them, with ``globals()``.

    Papermill only logs a parameter that the notebook does not have, so the check is made here.

    Raises:
        StudyError: an unknown name (the message lists the known ones) or a value of the wrong type.
    """
    known = list(schema.model_fields)
    # what a notebook imported or computed is no misspelt parameter: so the cell can be run again
    names = {
        name
        for name, value in namespace.items()
        if name in known or (not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN))
    }
    if unknown := sorted(names - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise StudyError(f"unknown parameter {unknown[0]!r}{hint}; known: {', '.join(known)}")
    values = {name: namespace[name] for name in names}
    # papermill's -p has no way to pass None
    values = {name: None if isinstance(value, str) and not value and schema.model_fields[name].default is None else value
              for name, value in values.items()}  # fmt: skip
    return parse(schema, values, "notebook parameters")


def execute(source: Path, target: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a text notebook; ``target`` appears only when every cell has succeeded.

    Two equal executions give equal bytes: time stamps are dropped and cell ids numbered.

    Raises:
        StudyError: an unknown parameter, or a cell that failed (the partial notebook's path is named).
    """
    import jupytext
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    with tempfile.TemporaryDirectory() as scratch:
        ipynb = Path(scratch) / f"{source.stem}.ipynb"
        jupytext.write(jupytext.read(source), ipynb)
        known = papermill.inspect_notebook(str(ipynb))
        if unknown := sorted(set(parameters) - set(known)):
            raise StudyError(f"{source}: unknown parameter {unknown[0]!r}; known: {', '.join(known)}")
        try:
            # the cells' progress bars go to the console; they are not kept in the notebook
            notebook = papermill.execute_notebook(
                str(ipynb), str(unfinished), dict(parameters), cwd=".", progress_bar=False, stderr_file=sys.stderr
            )
        except PapermillExecutionError as error:
            raise StudyError(f"{source}: a cell failed, see {unfinished}: {error.ename}: {error.evalue}") from error
    notebook.metadata.pop("widgets", None)
    notebook.metadata.papermill = {"input_path": str(source), "parameters": dict(parameters)}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k not in ("papermill", "execution")}
        if cell.cell_type == "code":
            # progress bars and download notices differ from run to run, and widgets load scripts from outside the site
            cell.outputs = [
                one for one in cell.outputs if one.output_type != "stream" and _WIDGET not in one.get("data", {})
            ]
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, target)
