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
    "StudyError": "support.errors",
    "Subject": "subjects.subject",
    "load_subject": "subjects.subject",
    "list_subjects": "subjects.settings",
    "Case": "datasets.cases",
    "load_cases": "datasets.registry",
    "sample_cases": "datasets.cases",
    "folds": "datasets.cases",
    "load_editor": "editors.registry",
    "list_editors": "editors.registry",
    "save_edits": "edits.files",
    "load_edits": "edits.files",
    "evaluate": "evaluation.evaluate",
    "generate": "evaluation.generation",
    "RunConfig": "study.config",
    "make_config": "study.config",
    "run": "study.runs",
    "load_run": "study.run_folder",
    "config_from_notebook": "study.notebook",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'clme_lib' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
