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
    keys_of: dict[int, torch.Tensor] = {}
    needed_of: dict[int, dict[int, torch.Tensor]] = {}  # by layer and edit, what the edit adds at its own key
    for n, edit in enumerate(edits):
        if (deltas := edit.deltas()) is None:
            raise StudyError(f"SimIE joins updates of weights, but the edits of {edit.editor} do not update weights")
        for layer, delta in deltas.items():
            if layer not in keys_of:
                keys_of[layer] = keys(layer).double()
            needed_of.setdefault(layer, {})[n] = delta.to(keys_of[layer].device).double() @ keys_of[layer][n]
    factors = {}
    for layer, needed_by in sorted(needed_of.items()):
        of_layer = keys_of[layer][list(needed_by)]
        m = initial * float(of_layer[0] @ of_layer[0]) if relative else initial
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        for count, (key, needed) in enumerate(zip(of_layer, needed_by.values()), 1):
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
