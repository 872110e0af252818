"""What an update of weights does before any text is generated: to tell the method, the model and the code apart.

If the learnt loss is low but the target's loss under the edit is not, the writing lost it; if it is low everywhere but at the
target's first token, something holds that token back; if the update moves a neighbour's last column as far as the edit
prompt's own, specificity is lost whatever else is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from .blockwise import Blockwise
from .datasets import selection_cases
from .datasets.cases import Case
from .editors import EDITORS, load_editor
from .editors.grace import ValueEditor
from .editors.memit import MEMIT
from .editors.none import NoEditor
from .editors.statistics import LEAST_PER_DIMENSION, TOKENS_PER_DIMENSION
from .edits import DenseUpdate, Edit, LowRankUpdate
from .errors import StudyError
from .prompts import DATASETS, encode, tokenize
from .subjects import Subject

# the subject's own weight, which writes about 60 % of a residual, and one that writes nearly all of it
PARTS_WEIGHTS = (2_093.0, 200.0)
UPDATING = tuple(name for name, editor in EDITORS.items() if not issubclass(editor, NoEditor | ValueEditor))


@torch.no_grad()
def diagnose(subject: Subject, cases: Sequence[Case], edits: Sequence[Edit]) -> pd.DataFrame:
    """One row a case.

    Columns: ``learnt`` (the loss when the editor stopped), ``nll_before`` and ``nll_after`` (the target's mean
    cross-entropy, nats per token, read by the unedited and by the edited subject), ``first_before`` and ``first_after`` (of
    its first token alone), ``norm`` (Frobenius norm of the whole update), ``reach`` (how far the update moves the outputs at the
    neighbours' last columns, as a share of how far it moves the edit prompt's; mean over neighbours and layers).

    Raises:
        StudyError: an edit that does not update weights.
    """
    rows = []
    for case, edit in zip(cases, edits):
        if not isinstance(edit, LowRankUpdate | DenseUpdate):
            raise StudyError(f"{edit.editor} does not update weights: there is nothing to diagnose")
        before, after = (_target_losses(subject, case, one) for one in ([], [edit]))
        deltas = _deltas(edit, subject)
        own, *others = (_moved(subject, prompt, deltas) for prompt in (case.prompt, *case.unrelated))
        rows.append(
            {
                "editor": edit.editor,
                "dataset": case.dataset,
                "case_id": case.case_id,
                "learnt": edit.log.losses[-1],
                "nll_before": before.mean().item(),
                "nll_after": after.mean().item(),
                "first_before": before[0].item(),
                "first_after": after[0].item(),
                "norm": sum(delta.norm() ** 2 for delta in deltas.values()).item() ** 0.5,
                "reach": torch.stack([other / own for other in others]).mean().item(),
            }
        )
    return pd.DataFrame(rows)


def diagnose_editors(subject: Subject, editors: Sequence[str], file: Path, cases: int) -> pd.DataFrame:
    """Mean diagnosis of each editor with the paper's values and with the subject's own, written as CSV.

    Args:
        cases: of each data set's selection cases, the first so many.

    Raises:
        StudyError: an unknown editor, or one that does not update weights.
    """
    if unknown := [editor for editor in editors if editor not in UPDATING]:
        raise StudyError(f"{', '.join(unknown)}: no editor that updates weights; known: {', '.join(UPDATING)}")
    rows = []
    for editor in editors:
        for values in ("transferred", "subject"):
            made = load_editor(editor, subject, values=values)
            found = []
            for dataset in DATASETS:
                chosen, others = selection_cases(dataset, cases)
                if made.needs_training:
                    made.fit(others)
                found.append(diagnose(subject, chosen, made.edit(chosen, progress=True)))
            mean = pd.concat(found).drop(columns=["editor", "dataset", "case_id"]).mean()
            rows.append({"editor": editor, "values": values, "cases": sum(map(len, found)), **mean})
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    return table


def take_pmet_apart(subject: Subject, file: Path, cases: int) -> pd.DataFrame:
    """What PMET's two steps after learning cost: leaving the attention's vector out, and spreading the MLP's over layers.

    The vectors are learnt once without the KL term, with the attention's and without, and written at the last layer
    alone, at the last two, and so on, with two weights of the second moment. Written as CSV; columns as in
    :func:`diagnose`, means over cases.

    Args:
        cases: of CNLE's selection cases, the first so many.
    """
    chosen, _ = selection_cases("cnle", cases)
    rows = []
    for attention in (True, False):
        learnt = load_editor("pmet", subject, values="transferred", kl_factor=0.0, attention=attention)
        assert isinstance(learnt, MEMIT)
        with torch.enable_grad():
            wanted, logs = learnt.wanted(chosen)
        window = learnt.values.layers
        for first in reversed(range(len(window))):
            for weight in PARTS_WEIGHTS:
                writer = load_editor(
                    "pmet",
                    subject,
                    values="transferred",
                    kl_factor=0.0,
                    attention=attention,
                    layers=window[first:],
                    covariance_weight=weight,
                )
                assert isinstance(writer, MEMIT)
                edits = writer.write(chosen, wanted.detach(), logs)
                mean = diagnose(subject, chosen, edits)[
                    ["learnt", "nll_before", "nll_after", "first_after", "norm"]
                ].mean()
                layers = f"{window[first]}-{window[-1]}" if first < len(window) - 1 else str(window[-1])
                rows.append(
                    {"attention learnt": attention, "layers": layers, "weight": weight, "cases": len(chosen), **mean}
                )
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(3).to_csv(file, index=False)
    return table


@torch.no_grad()
def compare_statistics(subject: Subject, file: Path, cases: int) -> pd.DataFrame:
    """What MEMIT would write with so many tokens' statistics, and with four times as many; written as CSV.

    One row a layer for ten tokens per dimension of the key, and one for forty (the default). Columns: ``tokens``; ``cosine`` (smallest over the cases) between the two write directions ``a``; ``share`` and ``share_of_four`` (mean) of
    the residual that a write puts at its own key, ``k^T a``; ``difference`` (largest) between the two, relative.

    Args:
        cases: of each data set's selection cases, the first so many.
    """
    chosen = [case for dataset in DATASETS for case in selection_cases(dataset, cases)[0]]
    walk = Blockwise(subject, [encode(subject.tokenizer, case.prompt) for case in chosen])
    hidden, keys = walk.embedded, []
    for layer in range(len(subject.blocks)):
        here = walk.block(layer, hidden)
        hidden = here.hidden
        keys.append(here.keys[:, -1].float())
    rows = []
    for each in (LEAST_PER_DIMENSION, TOKENS_PER_DIMENSION):
        few, many = (load_editor("memit", subject, corpus_tokens=times * each * subject.inner_size) for times in (1, 4))
        assert isinstance(few, MEMIT) and isinstance(many, MEMIT)
        for layer, moment in few.moments.items():
            (one, share), (other, share_of_four) = (_direction(editor, layer, keys[layer]) for editor in (few, many))
            rows.append(
                {
                    "tokens": moment.header["tokens"],
                    "layer": layer,
                    "cases": len(chosen),
                    "cosine": torch.nn.functional.cosine_similarity(one, other).min().item(),
                    "share": share.mean().item(),
                    "share_of_four": share_of_four.mean().item(),
                    "difference": (share / share_of_four - 1).abs().max().item(),
                }
            )
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(file, index=False)
    return table


def _direction(editor: MEMIT, layer: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each key's write direction (B, d_f), and how much of a residual it writes at the key itself (B,)."""
    direction = editor.direction(layer, keys)
    return direction, (direction * keys).sum(dim=-1)


