"""Effects of a weight update before any text is generated, to separate effects of the method, the model and the implementation.

If the learnt loss is low but the target's loss under the edit is high, the writing step is at fault. If the loss is high only at the
target's first token, something favours another token there. If the update moves the output at a neighbour's last token as far as at
the edit prompt's, specificity is lost in any case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ...datasets.cases import Case
from ...datasets.paper import CNLE, PAPER_DATASET_NAMES
from ...datasets.registry import selection_cases
from ...editors.base import EDITORS
from ...editors.pmet import PMET
from ...editors.registry import load_editor
from ...edits.base import Edit
from ...forward.recording import recorded
from ...forward.tokens import encode, tokenize
from ...subjects.subject import Subject
from ...support.errors import StudyError
from ..tables import editor_name, table, write_csv

_LOSSES = ["learnt", "nll_before", "nll_after", "first_after", "norm"]
# of the tables that diagnose_editors and take_pmet_apart write: numbers, and other columns
COLUMNS = (["cases", *_LOSSES, "first_before", "reach"], ["editor", "values"])
PARTS_COLUMNS = (["weight", "cases", *_LOSSES], ["attention learnt", "layers"])


@table
def diagnosis_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Losses, norm and reach of updates, from the file that ``clme measure weight-updates`` writes (:func:`diagnose_editors`)."""
    for row in measured.itertuples():
        yield {
            "Editor": editor_name(row.editor),
            "Values": {"transferred": "the paper's", "subject": "selected"}[row.values],
            **_loss_cells(row),
            "First": f"{row.first_before:.2f} → {row.first_after:.2f}",
            "Norm": f"{row.norm:.2f}",
            "Reach": f"{100 * row.reach:.0f}%",
        }


@table
def pmet_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """PMET's steps taken apart, from the file that ``clme measure pmet-parts`` writes (:func:`take_pmet_apart`)."""
    for row in measured.rename(columns={"attention learnt": "attention"}).astype({"layers": str}).itertuples():
        yield {
            "Attention's vector": "learnt beside" if row.attention else "none",
            "Written": f"{'block' if row.layers.isdigit() else 'blocks'} {row.layers}",
            "Weight": f"{row.weight:g}",
            **_loss_cells(row),
            "First after": f"{row.first_after:.2f}",
            "Norm": f"{row.norm:.2f}",
        }


def _loss_cells(row: Any) -> dict[str, str]:
    return {"n": str(row.cases), "Learnt": f"{row.learnt:.2f}", "NLL": f"{row.nll_before:.2f} → {row.nll_after:.2f}"}


# the subject's own weight, which writes about 60% of a residual, and a smaller weight, which writes nearly all of it
PARTS_WEIGHTS = (2_093.0, 200.0)
DIAGNOSED = ("ft-l", "rome", "memit", "pmet")


@torch.no_grad()
def diagnose(subject: Subject, cases: Sequence[Case], edits: Sequence[Edit]) -> pd.DataFrame:
    """Diagnose edits, a row for each case.

    Columns: ``learnt`` (the loss when the editor stopped), ``nll_before`` and ``nll_after`` (the target's mean cross-entropy
    under the unedited and the edited subject, nats per token), ``first_before`` and ``first_after`` (the same for its first token
    alone), ``norm`` (Frobenius norm of the whole update), ``reach`` (how far the update moves the outputs at the neighbours'
    last tokens, relative to the edit prompt's last token; mean over neighbours and layers).

    Raises:
        StudyError: an edit does not update weights.
    """
    rows = []
    for case, edit in zip(cases, edits):
        if (updates := edit.deltas()) is None:
            raise StudyError(f"{edit.editor} does not update weights, so there is nothing to diagnose")
        before, after = (_target_losses(subject, case, applied) for applied in ([], [edit]))
        deltas = {layer: delta.to(subject.device) for layer, delta in updates.items()}
        own, *neighbours = (_moved(subject, prompt, deltas) for prompt in (case.prompt, *case.unrelated))
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
                "reach": torch.stack([neighbour / own for neighbour in neighbours]).mean().item(),
            }
        )
    return pd.DataFrame(rows)


