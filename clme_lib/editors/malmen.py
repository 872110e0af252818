"""MALMEN: a hypernetwork turns gradients into updates of several layers (paper section III-B; Tan et al. 2024).

Algorithm, for one case::

    one forward and backward pass of the target's mean cross-entropy on the prompt and target
    K, G: inputs of W_l, and gradients at its outputs, at the columns that predict the target's tokens
    V = network(K, G);  U = (K K^T + e^theta I)^-1 V;  W_l <- W_l + U^T K        in each of six layers (hypernetwork.py)

``fit`` trains the network on other cases (malmen_training.py), once per subject, data set and fold.

The released program caches the first tokens of the prompt instead, because it reads a mask made for the target
alone; and it tokenises the target alone. ``cached="released"`` and ``targets="alone"`` do as it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ..datasets.cases import Case
from ..edits import EditLog, LowRankUpdate
from ..errors import StudyError
from ..hyperparameters import Schema
from ..partial import PartialForward
from ..prompts import Row, encode, tokenize
from ..subjects import Subject
from .base import Editor
from .hypernetwork import Hypernetwork, normal_equation
from .rewriting import PlacedRow


class MALMENHyperparameters(Schema):
    """``step_size`` is where each layer's learnt step starts; ``meta_lr`` is the network's learning rate.

    ``records`` limits how many of the given cases are trained on (None: all).
    """

    layers: tuple[int, ...] = Field(min_length=1)
    step_size: float = Field(gt=0)
    meta_lr: float = Field(gt=0)
    rank: int = Field(gt=0)
    blocks: int = Field(gt=0)
    locality_factor: float = Field(ge=0)
    clip: float = Field(gt=0)
    batch: int = Field(gt=0)
    iterations: int = Field(gt=0)
    records: int | None = Field(default=None, gt=0)
    cached: Literal["target", "released"] = "target"
    targets: Literal["in-context", "alone"] = "in-context"


Hook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def hooked(subject: Subject, hooks: dict[int, Hook]) -> Iterator[None]:
    """Inside the block, ``W_l``'s output of each named layer is ``hooks[l](input, output)``."""
    handles = [
        subject.down_proj(layer).register_forward_hook(lambda _module, args, output, act=act: act(args[0], output))
        for layer, act in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def upper_states(forward: PartialForward, hooks: dict[int, Hook]) -> torch.Tensor:
    """Last-block states at the label columns, with hooks on the edited layers, the first of which is ``forward.layer``."""
    block = forward.subject.blocks[forward.layer]
    with hooked(forward.subject, hooks):
        return forward.states(block.mlp(block.post_attention_layernorm(forward.residual)))


def edit_row(subject: Subject, prompt: str, target: str, targets: str) -> Row:
    """The row an edit of ``prompt`` towards ``target`` reads."""
    tokens = tokenize(subject.tokenizer, prompt, target)
    if targets == "in-context":
        return tokens
    joined = encode(subject.tokenizer, prompt + " " + target)
    alone = tuple(encode(subject.tokenizer, target))
    return PlacedRow(tuple(joined[:-1]), 0, tokens.lookup, max(0, len(joined) - 1 - len(alone)), alone)


class Cached:
    """Keys and gradients at a batch's cached columns, by layer: what an update is made from.

    Attributes:
        owner: (n,) the row each cached token is of.
        keys, gradients: layer -> (n, d_f) and (n, d), float32.
        losses: (B,) mean cross-entropy of each row's target under the unedited subject.
    """

    def __init__(self, forward: PartialForward, layers: Sequence[int], cached: str) -> None:
        self.owner = forward.label_rows
        columns = forward.label_columns
        if cached == "released":
            starts = forward.label_counts.cumsum(0) - forward.label_counts
            columns = torch.arange(len(self.owner), device=columns.device) - starts[self.owner]
        leaves = {layer: torch.zeros_like(forward.outputs, requires_grad=True) for layer in layers}
        inputs: dict[int, torch.Tensor] = {}

        def hook(layer: int) -> Hook:
            def act(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                inputs[layer] = given.detach()
                return output + leaves[layer]

            return act

        with torch.enable_grad():
            states = upper_states(forward, {layer: hook(layer) for layer in layers})
            losses = forward.row_means(forward.label_losses(states)[0])
            # the sum of the rows' means: a token counts the same in training's batches as in a single edit
            losses.sum().backward()
        self.losses = losses.detach()
        self.keys = {layer: inputs[layer][self.owner, columns].float() for layer in layers}
        self.gradients = {}
        for layer, leaf in leaves.items():
            gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            self.gradients[layer] = gradient[self.owner, columns].float()


class MALMEN(Editor[MALMENHyperparameters]):
    """A learnt update of rank at most the target's tokens in each of several layers."""

    name = "malmen"
    Hyperparameters = MALMENHyperparameters
    needs_training = True
    compat: ClassVar = {"cached": "released", "targets": "alone"}
    network: Hypernetwork | None = None

    def fit(self, cases: Sequence[Case]) -> None:
        """Train the hypernetwork on cases of one data set, or load it when it has been trained on them before.

        Raises:
            StudyError: the cases are of several data sets, or have no rephrased prompts.
        """
        from .malmen_training import trained

        self.network = trained(self.subject, self.values, cases, self.seed)

    @torch.no_grad()
    def _edit_batch(self, cases, tokenized):
        network = self.network
        if network is None:
            raise StudyError("malmen has not been trained: call fit(cases) with cases that will not be edited")
        layers = sorted(self.values.layers)
        rows = [edit_row(self.subject, case.prompt, case.target, self.values.targets) for case in cases]
        forward = PartialForward(self.subject, rows, layers[0], from_lookup=False)
        cached = Cached(forward, layers, self.values.cached)
        factors: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in cases]
        for n, layer in enumerate(layers):
            wanted = network(cached.keys[layer], cached.gradients[layer], n)
            for case in range(len(cases)):
                mine = cached.owner == case
                keys = cached.keys[layer][mine]
                coefficients = normal_equation(keys, wanted[mine], network.log_damping[n])
                factors[case][layer] = (coefficients.T.contiguous(), keys)
        return [
            LowRankUpdate(case.case_id, self.name, factors=mine, log=EditLog(steps=1, losses=(loss,)))
            for case, mine, loss in zip(cases, factors, cached.losses.tolist())
        ]
