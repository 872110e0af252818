"""Nearest non-targeted inputs: the unrelated prompts of a case (paper section III-C: five a case).

Any embedder is a function from texts to a matrix of unit row vectors; the embedded one is TF-IDF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

NEIGHBOURS = 5
_SIMILARITIES = 2**25  # held at one time
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
    chosen = []
    for target, row in enumerate(_similarities(vectors, len(targets))):
        wanted = NEIGHBOURS
        while True:
            # most targets find theirs among the first few: the others are not sorted
            order = _largest(row, 40 * wanted)
            near = [int(n) for n in order if row[n] <= ceiling and allowed(target, int(n))]
            best = near[:NEIGHBOURS]
            foreign = [n for n in near if groups and groups[1][n] != groups[0][target]][:from_other_groups]
            if len(order) == len(row) or (len(best) == NEIGHBOURS and len(foreign) == from_other_groups * bool(groups)):
                break
            wanted *= 10
        if groups:
            own = groups[0][target]
            missing = from_other_groups - sum(groups[1][n] != own for n in best)
            if missing > 0:
                keep = [n for n in best if groups[1][n] == own][: NEIGHBOURS - len(foreign)]
                best = sorted([*keep, *foreign], key=near.index)
        chosen.append(best)
    return chosen


def _similarities(vectors: Any, targets: int) -> Iterator[np.ndarray]:
    """Cosines of each of the first ``targets`` rows with all others, a few targets at a time."""
    others = vectors[targets:].T
    at_once = max(1, _SIMILARITIES // max(1, others.shape[1]))
    for first in range(0, targets, at_once):
        part = vectors[first : min(first + at_once, targets)] @ others
        yield from part.toarray() if hasattr(part, "toarray") else np.asarray(part)


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest (more when some equal the last), largest first, ties in their own order."""
    # rounding makes the order of (near) ties the pool's own, whatever the machine
    rounded = np.round(row, 9)
    if count >= len(row):
        return np.argsort(-rounded, kind="stable")
    last = np.partition(rounded, len(row) - count)[len(row) - count]
    candidates = np.flatnonzero(rounded >= last)
    return candidates[np.argsort(-rounded[candidates], kind="stable")]
