"""What an update of weights does before any text is generated: to tell the method, the model and the code apart.

If the learnt loss is low but the target's loss under the edit is not, the writing lost it; if it is low everywhere but at the
target's first token, something holds that token back; if the update moves a neighbour's last column as far as the edit
prompt's own, specificity is lost whatever else is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ...datasets.cases import DATASETS, Case
from ...datasets.registry import selection_cases
from ...editors.pmet import PMET
from ...editors.registry import load_editor, registered_editors
from ...edits.base import Edit
from ...edits.weights import DenseUpdate, LowRankUpdate
from ...forward.tokens import encode, tokenize
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ..tables import Table, editor_name

_VALUES = {"transferred": "the paper's", "subject": "selected"}


def diagnosis_table(measured: pd.DataFrame) -> Table:
    """Losses, size and reach of updates.

    Args:
        measured: what ``clme diagnose`` writes (:func:`clme_lib.study.appendices.weight_updates.diagnose_editors`).
    """
    rows = [
        {
            "Editor": editor_name(row["editor"]),
            "Values": _VALUES[row["values"]],
            "n": str(row["cases"]),
            "Learnt": f"{row['learnt']:.2f}",
            "NLL": f"{row['nll_before']:.2f} → {row['nll_after']:.2f}",
            "First": f"{row['first_before']:.2f} → {row['first_after']:.2f}",
            "Norm": f"{row['norm']:.2f}",
            "Reach": f"{100 * row['reach']:.0f} %",
        }
        for _, row in measured.iterrows()
    ]
    return Table(pd.DataFrame(rows), "Updates on selection cases of smollm2-135m, means over cases.", "tab-diagnosis")


def pmet_table(measured: pd.DataFrame) -> Table:
    """PMET's steps taken apart.

    Args:
        measured: what ``clme pmet-parts`` writes (:func:`clme_lib.study.appendices.weight_updates.take_pmet_apart`).
    """
    rows = [
        {
            "Attention's vector": "learnt beside" if row["attention learnt"] else "none",
            "Written": f"block {row['layers']}" if row["layers"].isdigit() else f"blocks {row['layers']}",
            "Weight": f"{row['weight']:g}",
            "n": str(row["cases"]),
            "Learnt": f"{row['learnt']:.2f}",
            "NLL": f"{row['nll_before']:.2f} → {row['nll_after']:.2f}",
            "First after": f"{row['first_after']:.2f}",
            "Norm": f"{row['norm']:.2f}",
        }
        for _, row in measured.astype({"layers": str}).iterrows()
    ]
    caption = (
        "PMET's vectors learnt without the KL term, written at the last layers of its window; CNLE selection cases."
    )
    return Table(pd.DataFrame(rows), caption, "tab-pmet-parts")


# the subject's own weight, which writes about 60 % of a residual, and one that writes nearly all of it
PARTS_WEIGHTS = (2_093.0, 200.0)


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
        before, after = (_target_losses(subject, case, applied) for applied in ([], [edit]))
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
                "norm": frobenius(deltas.values()),
                "reach": torch.stack([moved / own for moved in others]).mean().item(),
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
    updating = [name for name, editor in registered_editors().items() if editor.updates_weights]
    if unknown := [editor for editor in editors if editor not in updating]:
        raise StudyError(f"{', '.join(unknown)}: no editor that updates weights; known: {', '.join(updating)}")
    rows = []
    for editor in editors:
        for values in ("transferred", "subject"):
            made = load_editor(editor, subject, values=values)
            diagnosed = []
            for dataset in DATASETS:
                chosen, others = selection_cases(dataset, cases)
                if made.needs_training:
                    made.fit(others)
                diagnosed.append(diagnose(subject, chosen, made.edit(chosen, progress=True)))
            mean = pd.concat(diagnosed).drop(columns=["editor", "dataset", "case_id"]).mean()
            rows.append({"editor": editor, "values": values, "cases": sum(map(len, diagnosed)), **mean})
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

    def pmet(**changes: Any) -> PMET:
        editor = load_editor("pmet", subject, values="transferred", kl_factor=0.0, **changes)
        assert isinstance(editor, PMET)
        return editor

    columns = ["learnt", "nll_before", "nll_after", "first_after", "norm"]
    rows = []
    for attention in (True, False):
        learner = pmet(attention=attention)
        with torch.enable_grad():
            target_states, logs = learner.target_states(chosen)
        window = learner.hparams.layers
        for first in reversed(range(len(window))):
            layers = f"{window[first]}-{window[-1]}" if first < len(window) - 1 else str(window[-1])
            for weight in PARTS_WEIGHTS:
                writer = pmet(attention=attention, layers=window[first:], covariance_weight=weight)
                mean = diagnose(subject, chosen, writer.write(chosen, target_states.detach(), logs))[columns].mean()
                rows.append(
                    {"attention learnt": attention, "layers": layers, "weight": weight, "cases": len(chosen), **mean}
                )
    table = pd.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    table.round(3).to_csv(file, index=False)
    return table


def frobenius(matrices: Iterable[torch.Tensor]) -> float:
    """Frobenius norm of matrices taken together. Summed in float64: a float32 sum over a 7B layer is off by more than a percent."""
    return sum(torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2 for matrix in matrices) ** 0.5


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
