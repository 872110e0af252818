"""A-GRACE and its ablations (paper section V): GRACE with a query that rephrased prompts share.

GRACE queries its codebook with the last token's key, and a rephrased prompt's key is too far away. A-GRACE queries it
with ``E(mean of the prompt's keys)``, where the encoder ``E`` was trained on other cases to bring a prompt and its rephrased
prompts together and to keep neighbours apart. Value, layer, radius and steps are GRACE's; the codebook is queried once
per text, when the prompt is read.

Ablations: without contrastive learning (w/o CL) the unencoded mean of the keys is the query; without the mean (w/o Mean) the
encoder is trained on last tokens' keys and gets the last token's key.

From the second generation after an edit on, the released program's query is NaN, so its specificity and fluency are
the unedited model's; ``later_calls="unedited"`` reproduces this. Its w/o Mean is not affected.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

from ..datasets.paper import PAPER_DATASET_NAMES
from ..edits.codebooks import PromptCodebook, Query
from ..edits.encoder import Encoder
from ..forward.prompt_keys import prompt_queries
from ..support.errors import StudyError
from ..support.schema import Schema
from ..support.seeds import generator
from .contrastive_encoder import EncoderHyperparameters, TrainedEncoder, trained_encoder
from .grace import REACHES, CodebookEditor, GRACEHyperparameters, Hparams
from .operations import Phase

LaterCalls = Literal["edited", "unedited"]


class AGRACEWithoutCLHyperparameters(GRACEHyperparameters):
    """GRACE's hyperparameters, and which model makes the second and later generations after an edit."""

    later_calls: LaterCalls = "edited"


class AGRACEHyperparameters(EncoderHyperparameters):
    """The encoder's hyperparameters, and which model makes the second and later generations after an edit."""

    later_calls: LaterCalls = "edited"


class AGRACEWithoutMeanHyperparameters(EncoderHyperparameters):
    """``encoder_query`` is what the encoder is trained on: last tokens' keys, or means (another reading of the paper)."""

    encoder_query: Query = "last"


EncoderHparams = TypeVar("EncoderHparams", bound=EncoderHyperparameters)


class AGRACEWithoutCL(CodebookEditor[Hparams]):
    """A-GRACE without contrastive learning: the mean of the prompt's keys is the query."""

    name, title, order, colour = "a-grace-wo-cl", "A-GRACE w/o CL", 8, 5
    Hyperparameters: ClassVar[type[Schema]] = AGRACEWithoutCLHyperparameters
    compat: ClassVar = {"later_calls": "unedited"}
    codebook = PromptCodebook
    query: ClassVar[Query] = "mean"

    def _keys(self, cases, forward):
        return prompt_queries(self.subject, [case.prompt for case in cases], self.hparams.layer)[self.query]

    def _asked_with(self, cases):
        later_calls = getattr(self.hparams, "later_calls", "edited")
        return {"query": self.query, "first_call_only": later_calls == "unedited"}


class AGRACE(AGRACEWithoutCL[EncoderHparams]):
    """GRACE whose query is an encoded mean over the prompt, so that rephrased prompts find the edit."""

    name, title, order, colour = "a-grace", "A-GRACE", 7, 3
    Hyperparameters: ClassVar[type[Schema]] = AGRACEHyperparameters
    needs_training = True

    cache_folder = "encoders"
    compat: ClassVar = {"later_calls": "unedited", "selection": "edited"}
    selection_grid: ClassVar = [{"margin": dict.fromkeys(PAPER_DATASET_NAMES, margin)} for margin in REACHES]
    selects_reach = True
    _trained: TrainedEncoder | None = None

    @property
    def trained(self) -> TrainedEncoder:
        """The encoder; StudyError if :meth:`fit` has not been called."""
        if self._trained is None:
            raise StudyError(f"{self.name} has not been trained: call fit(cases) with cases that will not be edited")
        return self._trained

    def fit(self, cases, edited=()):
        query = getattr(self.hparams, "encoder_query", self.query)
        self._trained = trained_encoder(self.subject.original, self.hparams, query, cases, edited, self.seed)

    def _edit_batch(self, cases, tokenized):
        _ = self.trained  # raises before any value is learnt, if there is no encoder
        return super()._edit_batch(cases, tokenized)

    def stand_in(self, cases):
        encoder = Encoder(self.subject.inner_size, self.hparams.architecture, generator(self.seed, "encoder"))
        frozen = encoder.to(self.subject.device).requires_grad_(False)
        self._trained = TrainedEncoder(frozen, {"dataset": cases[0].dataset})

    def operations(self, prompt, target, steps):
        weights = sum(p.numel() for p in self.trained.encoder.parameters())
        return [*super().operations(prompt, target, steps), Phase("encoder", 2 * weights, 4 * weights)]

    def _keys(self, cases, forward):
        return self.trained.encoder(super()._keys(cases, forward))

    def _asked_with(self, cases):
        trained_on = self.trained.header["dataset"]
        for case in cases:
            if case.dataset != trained_on:
                raise StudyError(
                    f"case {case.case_id} belongs to {case.dataset}, but the encoder of {self.name} was trained on "
                    f"{trained_on}: call fit with cases of {case.dataset}"
                )
        return {**super()._asked_with(cases), "encoder": self.trained.encoder}


class AGRACEWithoutMean(AGRACE[AGRACEWithoutMeanHyperparameters]):
    """A-GRACE without the mean: the encoder is given the last token's key."""

    name, title, order, colour = "a-grace-wo-mean", "A-GRACE w/o Mean", 9, 6
    Hyperparameters = AGRACEWithoutMeanHyperparameters
    compat: ClassVar = {"selection": "edited"}
    selection_grid: ClassVar = []  # its margin is A-GRACE's
    query: ClassVar[Query] = "last"
