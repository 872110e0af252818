"""GRACE: a codebook at one layer (paper section III-B; Hartvigsen et al. 2023, "cold" initial values).

Algorithm, for one case: the key is the input of ``W_l`` at the prompt's last token; a value ``v`` drawn from
U[0, 1)^d replaces the output of ``W_l`` there; `steps` Adam updates of ``v`` alone minimise the mean cross-entropy of the
target's tokens. No weight changes. A query within ``radius`` (Euclidean) of the key gets the value.
"""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import BeforeValidator, Field

from ..datasets.cases import Case
from ..edits.base import EditLog
from ..edits.codebooks import Codebook
from ..forward.partial import PartialForward
from ..support.errors import StudyError
from ..support.seeds import generator, seed_of
from .base import Editor, TargetHyperparameters
from .operations import Phase, Sizes


def _per_dataset(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("expected a value for each dataset, such as {'cnle': 2.0, 'csne': 2.0}")
    return value


# grid of a radius or margin, the paper's value first
REACHES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
PerDataset = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_per_dataset)]


def radius_of(radii: dict[str, float], case: Case) -> float:
    """The radius for the case's dataset; StudyError if there is none."""
    if case.dataset not in radii:
        raise StudyError(f"radii: no value for {case.dataset!r}; given: {', '.join(radii) or 'none'}")
    return radii[case.dataset]


class GRACEHyperparameters(TargetHyperparameters):
    """``radius`` is epsilon, in units of the key space."""

    layer: int = Field(default=27, ge=0)
    steps: int = Field(default=30, gt=0)
    lr: float = Field(default=1.0, gt=0)
    radius: float = Field(default=1.0, gt=0)


Hparams = TypeVar("Hparams", bound=GRACEHyperparameters)


class CodebookEditor(Editor[Hparams]):
    """Shared base of GRACE and A-GRACE: one key and one learnt value per case."""

    updates_weights = False
    from_lookup = True
    codebook: ClassVar[type[Codebook]] = Codebook

    def operations(self, prompt, target, steps):
        sizes, layer = Sizes(self.subject), self.hparams.layer
        operations, traffic = sizes.step(target, prompt + target - 1, sizes.blocks - 1 - layer, target)
        return [*sizes.read_once(prompt, target, layer), Phase("steps", steps * operations, steps * traffic)]

    def _edit_batch(self, cases, tokenized):
        hparams, device = self.hparams, self.subject.device
        forward = PartialForward(self.subject, tokenized, hparams.layer, from_lookup=True)
        draws = [generator(self.seed, self.subject.name, case.dataset, self.name, case.case_id) for case in cases]
        initial = torch.stack([torch.rand(self.subject.hidden_size, generator=draw) for draw in draws])
        values = initial.to(device, copy=True).requires_grad_(True)
        # Adam is element-wise, so one optimiser over the stacked values equals one optimiser per case
        optimizer = torch.optim.Adam([values], lr=hparams.lr)
        losses = []
        for _ in range(hparams.steps):
            current = forward.losses(forward.with_touched(values))
            losses.append(current.detach())
            optimizer.zero_grad(set_to_none=True)
            current.sum().backward()
            optimizer.step()
        keys, asked_with = self._keys(cases, forward), self._asked_with(cases)
        return [
            self.codebook(
                case.case_id,
                self.name,
                layer=hparams.layer,
                keys=keys[n : n + 1].clone(),
                values=values[n : n + 1].detach().clone(),
                radii=torch.full((1,), self._radius(case), device=device),
                targets=torch.tensor([seed_of(case.target) - 2**63], device=device),
                log=EditLog(hparams.steps, tuple(seen), initial_sha256=hashlib.sha256(start).hexdigest()),
                **asked_with,
            )
            for n, (case, seen, start) in enumerate(zip(cases, torch.stack(losses, dim=1).tolist(), initial.numpy()))
        ]

    def _keys(self, cases, forward: PartialForward) -> torch.Tensor:
        """The keys that queries are compared with: (B, d_f), or encoded."""
        return forward.keys[range(len(cases)), forward.touched].float()

    def _radius(self, case: Case) -> float:
        return self.hparams.radius

    def _asked_with(self, cases) -> dict[str, Any]:
        """Further fields of the codebooks, which say how their queries are made."""
        return {}


class GRACE(CodebookEditor[GRACEHyperparameters]):
    """A codebook that is queried with the last token's key, at the prompt and at every generated token."""

    name, title, order, colour = "grace", "GRACE", 6, 2
    Hyperparameters = GRACEHyperparameters
    selection_grid: ClassVar = [
        {"layer": layer, "steps": steps} for layer, steps in product((27, 24, 20, 16), (30, 50))
    ]
