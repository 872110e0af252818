"""Nearest non-targeted inputs: the unrelated prompts of a case (paper section III-C: five per case).

Any embedder is a function from texts to a matrix of row vectors; the embedded one is TF-IDF. scikit-learn's index computes the exact cosines
in parts and keeps each target's best, so that the whole matrix is never in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NEIGHBOURS = 5
TOO_CLOSE = 0.97  # cosine above which a text says the same in other spelling
_FOREIGN = 2  # neighbours from other groups
_FIRST_ASKED = 200  # entries requested from the index for a target at first
_HELD = 2**24  # similarities in memory at one time
_PART_MIB = 128  # size of a part of the similarities, of which only the best are kept
Embedder = Callable[[Sequence[str]], Any]  # a dense array or a sparse matrix

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")  # the last alternative is for other scripts


def subtokens(text: str) -> list[str]:
    """Words of a text with identifiers split: ``readFile_2`` gives read, file, 2."""
    return [word.lower() for word in _WORD.findall(text)]


def tfidf(texts: Sequence[str]):
    """Unit TF-IDF rows over split identifiers (sparse, one row per text); the row of a text without words is zero."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(map(subtokens, texts)):
        return csr_matrix((len(texts), 1))
    return TfidfVectorizer(analyzer=subtokens, sublinear_tf=True).fit_transform(texts)


def nearest(
    targets: Sequence[str],
    pool: Sequence[str],
    *,
    allowed: Callable[[int, int], bool],
    embed: Embedder = tfidf,
    ceiling: float = TOO_CLOSE,
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
) -> list[list[int]]:
    """Indices into ``pool`` of each target's five nearest texts.

    Args:
        allowed: (target, pool entry) -> whether the pair may be neighbours at all.
        ceiling: entries with a higher cosine are taken for repetitions of the target, not for neighbours.
        groups: group (say, package) of each target and pool entry; at least two neighbours come from a group other than the target's.
    """
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    chosen: list[list[int]] = [[] for _ in targets]
    if not pool:
        return chosen
    vectors = embed([*targets, *pool])
    index = NearestNeighbors(algorithm="brute", metric="cosine").fit(vectors[len(targets) :])
    needed_foreign = _FOREIGN if groups else 0
    # the first few entries suffice for most targets; the rest request more
    unsettled, asked = list(range(len(targets))), min(_FIRST_ASKED, len(pool))
    while unsettled:
        open_ends = []
        at_once = max(1, _HELD // asked)
        for first in range(0, len(unsettled), at_once):
            part = unsettled[first : first + at_once]
            with config_context(working_memory=_PART_MIB):
                answers = index.kneighbors(vectors[part], asked)
            for target, distances, entries in zip(part, *answers):
                order = _settled(distances, entries, everything=asked == len(pool))
                near = [n for n, cosine in order if cosine <= ceiling and allowed(target, n)]
                foreign = [n for n in near if groups and groups[1][n] != groups[0][target]][:needed_foreign]
                if asked < len(pool) and (len(near) < NEIGHBOURS or len(foreign) < needed_foreign):
                    open_ends.append(target)
                    continue
                nearest_rest = [n for n in near if n not in foreign][: NEIGHBOURS - len(foreign)]
                chosen[target] = sorted([*foreign, *nearest_rest], key=near.index)
        unsettled, asked = open_ends, min(10 * asked, len(pool))
    return chosen


def _settled(distances: np.ndarray, entries: np.ndarray, everything: bool) -> list[tuple[int, float]]:
    """(pool entry, cosine) of the returned entries, nearest first, up to where the order depends on entries not returned.

    Rounding gives (near) ties the order of the pool on every machine; some entries that tie with the last may be missing.
    """
    cosines = np.round(1 - distances, 9)
    order = np.lexsort((entries, -cosines))
    last = -np.inf if everything else cosines.min()
    return [(int(entries[n]), float(cosines[n])) for n in order if cosines[n] > last]
