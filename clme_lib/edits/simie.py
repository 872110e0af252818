"""SimIE: single edits, each made on the unedited model, joined into a sequence (released with EasyEdit, 2025; not in the paper).

With ``k_t`` the key of edit t at a layer and ``D_t`` its update there, starting from ``M = m I`` and ``W = 0``::

    M <- M + k_t k_t^T
    W <- W + (D_t - W) k_t k_t^T M^-1

So each edit adds what its key still lacks, along directions that earlier keys have not used. ``M^-1`` follows from the keys alone
(Woodbury), so no inverted matrix is larger than the number of edits; the sum has one pair of factors per edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..support.errors import StudyError
from .base import Edit
from .weights import LowRankUpdate

INITIAL = 1e4  # the authors' value of m


def simie(
    edits: Sequence[Edit], keys: Callable[[int], torch.Tensor], initial: float = INITIAL, relative: bool = False
) -> Edit:
    """One edit from a sequence of ``edits`` (at least one) that were all made on the same model.

    Args:
        keys: by layer, every edit's key there (N, d_f).
        initial: m, or with ``relative`` its ratio to the squared norm of the first edit's key. The first edit keeps
            ``k^T k / (m + k^T k)`` of what it adds at its own key.

    Raises:
        StudyError: an edit does not update weights.
    """
    deltas = [edit.deltas() for edit in edits]
    if strange := next((edit for edit, of_edit in zip(edits, deltas) if of_edit is None), None):
        raise StudyError(f"SimIE joins updates of weights, but the edits of {strange.editor} do not update weights")
    factors = {}
    for layer in sorted({layer for of_edit in deltas for layer in of_edit or ()}):
        written = [n for n, of_edit in enumerate(deltas) if layer in (of_edit or ())]
        of_layer = keys(layer)[written].double()
        m = initial * float(of_layer[0] @ of_layer[0]) if relative else initial
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        for key, n, count in zip(of_layer, written, range(1, len(written) + 1)):
            needed = (deltas[n] or {})[layer].to(key.device).double() @ key
            held = sum((left * (right @ key) for left, right in zip(lefts, rights)), torch.zeros_like(needed))
            # (m I + S^T S)^-1 k, S the keys seen so far, this one included
            seen = of_layer[:count]
            system = seen @ seen.T
            system.diagonal().add_(m)
            rights.append((key - seen.T @ torch.linalg.solve(system, seen @ key)) / m)
            lefts.append(needed - held)
        factors[layer] = torch.stack(lefts, dim=1).float(), torch.stack(rights).float()
    last = edits[-1]
    return LowRankUpdate(last.case_id, last.editor, factors=factors, log=last.log)