def _target_losses(subject: Subject, case: Case, edits: Sequence[Edit]) -> torch.Tensor:
    """Cross-entropy of each target token (T,)."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    ids = torch.tensor([tokens.inputs], device=subject.device)
    with subject.applying(edits, rows=[0 if edits else -1]):
        states = subject.decoder(input_ids=ids).last_hidden_state[0, tokens.lookup :]
    labels = torch.tensor(tokens.target_ids, device=subject.device)
    return torch.nn.functional.cross_entropy(subject.model.lm_head(states).float(), labels, reduction="none")


def _deltas(edit: LowRankUpdate | DenseUpdate, subject: Subject) -> dict[int, torch.Tensor]:
    if isinstance(edit, DenseUpdate):
        return {edit.layer: edit.delta.to(subject.device)}
    return {layer: edit.delta(layer).to(subject.device) for layer in edit.layers}


def _moved(subject: Subject, prompt: str, deltas: dict[int, torch.Tensor]) -> torch.Tensor:
    """``|dW_l k_l|`` at a prompt's last column, for each edited layer."""
    keys: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        return lambda _module, args, _output: keys.__setitem__(layer, args[0][0, -1].float())

    handles = [subject.down_proj(layer).register_forward_hook(keep(layer)) for layer in deltas]
    try:
        subject.decoder(input_ids=torch.tensor([encode(subject.tokenizer, prompt)], device=subject.device))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([(delta @ keys[layer]).norm() for layer, delta in deltas.items()])
