"""What an editor is: hyperparameters, ``edit`` from cases to edits, and ``fit`` for editors that learn.

A new editor is one file: a subclass of :class:`Editor` with a ``name``, in this folder or in another package that names it
in its entry points (group ``clme_lib.editors``). It registers itself; its attributes tell the study everything it needs to know.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from tqdm import tqdm

from ..datasets.cases import Case
from ..edits.base import Edit
from ..forward.partial import longest_above
from ..forward.prompt_keys import prompt_queries
from ..forward.tokens import TokenRow, tokenize
from ..subjects.subject import Subject
from ..support.batching import of_like_length
from ..support.errors import CaseError, StudyError
from ..support.memory import is_out_of_memory, peak_memory_mib, release_memory, reset_peak_memory
from ..support.registry import Registry
from ..support.schema import Schema
from ..support.seeds import DEFAULT_SEED
from .operations import Phase

Hparams = TypeVar("Hparams", bound=Schema)
_EditBatch = Callable[[Sequence[Case], Sequence[TokenRow]], list[Edit]]

EDITORS: Registry[type[Editor]] = Registry("editor", "clme_lib.editors", "clme_lib.editors")


class TargetHyperparameters(Schema):
    """For editors that learn to write a target: whether the end of text after it is learnt too (not in the paper)."""

    end_of_target: bool = False


class Editor(ABC, Generic[Hparams]):
    """Makes edits of one subject from cases, without ever changing the subject.

    Args:
        hparams: an instance of the class's ``Hyperparameters``.
        seed: the study's seed; each case draws from its own generator.

    Attributes:
        layers: the edited layers, ascending.
        name: its name in commands and records; a subclass with a name is registered.
        title, order, colour: its name and position in tables, and its index in seaborn's colourblind palette; without them, its
        name, the last position and an unused colour.
        Hyperparameters: types, ranges and defaults (the paper's values); a subject's YAML overrides single ones.
        needs_training: ``fit`` must be called before ``edit``; for an instance, with its hyperparameters (:meth:`trains`).
        cache_folder: the cache folder of what it prepares once before editing; None if it prepares nothing.
        updates_weights: its edits change weights, so the diagnosis applies to them.
        reads_given_prompts: its edits depend on how the model reads a prompt without any text before it.
        from_lookup: it changes no position before the lookup token, so an optimisation step only processes the later positions.
        compat: hyperparameters that ``preset="compat"`` changes: the released program's defects that can change conclusions.
        without_early_stop: hyperparameters with which every case takes all steps, whatever its loss.
        timed_untrained: what it learns does not affect an edit's cost, which is always measured with :meth:`stand_in`.
        selection_grid: the settings to choose a subject's from, the paper's first; equally many for each of the study's editors.
        selects_reach: the grid is about how far from its prompt an edit acts, per dataset; the other values are the subject's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int]
    colour: ClassVar[int | None]
    Hyperparameters: ClassVar[type[Schema]] = Schema
    needs_training: bool = False
    cache_folder: ClassVar[str | None] = None
    updates_weights: ClassVar[bool] = True
    reads_given_prompts: ClassVar[bool] = True
    from_lookup: ClassVar[bool] = False
    default_batch: ClassVar[int] = 8
    compat: ClassVar[dict[str, Any]] = {}
    without_early_stop: ClassVar[dict[str, Any]] = {}
    timed_untrained: ClassVar[bool] = False
    selection_grid: ClassVar[Sequence[dict[str, Any]]] = ()
    selects_reach: ClassVar[bool] = False

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "name" not in vars(cls):
            return
        # a subclass of another editor does not inherit its title, order and colour
        for attribute, default in {"title": cls.name, "order": 100, "colour": None}.items():
            setattr(cls, attribute, vars(cls).get(attribute, default))
        EDITORS.register(cls)

    def __init__(self, subject: Subject, hparams: Hparams, seed: int = DEFAULT_SEED) -> None:
        self._check_prompts(subject)
        self.subject = subject
        self.hparams = hparams
        self.seed = seed
        self.needs_training = self.trains(hparams)
        layer = getattr(hparams, "layer", None)
        self.layers: tuple[int, ...] = getattr(hparams, "layers", () if layer is None else (layer,))
        for layer in self.layers:
            subject.down_proj(layer)  # raises when the layer does not exist

    @classmethod
    def trains(cls, hparams: Schema) -> bool:
        """Whether ``fit`` must be called before ``edit`` with these hyperparameters (by default, whatever the class says)."""
        return cls.needs_training

    @classmethod
    def cached_in(cls, hparams: Schema) -> str | None:
        """Cache folder of what it prepares once before editing, with these hyperparameters; None if it prepares nothing."""
        return cls.cache_folder

    def of(self, subject: Subject) -> Editor[Hparams]:
        """This editor, including all that it has gathered and learnt, for an edited state of its subject."""
        if subject.original is not self.subject.original:
            raise StudyError(
                f"{self.name} was made for {self.subject.name}, and {subject.name} is not an edited state of it"
            )
        self._check_prompts(subject)
        editor = copy.copy(self)
        editor.subject = subject
        return editor

    def fit(self, cases: Sequence[Case], edited: Sequence[Case] = ()) -> None:
        """Learn from training cases, or load what was learnt from them earlier; most editors have nothing to learn.

        Args:
            edited: the cases to be edited afterwards. No editor learns from them, but the released A-GRACE chooses its
            encoder by them, which its ``compat`` preset reproduces.

        Raises:
            StudyError: the cases belong to several datasets, or lack something that is needed for learning.
        """

    def setup(self) -> dict[str, Any]:
        """Prepare what all cases share, outside any case's clock, and describe it for the run's provenance."""
        return {}

    def stand_in(self, cases: Sequence[Case]) -> None:
        """Substitute something of the same size for what is learnt or gathered, to measure the time and memory of editing ``cases``."""

    def operations(self, prompt: int, target: int, steps: int) -> list[Phase]:
        """The operations that editing a case with this many tokens and ``steps`` loss evaluations cannot avoid (operations.py);
        empty if they have not been counted."""
        return []

    def edit(self, cases: Sequence[Case], batch_size: int | None = None, progress: bool = False) -> list[Edit]:
        """One edit per case, in the cases' order.

        Cases of similar length are optimised together. Each has its own loss, stopping point and random draws, so its batch does not matter.

        Args:
            batch_size: at most this many at once. By default a number that suits the editor; cases that do not fit into the device's memory
                together are then edited in halves.

        Raises:
            CaseError: a case cannot be edited (empty target, loss not finite); the message names it.
        """
        self.setup()
        tokenized = [self._tokenize(case) for case in cases]
        costs = [self._cost(tokens) for tokens in tokenized]
        batches = deque(of_like_length(costs, ratio=self._max_cost_ratio(), most=batch_size or self.default_batch))
        edits: dict[int, Edit] = {}
        with tqdm(total=len(cases), desc=f"{self.name}: edit", unit="case", disable=not progress) as bar:
            while batches:
                batch = batches.popleft()
                try:
                    made = self._timed([cases[n] for n in batch], [tokenized[n] for n in batch], self._edit_batch)
                except Exception as error:
                    if batch_size or len(batch) == 1 or not is_out_of_memory(error):
                        raise
                    made = None
                if made is None:  # outside of the except clause, whose error keeps what the attempt had allocated
                    release_memory(self.subject.device)
                    batches.extendleft([batch[len(batch) // 2 :], batch[: len(batch) // 2]])
                    continue
                edits.update(zip(batch, made))
                bar.update(len(batch))
        return [edits[n] for n in range(len(cases))]

    def edit_together(self, cases: Sequence[Case]) -> list[Edit]:
        """One edit per case, in the cases' order, made to act together: composed in that order, they are the edit of all cases.

        By default each edit is made alone. The log's seconds are those of all edits divided by the number of cases.

        Raises:
            CaseError: a case cannot be edited; the message names it.
        """
        return self.edit(cases)

    def lookup_prompt(self, case: Case) -> str:
        """A case's prompt up to its lookup token, at which the edit is written: the last, unless the editor writes elsewhere."""
        return case.prompt

    def lookup_keys(self, cases: Sequence[Case], layer: int) -> torch.Tensor:
        """The input of ``W_l`` at each case's lookup token in the unedited subject, (N, d_f) float32, on its device."""
        return prompt_queries(self.subject.original, [self.lookup_prompt(case) for case in cases], layer)["last"]

    def cost(self, case: Case) -> int:
        """Positions that every optimisation step processes; cases of equal cost make batches without padding."""
        return self._cost(self._tokenize(case))

    def _check_prompts(self, subject: Subject) -> None:
        if self.reads_given_prompts and subject.edit is not None and subject.edit.to_prompts:
            raise StudyError(
                f"{self.name} depends on what the model reads, and {subject.edit.editor} has put text before this subject's prompts: "
                "edit first, then put text before prompts"
            )

    def _cost(self, tokenized: TokenRow) -> int:
        return len(tokenized.inputs) - (tokenized.lookup if self.from_lookup else 0)

    def _max_cost_ratio(self) -> float:
        """Largest allowed ratio of costs in a batch, so that at most a third of the work is padding."""
        return longest_above(self.subject, self.layers[-1]) if self.from_lookup else 1.5

    @abstractmethod
    def _edit_batch(self, cases: Sequence[Case], tokenized: Sequence[TokenRow]) -> list[Edit]:
        """Edit a batch of cases; gradients are enabled."""

    def _tokenize(self, case: Case) -> TokenRow:
        try:
            end = getattr(self.hparams, "end_of_target", False)
            return tokenize(self.subject.tokenizer, case.prompt, case.target, end)
        except CaseError as error:
            raise CaseError(f"case {case.case_id} of {case.dataset}: {error}") from error

    def _together(self, cases: Sequence[Case], edit_batch: _EditBatch) -> list[Edit]:
        """The edits that ``edit_batch`` makes of all cases as one batch, for editors that override :meth:`edit_together`."""
        self.setup()
        return self._timed(cases, [self._tokenize(case) for case in cases], edit_batch)

    def _timed(self, cases: Sequence[Case], tokenized: Sequence[TokenRow], edit_batch: _EditBatch) -> list[Edit]:
        device = self.subject.device
        reset_peak_memory(device)
        synchronize(device)
        started = time.perf_counter()
        with torch.enable_grad():
            edits = edit_batch(cases, tokenized)
        synchronize(device)
        seconds = (time.perf_counter() - started) / len(cases)
        measured: dict[str, Any] = {"seconds": seconds, "batch": len(cases), "peak_memory_mib": peak_memory_mib(device)}
        if (made := [edit.case_id for edit in edits]) != [case.case_id for case in cases]:
            raise StudyError(
                f"{self.name} must return one edit for each case, in the cases' order: for cases {[case.case_id for case in cases]} it returned "
                f"edits of {made}"
            )
        for edit in edits:
            if not all(map(math.isfinite, edit.log.losses)):
                raise CaseError(
                    f"case {edit.case_id}: the loss of {self.name} is not finite; lower its learning rate or use float32"
                )
        return [replace(edit, log=replace(edit.log, **measured)) for edit in edits]


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle, so that wall-clock times are meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
