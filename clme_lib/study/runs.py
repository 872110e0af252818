"""Runs: a grid of datasets and editors over sampled cases, resumable, with provenance (run_folder.py has the files).

Records are appended batch by batch. Killing the process loses at most the current batch; starting the same run again
completes it. Requesting more cases extends it, because samples are nested.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

import pandas as pd
from tqdm import tqdm

from ..datasets.base import get_dataset
from ..datasets.cases import Case, dataset_sha256, sample_cases
from ..datasets.registry import load_cases, selection_ids
from ..editors.base import Editor
from ..evaluation.loading import check_lengths, load_subject
from ..subjects.files import subject_fingerprint
from ..subjects.subject import Subject, torch_device
from ..support.errors import StudyError
from ..support.journal import append_rows
from ..support.locks import only_writer
from . import provenance, run_folder
from .config import RunConfig
from .work import Work, circumstances_of, edited_alone, make_editor, planned


def run(config: RunConfig) -> pd.DataFrame:
    """Complete a run and return its records.

    Raises:
        StudyError: the folder holds a run with another configuration, or a published run without the requested records, or
        there is another error that the user can correct.
    """
    if config.dry_run:
        raise StudyError("dry_run: `clme run --dry-run` prints a plan; leave dry_run out to run")
    if run_folder.is_published(config.out):
        run_folder.check_same_run(config)
        return _read_published(config, {name: sampled(config, name) for name in config.dataset})
    # quick checks come first: subject and device, then the cases, then the contents of the folder
    torch_device(config.device)
    model = subject_fingerprint(config.subject)
    chosen = {name: sampled(config, name) for name in config.dataset}
    data = {name: dataset_sha256(load_cases(name, config.source)) for name in config.dataset}
    with only_writer(config.out):
        run_folder.check_same_run(
            config,
            data,
            model,
            {name: run_folder.edited_ids(config, cases) for name, cases in chosen.items()},
        )
        _complete(config, chosen, data)
    return _of_sample(config, run_folder.load_run(config.out, editors=config.editors), chosen)


def _of_sample(
    config: RunConfig, records: pd.DataFrame, chosen: dict[str, list[Case]], published: bool = False
) -> pd.DataFrame:
    """The records that a configuration asks for; a run that grew, or held other cases out, has more. A published run is shown with the
    cases that it held out itself."""
    asked = pd.Series(False, records.index)
    for dataset, rows in records[records["dataset"].isin(chosen)].groupby("dataset"):
        ids = [case.case_id for case in chosen[str(dataset)]]
        count = len(ids) - config.held_out
        edited, apart = set(ids[:count]), set(ids[count:])
        if published and config.held_out:
            apart = set(rows[rows["held_out"]]["case_id"])
        keys = zip(rows["position"], rows["case_id"], rows["held_out"])
        asked[rows.index] = [run_folder.is_of_sample(edited, apart, *key) for key in keys]
    return records[asked].reset_index(drop=True)


def _complete(config: RunConfig, chosen: dict[str, list[Case]], data: dict[str, str]) -> None:
    grid = [(name, editor) for name in config.dataset for editor in config.editors]
    pending = [(name, editor) for name, editor in grid if _is_missing(config, name, editor, chosen[name])]
    if not pending:
        return
    if config.on == "ray":
        from .cluster.driver import complete_on_ray  # Ray is an extra

        complete_on_ray(config, chosen, data, pending)
        return
    subject = load_subject(config.subject, config.device, config.dtype)
    run_folder.check_same_run(config, data, subject.fingerprint)
    for name, cases in chosen.items():
        check_lengths(subject, cases, get_dataset(name).file or config.source)
    editors = {name: make_editor(config, name, subject) for name in dict.fromkeys(name for _, name in pending)}
    # an editor that must learn first prepares itself when it has (work.py)
    first = {name: editor.setup() for name, editor in editors.items() if not editor.needs_training}
    setup = {name: prepared for name, prepared in first.items() if prepared}
    run_folder.check_statistics(config, setup)
    values = {name: provenance.hyperparameters(editor) for name, editor in editors.items()}
    start = run_folder.begin(config, provenance.model(subject), values, setup, chosen)
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, editor in pending:
        rate = _complete_part(config, subject, editors[editor], name, chosen[name], start)
        rates.setdefault(name, {})[editor] = rate
    run_folder.write_manifest(config, {**start, "rates": rates, "finished": provenance.now()})


def _complete_part(
    config: RunConfig, subject: Subject, editor: Editor, dataset: str, cases: Sequence[Case], start: dict
) -> dict[str, float]:
    """Edit and score what has not been recorded yet of a dataset and an editor; how many records that were, in how many seconds."""
    everything = load_cases(dataset, config.source)
    work = Work(config, subject, editor, circumstances_of(config, editor.name, dataset, everything, start))
    keys = run_folder.recorded(config, dataset, editor.name, everything)
    plans = planned(config, editor.name, cases, everything)
    file, state = (folder(config, dataset, editor.name) for folder in (run_folder.records_file, run_folder.state_file))
    total = sum(len(step.scored) for part in plans for step in part.steps)
    with tqdm(total=total, initial=len(keys), desc=f"{dataset} {editor.name}", unit="case") as bar:
        records_made, seconds = 0, 0.0
        for part in plans:
            work.learn(part)
            began = time.perf_counter()
            alone = edited_alone(config, part.steps, keys)
            walked = work.walk(part.steps, keys | {(1, case.case_id) for case in alone}, state)
            for records in chain(work.alone(work.batches(alone)), walked):
                if records:
                    append_rows(file, [record.model_dump() for record in records])
                bar.update(len(records))
                records_made += len(records)
            seconds += time.perf_counter() - began
    return {"records": records_made, "seconds": round(seconds, 3)}


def sampled(config: RunConfig, dataset: str) -> list[Case]:
    """The cases of a dataset that a configuration asks for: those that are edited, then those that are held out.

    Edited cases are taken from the beginning of the sample's order and held-out ones from its end, so that a larger run evaluates the
    same held-out cases. Cases with a check are held out first, since only of these it is known whether what a model writes is right
    when it is run.
    """
    cases = load_cases(dataset, config.source)
    if (file := get_dataset(dataset).file) and config.source not in ("embedded", file):
        raise StudyError(f"source={config.source}: {dataset} has its cases in {file}; leave source out")
    if config.within is not None:
        earlier = run_folder.load_run(config.within, editors=config.editors)
        shared = run_folder.shared_cases(earlier[earlier["dataset"] == dataset], ["editor"])
        cases = [case for case in cases if case.case_id in shared]
        if not cases:
            who = ", ".join(config.editors)
            raise StudyError(f"within={config.within}: that run has no cases of {dataset} by {who}")
    elif config.source == "embedded":
        cases = [case for case in cases if case.case_id not in selection_ids(dataset)]
    left = len(cases) - config.held_out
    if config.held_out and left < 1:
        raise StudyError(f"held_out={config.held_out}: {dataset} has {len(cases)} cases; leave some to edit")
    # the default is a few, or all where there are fewer
    if config.cases is not None and config.cases > left and "cases" in config.model_fields_set:
        besides = f" besides the {config.held_out} that are held out" if config.held_out else ""
        raise StudyError(
            f"cases={config.cases}: {dataset} has only {left} cases to draw from{besides}; request at most that many, or all"
        )
    ordered = sample_cases(cases, None, config.sample)
    apart = {case.case_id for case in sorted(ordered, key=lambda case: case.check is not None)[left:]}
    edited = [case for case in ordered if case.case_id not in apart]
    return edited[: config.cases] + [case for case in ordered if case.case_id in apart]


def _read_published(config: RunConfig, chosen: dict[str, list[Case]]) -> pd.DataFrame:
    """What a published run has of the chosen cases; an editor may have fewer cases than another."""
    numbers = {start.get("held_out", 0) for start in run_folder.load_manifest(config.out)["starts"]}
    if config.held_out and config.held_out not in numbers:
        known = " or ".join(map(str, sorted(numbers | {0})))
        raise StudyError(f"held_out={config.held_out}: {config.out} is a published run; its held_out is {known}")
    records = _of_sample(config, run_folder.load_run(config.out, editors=config.editors), chosen, published=True)
    pairs = set(zip(records["dataset"], records["editor"]))
    missing = [f"{editor} on {name}" for name in chosen for editor in config.editors if (name, editor) not in pairs]
    if missing:
        raise StudyError(
            f"{config.out} is a published run and has no records of {', '.join(missing)}: choose another out=, or copy the "
            'folder, remove "published" from its run.json and extend the copy'
        )
    return records


def _is_missing(config: RunConfig, dataset: str, editor: str, cases: Sequence[Case]) -> bool:
    everything = load_cases(dataset, config.source)
    keys = run_folder.recorded(config, dataset, editor, everything)
    plans = planned(config, editor, cases, everything)
    return not all(run_folder.is_recorded(step, keys) for part in plans for step in part.steps)
