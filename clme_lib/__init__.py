"""clme_lib: model editing for code language models (data sets, editors, metrics).

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

_HOME = {
    "StudyError": "errors",
    "Subject": "subjects",
    "load_subject": "subjects",
    "list_subjects": "subjects",
    "Case": "datasets",
    "load_cases": "datasets",
    "sample_cases": "datasets",
    "folds": "datasets",
    "load_editor": "editors",
    "list_editors": "editors",
    "save_edits": "edit_files",
    "load_edits": "edit_files",
    "evaluate": "evaluation",
    "generate": "generation",
    "RunConfig": "runs",
    "make_config": "runs",
    "run": "runs",
    "load_run": "runs",
    "config_from_notebook": "notebook",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'clme_lib' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
