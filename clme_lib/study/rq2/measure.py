"""RQ2's measurements: the time and memory of one edit, and the number of edits per second.

A folder holds one JSON Lines file per subject, one row per measurement, each with its machine, dtype and number of threads:

``ceiling``     the device's rates (floor.py)
``setup``       seconds to prepare an editor for a dataset, and of a warm-up of two steps; both are outside all other timings
``edit``        one case, edited alone: seconds of the whole ``editor.edit``, peak memory, and memory in use before it
``throughput``  a batch: seconds of its edits and of their evaluation, and the operations of both (editors/operations.py)

Here evaluation means generating all texts: scoring takes milliseconds per case, and packages that a compute node may not have.
The ``edit`` rows time one edit at a time, like the paper (section III-E). Rows are appended as they are measured, and
existing measurements are not repeated. A batch that does not fit into memory is recorded, and no larger batch is tried.

With random weights no target is ever learnt, so early stopping is disabled: every case takes its editor's full number of steps.
What an editor learns or gathers is replaced by a stand-in: random positive-definite matrices for second moments, an untrained
encoder for A-GRACE. MALMEN's network is untrained for real subjects too: its arithmetic does not depend on what it has learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ...datasets.cases import Case, sample_cases, split_cases
from ...datasets.registry import load_cases
from ...editors.base import Editor
from ...editors.operations import Phase, Sizes
from ...editors.registry import get_editor, load_editor
from ...edits.base import Edit
from ...edits.prompts import PromptEdit
from ...evaluation.evaluate import Circumstances, requests_of, write
from ...evaluation.generation import Generated, Request, as_read
from ...evaluation.loading import load_subject
from ...evaluation.unedited import answers_for, unchanged
from ...forward.tokens import encode, tokenize
from ...subjects.subject import Subject
from ...support.cache import file_name
from ...support.errors import StudyError
from ...support.journal import Journal, read_rows
from ...support.memory import is_out_of_memory, memory_in_use_mib, release_memory
from ...support.seeds import DEFAULT_SEED
from .. import provenance
from ..config import BenchConfig
from .floor import clock, measure_ceilings
from .random_weights import random_subject

# columns that together identify a measurement in a file
_KEY = "kind", "subject", "random_weights", "dtype", "machine", "threads", "dataset", "editor", "case_id", "batch"


def load_measurements(folder: Path | str) -> pd.DataFrame:
    """All rows of a measurement folder; StudyError if there are none."""
    rows = [row for file in sorted(Path(folder).glob("*.jsonl")) for row in read_rows(file)]
    if not rows:
        made_by = f"`clme bench --out {folder}` writes"
        raise StudyError(f"{folder}: no measurements; expected {folder}/*.jsonl, which {made_by}")
    return pd.DataFrame(rows)


def bench(config: BenchConfig) -> pd.DataFrame:
    """Complete the measurements of a configuration and return all rows of its folder.

    Raises:
        StudyError: the subject cannot be loaded, or the device is too small for it.
    """
    if config.show:
        return load_measurements(config.show)
    if config.threads:
        torch.set_num_threads(config.threads)
    load = random_subject if config.random_weights else load_subject
    Bench(config, load(config.subject, config.device, config.dtype)).complete()
    return load_measurements(config.out)


class Bench:
    """One configuration on one loaded subject."""

    def __init__(self, config: BenchConfig, subject: Subject) -> None:
        self.config, self.subject = config, subject
        machine = provenance.hardware(subject)
        self.circumstances = {
            "subject": subject.name,
            "random_weights": config.random_weights,
            "dtype": subject.dtype_name,
            "device": machine["device"],
            "machine": machine["name"],
            "threads": machine["threads"],
        }
        name = file_name(f"{subject.name}{'-random' if config.random_weights else ''}")
        self.measured = Journal(config.out / f"{name}.jsonl", lambda row: tuple(map(row.get, _KEY)))

    def complete(self) -> None:
        """Measure what the folder does not have yet."""
        if self._is_missing(kind="ceiling"):
            device = measure_ceilings(self.subject)
            self._add(kind="ceiling", operations_per_second=device.operations, bytes_per_second=device.traffic)
        for dataset in self.config.dataset:
            cases = sample_cases(load_cases(dataset), None, self.config.seed)
            for name in self.config.editors:
                self._editor(name, cases, dataset=dataset, editor=name)

    def _editor(self, name: str, cases: Sequence[Case], **common: str) -> None:
        chosen = cases[: self.config.cases]
        alone = [case for case in chosen if self._is_missing(kind="edit", case_id=case.case_id, **common)]
        sizes = [size for size in self.config.batches if self._is_missing(kind="throughput", batch=size, **common)]
        if not alone and not sizes:
            return
        device = self.subject.device
        started = clock(device)
        try:
            editor = ready(self.subject, name, cases, self.config.random_weights, self.config.seed)
            prepared = clock(device)
            _warm_up(editor, cases[-1])
        except Exception as error:
            self._add(kind="setup", **_did_not_fit(error, device), **common)
            return
        seconds = {"seconds": prepared - started, "warm_up_seconds": clock(device) - prepared}
        self._add(kind="setup", **seconds, **common)
        for case in tqdm(alone, desc=" ".join(common.values()), unit="edit"):
            self._add(kind="edit", **common, **time_edit(editor, case))
        for size in sizes:
            measured = time_batch(editor, [cases[n % len(cases)] for n in range(size)])
            self._add(kind="throughput", batch=size, **common, **measured)
            if measured.get("error"):
                break

    def _is_missing(self, **row: Any) -> bool:
        return {**self.circumstances, **row} not in self.measured

    def _add(self, **row: Any) -> None:
        made = {"commit": provenance.commit(), "measured": provenance.now()}
        self.measured.append({**self.circumstances, **row, **made})


def ready(subject: Subject, name: str, cases: Sequence[Case], random_weights: bool, seed: int = DEFAULT_SEED) -> Editor:
    """An editor that is ready to edit; for random weights, with stand-ins for what is learnt or gathered, and no early stopping."""
    overrides = get_editor(name).without_early_stop if random_weights else {}
    editor = load_editor(name, subject, seed=seed, **overrides)
    if random_weights or editor.timed_untrained:
        editor.stand_in(cases)
    elif editor.needs_training:
        learnt, edited = split_cases(cases, seed)
        editor.fit(learnt, edited=edited)
    editor.setup()
    return editor


def _warm_up(editor: Editor, case: Case) -> None:
    """Allocate memory and load kernels, so that the first timed edit does not; two steps run all of an editor's code."""
    hparams = editor.hparams
    if "steps" in type(hparams).model_fields:
        editor.hparams = hparams.model_copy(update={"steps": 2})
    try:
        editor.edit([case], batch_size=1)
    finally:
        editor.hparams = hparams