def diagnose_editors(subject: Subject, file: Path, editors: Sequence[str] = DIAGNOSED, cases: int = 6) -> pd.DataFrame:
    """Mean diagnosis of each editor with the paper's values and with the subject's own, written as CSV.

    Args:
        cases: use this many of each dataset's selection cases, from the first.

    Raises:
        StudyError: an editor is unknown or does not update weights.
    """
    updating = [name for name in EDITORS if EDITORS[name].updates_weights]
    if unknown := [editor for editor in editors if editor not in updating]:
        raise StudyError(f"not editors that update weights: {', '.join(unknown)}; known: {', '.join(updating)}")
    rows = []
    for editor in editors:
        for values in ("transferred", "subject"):
            made = load_editor(editor, subject, values=values)
            diagnoses = []
            for dataset in PAPER_DATASET_NAMES:
                chosen, others = selection_cases(dataset, cases)
                if made.needs_training:
                    made.fit(others)
                diagnoses.append(diagnose(subject, chosen, made.edit(chosen, progress=True)))
            mean = pd.concat(diagnoses).drop(columns=["editor", "dataset", "case_id"]).mean()
            rows.append({"editor": editor, "values": values, "cases": sum(map(len, diagnoses)), **mean})
    return write_csv(pd.DataFrame(rows), file)


def take_pmet_apart(subject: Subject, file: Path, cases: int = 6) -> pd.DataFrame:
    """Measure what PMET loses in its two steps after learning: dropping the attention's vector, and spreading the MLP's vector over layers.

    The MLP's vector is learnt without the KL term, once with the attention's vector and once without it, and written at the
    last layer alone, at the last two, and so on, with two weights of the second moment. Written as CSV; columns as in
    :func:`diagnose`, means over cases.

    Args:
        cases: use this many of CNLE's selection cases, from the first.
    """
    chosen, _ = selection_cases(CNLE.name, cases)

    def pmet(**changes: Any) -> PMET:
        editor = load_editor("pmet", subject, values="transferred", kl_factor=0.0, **changes)
        assert isinstance(editor, PMET)
        return editor

    rows = []
    for attention in (True, False):
        learner = pmet(attention=attention)
        with torch.enable_grad():
            target_states, logs = learner.learn(chosen)
        window = learner.hparams.layers
        for first in reversed(range(len(window))):
            layers = f"{window[first]}-{window[-1]}" if first < len(window) - 1 else str(window[-1])
            for weight in PARTS_WEIGHTS:
                writer = pmet(attention=attention, layers=window[first:], covariance_weight=weight)
                edits = writer.write(chosen, target_states.detach(), logs)
                mean = diagnose(subject, chosen, edits)[_LOSSES].mean()
                written = {"attention learnt": attention, "layers": layers, "weight": weight, "cases": len(chosen)}
                rows.append({**written, **mean})
    return write_csv(pd.DataFrame(rows), file, digits=3)


def frobenius(matrices: Iterable[torch.Tensor]) -> float:
    """Frobenius norm of several matrices together, summed in float64: a float32 sum over a 7B layer is off by more than one percent."""
    return sum(torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2 for matrix in matrices) ** 0.5


def _target_losses(subject: Subject, case: Case, edits: Sequence[Edit]) -> torch.Tensor:
    """Cross-entropy of each target token (T,)."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    ids = torch.tensor([tokens.inputs], device=subject.device)
    with subject.applying(edits, rows=[0 if edits else -1]):
        states = subject.decoder(input_ids=ids).last_hidden_state[0, tokens.lookup :]
    labels = torch.tensor(tokens.target_ids, device=subject.device)
    return torch.nn.functional.cross_entropy(subject.model.lm_head(states).float(), labels, reduction="none")


def _moved(subject: Subject, prompt: str, deltas: dict[int, torch.Tensor]) -> torch.Tensor:
    """``|dW_l k_l|`` at a prompt's last token, for each edited layer."""
    ids = torch.tensor([encode(subject.tokenizer, prompt)], device=subject.device)
    with contextlib.ExitStack() as hooks:
        read = {layer: hooks.enter_context(recorded(subject.blocks[layer], "keys")) for layer in deltas}
        subject.decoder(input_ids=ids)
    return torch.stack([(delta @ read[layer]["keys"][0, -1].float()).norm() for layer, delta in deltas.items()])
