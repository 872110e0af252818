"""What an editor is: hyper-parameters, ``edit`` from cases to edits, and ``fit`` for those that learn.

A new editor is one file with a subclass of :class:`Editor` and one line in ``EDITORS`` of ``clme_lib.editors.registry``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from tqdm import tqdm

from ..datasets.cases import Case
from ..edits.base import Edit
from ..forward.tokens import TokenRow, tokenize
from ..subjects.subject import Subject
from ..support.batching import of_like_length
from ..support.errors import StudyError
from ..support.memory import peak_memory_mib, reset_peak_memory
from ..support.schema import Schema
from ..support.seeds import DEFAULT_SEED

Values = TypeVar("Values", bound=Schema)


class Editor(ABC, Generic[Values]):
    """Turns cases into edits of one subject, without ever changing the subject.

    Args:
        subject: the model to edit.
        values: hyper-parameters, an instance of the class's ``Hyperparameters``.
        seed: the study's seed; each case draws from its own generator.
    """

    name: ClassVar[str]
    Hyperparameters: ClassVar[type[Schema]]
    needs_training: ClassVar[bool] = False
    default_batch: ClassVar[int] = 8
    # what preset="compat" changes: the released program's defects that can change conclusions
    compat: ClassVar[dict[str, Any]] = {}

    def __init__(self, subject: Subject, values: Values, seed: int = DEFAULT_SEED) -> None:
        self.subject = subject
        self.values = values
        self.seed = seed
        for layer in {getattr(values, "layer", 0), *getattr(values, "layers", ())}:
            subject.down_proj(layer)  # raises when the layer does not exist

    def fit(self, cases: Sequence[Case], edited: Sequence[Case] = ()) -> None:
        """Learn from training cases. Only trained editors (MALMEN, A-GRACE) have anything to learn.

        Args:
            edited: the cases to be edited afterwards. Nothing is learnt from them; the released A-GRACE chooses its
                encoder by them, which its ``compat`` preset repeats.
        """

    def setup(self) -> dict[str, Any]:
        """Prepare what is shared by all cases, outside any case's clock, and describe it for the run's provenance."""
        return {}

    def edit(self, cases: Sequence[Case], batch_size: int | None = None, progress: bool = False) -> list[Edit]:
        """One edit per case, in the cases' order.

        Cases of similar length are optimised together; each has its own loss, stop and random draws, so the batch a
        case lands in does not matter beyond float rounding.

        Raises:
            StudyError: a case cannot be edited (empty target, loss not finite); the message names it.
        """
        self.setup()
        tokenized = [self._tokenize(case) for case in cases]
        costs = [self._cost(one) for one in tokenized]
        batches = of_like_length(costs, ratio=self._longest(), most=batch_size or self.default_batch)
        edits: dict[int, Edit] = {}
        with tqdm(total=len(cases), desc=f"{self.name}: edit", unit="case", disable=not progress) as bar:
            for batch in batches:
                done = self._timed([cases[n] for n in batch], [tokenized[n] for n in batch])
                edits.update(zip(batch, done))
                bar.update(len(batch))
        return [edits[n] for n in range(len(cases))]

    def cost(self, case: Case) -> int:
        """Columns that every optimisation step touches; cases of equal cost make batches without padding."""
        return self._cost(self._tokenize(case))

    def _cost(self, tokenized: TokenRow) -> int:
        return len(tokenized.inputs)

    def _longest(self) -> float:
        """Of a batch's costs, the largest over the smallest: with every column padded, a third is computed for nothing."""
        return 1.5

    @abstractmethod
    def _edit_batch(self, cases: Sequence[Case], tokenized: Sequence[TokenRow]) -> list[Edit]:
        """Edit a batch of cases; gradients are enabled."""

    def _tokenize(self, case: Case) -> TokenRow:
        try:
            return tokenize(self.subject.tokenizer, case.prompt, case.target)
        except StudyError as error:
            raise StudyError(f"case {case.case_id} of {case.dataset}: {error}") from error

    def _timed(self, cases: Sequence[Case], tokenized: Sequence[TokenRow]) -> list[Edit]:
        reset_peak_memory(self.subject.device)
        synchronize(self.subject.device)
        started = time.perf_counter()
        with torch.enable_grad():
            edits = self._edit_batch(cases, tokenized)
        synchronize(self.subject.device)
        seconds = (time.perf_counter() - started) / len(cases)
        peak = peak_memory_mib(self.subject.device)
        for edit in edits:
            if edit.log.losses and not all(map(_finite, edit.log.losses)):
                raise StudyError(
                    f"case {edit.case_id}: the loss of {self.name} is not finite; lower its learning rate or use float32"
                )
        return [
            replace(edit, log=replace(edit.log, seconds=seconds, batch=len(cases), peak_memory_mib=peak))
            for edit in edits
        ]


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle, so that wall-clock seconds mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _finite(value: float) -> bool:
    return value - value == 0
