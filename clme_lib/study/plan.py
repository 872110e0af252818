"""Which cases a run edits."""

from __future__ import annotations

from ..datasets.cases import Case, sample_cases
from ..datasets.registry import load_cases, selection_ids
from ..support.errors import StudyError
from .config import RunConfig
from .run_folder import load_run


def sampled(config: RunConfig, dataset: str) -> list[Case]:
    """The cases of a data set that a configuration asks for."""
    cases = load_cases(dataset, config.source)
    if config.within is not None:
        earlier = load_run(config.within, editors=config.editors)
        earlier = earlier[earlier["dataset"] == dataset]
        each = [set(mine["case_id"]) for _, mine in earlier.groupby("editor")]
        recorded = set.intersection(*each) if each else set()
        cases = [case for case in cases if case.case_id in recorded]
        if not cases:
            raise StudyError(
                f"within={config.within}: that run has no cases of {dataset} by {', '.join(config.editors)}"
            )
    elif config.source == "embedded":
        cases = [case for case in cases if case.case_id not in selection_ids(dataset)]
    return sample_cases(cases, config.cases, config.sample)
