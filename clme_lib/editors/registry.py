"""The editors by name. Registering a new one is one line in ``EDITORS``."""

from __future__ import annotations

from typing import Any, Literal

from ..subjects.settings import PAPER_SUBJECT, Preset, load_settings, registered_subjects, transfer_layers
from ..subjects.subject import Subject
from ..support.errors import StudyError
from ..support.schema import parse
from ..support.seeds import DEFAULT_SEED
from .a_grace import AGRACE, AGRACEWithoutCL, AGRACEWithoutMean
from .base import Editor
from .ft_l import FTL
from .grace import GRACE
from .malmen.editor import MALMEN
from .memit import MEMIT
from .none import NoEditor
from .pmet import PMET
from .rome import ROME

# the order of every table: the unedited baseline first, then as in the paper
EDITORS: dict[str, type[Editor]] = {
    "none": NoEditor,
    "ft-l": FTL,
    "rome": ROME,
    "memit": MEMIT,
    "pmet": PMET,
    "malmen": MALMEN,
    "grace": GRACE,
    "a-grace": AGRACE,
    "a-grace-wo-cl": AGRACEWithoutCL,
    "a-grace-wo-mean": AGRACEWithoutMean,
}


def list_editors() -> list[str]:
    """Names of all editors, the unedited baseline first."""
    return list(EDITORS)


def get_editor(name: str) -> type[Editor]:
    """The class of an editor.

    Raises:
        StudyError: there is none of this name; the message lists the known ones.
    """
    if name not in EDITORS:
        raise StudyError(f"unknown editor {name!r}; known: {', '.join(EDITORS)}")
    return EDITORS[name]


def check_overrides(name: str, overrides: dict[str, Any]) -> None:
    """Raise StudyError unless these are hyper-parameters of an editor, of the right type and within their bounds."""
    schema = get_editor(name).Hyperparameters
    settings = load_settings(PAPER_SUBJECT).editors.get(name, {})
    parse(schema, {**settings, **overrides}, f"set {name}")


def load_editor(
    name: str,
    subject: Subject,
    *,
    values: Literal["subject", "transferred"] = "subject",
    preset: Preset = "clean",
    seed: int = DEFAULT_SEED,
    **overrides: Any,
) -> Editor:
    """An editor of ``subject`` with the hyper-parameters of the subject's YAML.

    Args:
        name: one of :func:`list_editors`.
        values: ``subject`` for the subject's own values, ``transferred`` for the paper's carried over to it.
        preset: ``compat`` repeats the released program's defects that can change conclusions.
        seed: the study's seed.
        **overrides: single hyper-parameters to change, such as ``layer=20``.

    Raises:
        StudyError: unknown editor, unknown or ill-typed hyper-parameter, or a layer the subject does not have.
    """
    if name not in EDITORS:
        raise StudyError(f"unknown editor {name!r}; known: {', '.join(EDITORS)}")
    own = values == "subject" and subject.name in registered_subjects()
    source = subject.name if own else PAPER_SUBJECT
    chosen = load_settings(source).editors.get(name)
    if chosen is None:
        raise StudyError(f"{source}.yaml: editors: no values for {name!r}")
    if not own:
        chosen = transfer_layers(chosen, len(subject.blocks))
    editor = EDITORS[name]
    defects = editor.compat if preset == "compat" else {}
    return editor(
        subject,
        parse(editor.Hyperparameters, {**chosen, **defects, **overrides}, f"{source}.yaml: editors.{name}"),
        seed,
    )
