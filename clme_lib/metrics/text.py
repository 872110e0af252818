"""Exact match, BLEU, ROUGE-L and fluency of generated texts (paper section III-D).

All take parallel lists, because specificity pools the five neighbours of a case. Per-case exact match, BLEU and
ROUGE-L are rounded to three decimals before they are averaged, as in the released program.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

_DECIMALS = 3


@cache
def _bleu():
    from sacrebleu.metrics import BLEU

    # textbook BLEU-4: a text of fewer than four 13a tokens scores 0 even against itself
    return BLEU(tokenize="13a", smooth_method="none", effective_order=False, lowercase=False)


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def _pairs(generated: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(generated) != len(references) or not generated:
        raise ValueError(f"{len(generated)} generated texts, but {len(references)} references")
    return list(zip(generated, references))


def exact_match(generated: Sequence[str], references: Sequence[str]) -> float:
    """1 if every text equals its reference, else 0 (all or nothing over the list)."""
    return float(all(text == reference for text, reference in _pairs(generated, references)))


def exact_match_rate(generated: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that equal their reference."""
    return sum(text == reference for text, reference in _pairs(generated, references)) / len(generated)


def bleu(generated: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 over the list in [0, 1]: 13a tokens, case kept, no smoothing."""
    if not any(reference.strip() for _, reference in _pairs(generated, references)):
        return 0.0
    return round(_bleu().corpus_score(list(generated), [list(references)]).score / 100, _DECIMALS)


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure over the list in [0, 1]: no stemmer, lower-cased alphanumeric tokens.

    A target without letters or digits scores 0 even against itself.
    """
    pairs = _pairs(generated, references)
    scores = [_rouge().score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    return round(sum(scores) / len(scores), _DECIMALS)


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy in bits of the relative frequencies of a text's n-grams; 0 for fewer than n tokens."""
    counts = Counter(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0 if total else 0.0


def fluency(texts: Sequence[str]) -> float:
    """Generation entropy, mean over texts: ``(2/3 H_2 + 4/3 H_3) / 2`` on NLTK word tokens, in bits."""
    from nltk.tokenize import word_tokenize

    if not texts:
        raise ValueError("fluency needs at least one text")
    # preserve_line needs no punkt data; it differs at sentence-final stops only
    tokenized = [word_tokenize(text, preserve_line=True) for text in texts]
    entropies = [(2 / 3 * ngram_entropy(tokens, 2) + 4 / 3 * ngram_entropy(tokens, 3)) / 2 for tokens in tokenized]
    return sum(entropies) / len(texts)