def time_edit(editor: Editor, case: Case) -> dict[str, Any]:
    """Edit one case alone; returns the columns of an ``edit`` row."""
    device = editor.subject.device
    base = memory_in_use_mib(device)
    started = clock(device)
    (edit,) = editor.edit([case], batch_size=1)
    seconds = clock(device) - started
    tokens = tokenize(editor.subject.tokenizer, case.prompt, case.target)
    sizes, steps = (len(tokens.prompt_ids), len(tokens.target_ids)), len(edit.log.losses)
    return {
        "case_id": case.case_id,
        "prompt_tokens": sizes[0],
        "target_tokens": sizes[1],
        "added_tokens": _added_tokens(editor.subject, edit),
        "seconds": seconds,
        "steps": steps,
        "peak_mib": edit.log.peak_memory_mib,
        "base_mib": base,
        "phases": [[phase.name, phase.operations, phase.traffic] for phase in editor.operations(*sizes, steps)],
    }


def _added_tokens(subject: Subject, edit: Edit) -> int:
    """How many tokens an edit puts before prompts, whether all or only matching ones: its cost whenever the model is used."""
    texts = [text for part in edit.to_prompts if isinstance(part, PromptEdit) for text in part.texts]
    return sum(len(subject.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def time_batch(editor: Editor, cases: Sequence[Case]) -> dict[str, Any]:
    """Edit and evaluate a batch; returns the columns of a ``throughput`` row."""
    device = editor.subject.device
    # shared by all editors, so it is not timed
    answers_for(editor.subject, [prompt for case in cases for prompt in case.unrelated])
    subject, circumstances = editor.subject, Circumstances(editor.name, metrics=None)
    try:
        started = clock(device)
        edits = editor.edit(cases, batch_size=len(cases))
        edit_seconds = clock(device) - started
        if any(edit.lookups is not None for edit in edits):
            # texts that no edit changes are generated once for all such editors, so this is not timed
            write(subject, requests_of(subject, cases, edits, circumstances), edits)
        started = clock(device)
        requests = requests_of(subject, cases, edits, circumstances)
        texts = write(subject, requests, edits)
        evaluate_seconds = clock(device) - started
    except Exception as error:
        return _did_not_fit(error, device)
    phases = [*phases_of_edits(editor, cases, edits), *phases_of_evaluation(subject, requests, texts, edits)]
    return {
        "edit_seconds": edit_seconds,
        "evaluate_seconds": evaluate_seconds,
        "peak_mib": max(edit.log.peak_memory_mib for edit in edits),
        "phases": [[phase.name, phase.operations, phase.traffic] for phase in phases],
    }


def phases_of_edits(editor: Editor, cases: Sequence[Case], edits: Sequence[Edit]) -> list[Phase]:
    """The phases of a batch's edits: the operations of all cases, and weights that are read once for all of them."""
    phases: dict[str, Phase] = {}
    for case, edit in zip(cases, edits):
        tokens = tokenize(editor.subject.tokenizer, case.prompt, case.target)
        of_case: dict[str, Phase] = {}
        for phase in editor.operations(len(tokens.prompt_ids), len(tokens.target_ids), len(edit.log.losses)):
            before = of_case.get(phase.name, Phase(phase.name, 0, 0))
            of_case[phase.name] = Phase(
                phase.name, before.operations + phase.operations, before.traffic + phase.traffic
            )
        for name, phase in of_case.items():
            before = phases.get(name, Phase(name, 0, 0))
            phases[name] = Phase(name, before.operations + phase.operations, max(before.traffic, phase.traffic))
    return list(phases.values())


def phases_of_evaluation(
    subject: Subject, requests: Sequence[Request], texts: Sequence[Generated], edits: Sequence[Edit]
) -> list[Phase]:
    """The phases of generating the texts that edits can change; each edited model reads a prompt once, however many texts follow it."""
    kept = unchanged(subject, requests, edits)
    written = [n for n in range(len(requests)) if n not in kept]
    read, _, _ = as_read(subject, [requests[n] for n in written], edits)
    lengths = {request.prompt: len(encode(subject.tokenizer, request.prompt)) for request in read}
    prompts = {(request.prompt, request.edit): lengths[request.prompt] for request in read}
    sizes = Sizes(subject)
    to_write = [(lengths[request.prompt], len(texts[n].ids)) for n, request in zip(written, read)]
    return [sizes.read_prompts(prompts.values()), sizes.write(to_write)]


def _did_not_fit(error: Exception, device: torch.device) -> dict[str, str]:
    """The row for a measurement that does not fit into the device's memory; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    release_memory(device)
    return {"error": "out of memory"}
