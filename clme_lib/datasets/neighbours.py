"""Nearest non-targeted inputs: the unrelated prompts of a case (paper section III-C: five a case).

Any embedder is a function from texts to a matrix of unit row vectors; the embedded one is TF-IDF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NEIGHBOURS = 5
Embedder = Callable[[Sequence[str]], Any]  # a dense array or a sparse matrix

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def subtokens(text: str) -> list[str]:
    """Words of a text with identifiers split: ``readFile_2`` gives read, file, 2."""
    return [word.lower() for word in _WORD.findall(text)]


def tfidf(texts: Sequence[str]):
    """Unit TF-IDF rows over split identifiers (sparse, one row a text)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=subtokens, sublinear_tf=True).fit_transform(texts)


def nearest(
    targets: Sequence[str],
    pool: Sequence[str],
    *,
    allowed: Callable[[int, int], bool],
    embed: Embedder = tfidf,
    ceiling: float = 0.97,
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
    from_other_groups: int = 0,
) -> list[list[int]]:
    """Indices into ``pool`` of each target's five nearest texts.

    Args:
        allowed: (target, pool entry) -> whether the pair may be neighbours at all.
        ceiling: pairs with a higher cosine are aliases of the target, not neighbours.
        groups: group (say, package) of each target and pool entry.
        from_other_groups: at least this many neighbours come from a group other than the target's.
    """
    vectors = embed([*targets, *pool])
    similarity = vectors[: len(targets)] @ vectors[len(targets) :].T
    similarity = similarity.toarray() if hasattr(similarity, "toarray") else np.asarray(similarity)
    chosen = []
    for target, row in enumerate(similarity):
        # rounding makes the order of (near) ties the pool's own, whatever the machine
        order = np.argsort(-np.round(row, 9), kind="stable")
        near = [int(n) for n in order if row[n] <= ceiling and allowed(target, int(n))]
        best = near[:NEIGHBOURS]
        if groups:
            own = groups[0][target]
            foreign = [n for n in near if groups[1][n] != own][:from_other_groups]
            missing = from_other_groups - sum(groups[1][n] != own for n in best)
            if missing > 0:
                keep = [n for n in best if groups[1][n] == own][: NEIGHBOURS - len(foreign)]
                best = sorted([*keep, *foreign], key=near.index)
        chosen.append(best)
    return chosen
