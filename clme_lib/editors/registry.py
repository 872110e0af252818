"""The editors by name, and loading an editor with its hyperparameters for a subject.

A file in this folder that defines an editor is registered. Another package names a class, or a module that defines editors::

    [project.entry-points."clme_lib.editors"]
    one-step = "my_package.one_step:OneStep"

Nothing is imported before an editor is first asked for.
"""

from __future__ import annotations

from typing import Any, Literal

from ..subjects.settings import Preset, load_settings, transfer_layers
from ..subjects.subject import Subject
from ..support.errors import StudyError
from ..support.schema import Schema, parse
from ..support.seeds import DEFAULT_SEED
from .base import EDITORS, Editor

list_editors, get_editor = EDITORS.names, EDITORS.get


def resolve_hparams(
    name: str,
    subject: str,
    blocks: int | None = None,
    *,
    values: Literal["subject", "transferred"] = "subject",
    preset: Preset = "clean",
    **overrides: Any,
) -> Schema:
    """An editor's hyperparameters for a subject, with the arguments of :func:`load_editor`: the paper's values, which are the class's
    defaults, overridden by the subject's YAML, then by the preset, then by ``overrides``.

    Args:
        blocks: the subject's number of blocks; layers of the paper that it does not have are moved (None: kept).
    """
    editor = get_editor(name)
    fields = editor.Hyperparameters.model_fields.items()
    paper = {field: about.get_default(call_default_factory=True) for field, about in fields if not about.is_required()}
    settings = load_settings(subject).editors if values == "subject" else {}
    own = {**settings.get(name, {}), **(editor.compat if preset == "compat" else {}), **overrides}
    paper = {field: value for field, value in paper.items() if field not in own}
    try:
        chosen = {**(paper if blocks is None else transfer_layers(paper, blocks)), **own}
    except ValueError as error:
        raise StudyError(f"{subject}: editors.{name}: {error}") from error
    return parse(editor.Hyperparameters, chosen, f"{subject}: editors.{name}")


def load_editor(
    name: str,
    subject: Subject,
    *,
    values: Literal["subject", "transferred"] = "subject",
    preset: Preset = "clean",
    seed: int = DEFAULT_SEED,
    **overrides: Any,
) -> Editor:
    """An editor of ``subject``.

    Args:
        name: one of :func:`list_editors`.
        values: ``subject`` for the subject's own values, ``transferred`` for the paper's values transferred to it.
        preset: ``compat`` reproduces the released program's defects that can change conclusions.
        seed: the study's seed.
        **overrides: single hyperparameters to change, such as ``layer=20``.

    Raises:
        StudyError: unknown editor, unknown or ill-typed hyperparameter, or a layer the subject does not have.
    """
    hparams = resolve_hparams(name, subject.name, len(subject.blocks), values=values, preset=preset, **overrides)
    return get_editor(name)(subject, hparams, seed)
