"""Measures against hand computation and, for BLEU, sacrebleu's own defaults switched by hand."""

import math
import random

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from clme_lib.datasets.cases import Case
from clme_lib.datasets.paper import CNLE
from clme_lib.metrics.base import Evaluated, scores_of
from clme_lib.metrics.paper import PAPER_METRICS
from clme_lib.metrics.text import (
    bleu,
    exact_match,
    exact_match_rate,
    fluency,
    ngram_entropy,
    rouge_l,
)


def test_short_texts_score_zero_bleu_even_when_equal():
    assert bleu(["return x"], ["return x"]) == 0.0
    assert exact_match(["return x"], ["return x"]) == 1.0
    assert bleu(["a b c d"], ["a b c d"]) == 1.0


def test_bleu_by_hand():
    # candidate a b c d e, reference a b c d f: p = 4/5, 3/4, 2/3, 1/2; no brevity penalty
    assert bleu(["a b c d e"], ["a b c d f"]) == round((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, 3)
    # a candidate of 4 tokens against a reference of 5: all precisions 1, penalty exp(1 - 5/4)
    assert bleu(["a b c d"], ["a b c d e"]) == round(math.exp(1 - 5 / 4), 3)


def test_bleu_equals_sacrebleu_on_random_strings():
    draw = random.Random(0)
    alphabet = ["x", "y.sort()", "foo(a, b)", "=", "1.5", "&lt;", "def", "-", "\n", "[i]", "'s'"]
    for _ in range(500):
        pairs = [
            [" ".join(draw.choices(alphabet, k=draw.randint(0, 12))) for _ in range(2)]
            for _ in range(draw.choice([1, 5]))
        ]
        ours = bleu([a for a, _ in pairs], [b for _, b in pairs])
        if any(b.strip() for _, b in pairs):
            theirs = sacrebleu.corpus_bleu(
                [a for a, _ in pairs],
                [[b for _, b in pairs]],
                smooth_method="none",
                use_effective_order=False,
                tokenize="13a",
            )
            assert ours == round(theirs.score / 100, 3)


def test_rouge_by_hand():
    # longest common subsequence "a c d" of 4 and 5 tokens: P = 3/4, R = 3/5, F = 2/3
    assert rouge_l(["a c d x"], ["a b c d e"]) == round(2 / 3, 3)
    assert rouge_l(["+"], ["+"]) == 0.0
    assert rouge_l(["A-B"], ["a b"]) == 1.0
    assert rouge_l(["a b", "x"], ["a b", "y"]) == 0.5


def test_specificity_is_all_or_nothing():
    same, one_off = ["p", "q", "r", "s", "t"], ["p", "q", "r", "s", "T"]
    assert exact_match(same, same) == 1.0
    assert exact_match(one_off, same) == 0.0
    assert exact_match_rate(one_off, same) == 0.8
    with pytest.raises(ValueError, match="4 generated texts, but 5 references"):
        exact_match(same[:4], same)


def test_target_scores_strip_the_generation_only():
    def scores(text, target):
        case = Case(0, CNLE.name, CNLE.prompt("sort"), target, (), ())
        texts = {"effectiveness": [text], "generalization": [], "specificity": [], "fluency": [text]}
        return scores_of(Evaluated(case, texts, ()), PAPER_METRICS)

    assert scores(" xs.sort()\n", "xs.sort()")["effectiveness_em"] == 1.0
    assert scores("xs.sort()", " xs.sort()")["effectiveness_em"] == 0.0
    nothing = scores("  \n", "xs.sort()")
    assert [nothing[f"effectiveness_{name}"] for name in ("em", "bleu", "rouge_l")] == [0.0, 0.0, 0.0]
    assert list(nothing) == list(PAPER_METRICS) and nothing["generalization_em"] is nothing["specificity_rate"] is None


def test_entropy_by_hand():
    # bigrams of a b a b: ab ab ba -> 2/3, 1/3; trigrams: aba, bab -> 1 bit
    h2 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(["a", "b", "a", "b"], 2) == pytest.approx(h2)
    assert fluency(["a b a b"]) == pytest.approx((2 / 3 * h2 + 4 / 3 * 1) / 2)
    assert fluency([""]) == 0.0
    assert fluency(["a"]) == 0.0
    assert fluency(["a b a b", ""]) == pytest.approx(fluency(["a b a b"]) / 2)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 3))
def test_entropy_is_bounded(tokens, n):
    count = max(len(tokens) - n + 1, 0)
    assert 0 <= ngram_entropy(tokens, n) <= math.log2(max(count, 1)) + 1e-9
