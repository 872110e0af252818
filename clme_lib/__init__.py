"""clme_lib: model editing for code language models (datasets, editors, metrics).

    import clme_lib as clme
    subject = clme.load_subject("smollm2-135m")
    cases   = clme.load_cases("cnle")[:8]
    editor  = clme.load_editor("grace", subject)
    edits   = editor.edit(cases)
    records = clme.evaluate(subject, cases, edits)

Importing the package is instant and touches neither network nor torch; each name loads its module when it is used.
"""

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {
    "support.errors": ("StudyError",),
    "subjects.subject": ("Subject",),
    "subjects.settings": ("list_subjects",),
    "datasets.cases": ("Case", "sample_cases", "folds"),
    "datasets.registry": ("load_cases",),
    "editors.registry": ("load_editor", "list_editors"),
    "edits.files": ("save_edits", "load_edits"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.generation": ("generate",),
    "evaluation.loading": ("load_subject",),
    "study.config": ("RunConfig", "make_config"),
    "study.runs": ("run",),
    "study.run_folder": ("load_run",),
    "study.notebook": ("config_from_notebook",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'clme_lib' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
