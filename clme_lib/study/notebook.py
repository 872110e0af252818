"""Notebooks: checked parameters inside one, and executing one with papermill from its text form.

Text notebooks (jupytext ``py:percent``) are the source; papermill executes them; the book renders what was executed.
"""

from __future__ import annotations

import ast
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..support.errors import StudyError
from ..support.schema import Schema, parse
from .config import RunConfig

_WIDGET = "application/vnd.jupyter.widget-view+json"
_INJECTED = "# Parameters"  # first line of the cell that papermill puts after a notebook's own parameters

Config = TypeVar("Config", bound=Schema)


def config_from_notebook(namespace: Mapping[str, Any], schema: type[Config] = RunConfig) -> Config:  # type: ignore[assignment]
    """The configuration from a notebook's parameters: call it with ``globals()`` in a cell after the parameter cell.

    Parameters are the names that the parameter cell gives with a type (``cases: int = 8``), and all that papermill passes. Any field of
    the configuration may be passed, including fields that the cell does not list.

    Raises:
        StudyError: an unknown name (the message lists the known ones) or a value of the wrong type.
    """
    known = list(schema.model_fields)
    names = list(dict.fromkeys(_parameters(namespace))) or namespace.get("__annotations__", ())
    given = {name: namespace[name] for name in names if name in namespace}
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise StudyError(f"unknown parameter {unknown[0]!r}{hint}; known: {', '.join(known)}")
    # papermill's -p has no way to pass None
    empty = [name for name, value in given.items() if isinstance(value, str) and not value]
    nothing = {name: None for name in empty if schema.model_fields[name].default is None}
    return parse(schema, given | nothing, "notebook parameters")


def _parameters(namespace: Mapping[str, Any]) -> Iterator[str]:
    """Names that the executed cells of parameters assign: those with a typed assignment at the top, and papermill's."""
    for source in namespace.get("In", ()):
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a cell of IPython's own syntax
            continue
        if source.startswith(_INJECTED) or any(isinstance(statement, ast.AnnAssign) for statement in statements):
            for statement in statements:
                targets = (
                    statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                )
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def execute(source: Path, target: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a text notebook; ``target`` only appears if every cell succeeds.

    Equal executions give equal bytes: time stamps are removed and cell ids are numbered.

    Raises:
        StudyError: a cell failed, as it does with an unknown parameter (the partial notebook's path is named).
    """
    import jupytext
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # it warns of parameters that a notebook's cell does not list; the notebook itself refuses those that are none
    logging.getLogger("papermill").setLevel(logging.ERROR)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    with tempfile.TemporaryDirectory() as scratch:
        ipynb = Path(scratch) / f"{source.stem}.ipynb"
        try:
            jupytext.write(jupytext.read(source), ipynb)
        except (OSError, ValueError) as error:  # jupytext's own errors are ValueErrors
            raise StudyError(f"{source}: cannot be read as a text notebook: {error}") from error
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
            kept = [output for output in cell.outputs if output.output_type != "stream"]
            cell.outputs = [output for output in kept if _WIDGET not in output.get("data", {})]
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, target)
