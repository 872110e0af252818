"""How well two offline scorers of relevance agree with labels: how much an intent helps to write its snippet, and the words they share.

``tests/data/relevance.jsonl`` has pairs that resemble mined pairs, written for this study, with a ``level`` from 1 to 5 and the level from a second
reading, made without seeing the first. Thresholds are quantiles from the first labels; each fifth of the pairs is judged by the thresholds
of the other four. Kappa has quadratic weights. The thresholds of all pairs, which the library uses, are also printed.

usage: python benchmarks/relevance.py [--out results/benchmarks/relevance.csv] [--source FILE]

Next to the output file, ``*.pairs.csv`` has each pair's values and levels, and ``*.levels.csv`` the levels of the embedded pairs. Given a file of CoNaLa's
annotated rows, ``*.source.csv`` has the levels of the first 500, which people wrote or corrected, and of the same snippets with the next row's intent.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from clme_lib.datasets import embedded_cnle
from clme_lib.datasets.construction import relevance
from clme_lib.datasets.construction.sources import collect_pairs
from clme_lib.datasets.construction.stages import kept
from clme_lib.datasets.neighbours import subtokens

PAIRS = Path(__file__).parent.parent / "tests" / "data" / "relevance.jsonl"
FOLDS = 5
LEVELS = range(1, len(relevance.LEVELS) + 1)


def shared_words(intent: str, snippet: str) -> float:
    """The share of the snippet's words that also occur in the intent."""
    words = {word for word in subtokens(snippet) if len(word) > 1}
    return len(words & set(subtokens(intent))) / len(words) if words else 0.0


def thresholds(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The thresholds that assign each level to as many pairs as are labelled with it."""
    shares = np.array([(levels <= level).mean() for level in LEVELS[:-1]])
    return np.quantile(values, shares)


def judged(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Each pair's level, by the thresholds of the other folds."""
    folds = np.arange(len(values)) % FOLDS
    given = np.empty(len(values), dtype=int)
    for fold in range(FOLDS):
        here = folds == fold
        cuts = thresholds(values[~here], levels[~here])
        given[here] = 1 + np.searchsorted(cuts, values[here], side="right")
    return given


def agreement(pairs: pd.DataFrame) -> pd.DataFrame:
    """For each judge: kappa, agreement, and the share of pairs judged very relevant that are labelled relevant or better."""
    levels = pairs["level"].to_numpy()
    judges = {
        "a second reading": pairs["second"].to_numpy(),
        "offline scorer": judged(pairs["help"].to_numpy(), levels),
        "words in common": judged(pairs["words"].to_numpy(), levels),
    }
    rows = []
    for judge, given in judges.items():
        rows.append(
            {
                "judge": judge,
                "pairs": len(pairs),
                "weighted kappa": round(cohen_kappa_score(levels, given, weights="quadratic"), 2),
                "same level": round((levels == given).mean(), 2),
                "labelled relevant or better, of those judged very relevant": round(
                    (levels[given == 5] >= 4).mean(), 2
                ),
            }
        )
    return pd.DataFrame(rows)


def levels_of_source(pairs: list[tuple[str, str]], losses: relevance.Losses) -> pd.DataFrame:
    """How often each scorer gives each level, to true pairs and to snippets with the next row's intent."""
    shifted = [(intent, snippet) for (intent, _), (_, snippet) in zip(pairs[1:] + pairs[:1], pairs)]
    rows = []
    for what, given in (("true", pairs), ("another row's intent", shifted)):
        scored = relevance.offline_scorer(losses).make(
            [{"id": n, "intent": i, "snippet": s} for n, (i, s) in enumerate(given)]
        )
        by_words = [relevance.LEVELS[min(4, int(10 * shared_words(*pair)))] for pair in given]
        for scorer, levels in (("offline scorer", [row["level"] for row in scored]), ("words in common", by_words)):
            rows.append(
                {
                    "pairs": what,
                    "scorer": scorer,
                    "n": len(given),
                    **{level: levels.count(level) for level in relevance.LEVELS},
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    from clme_lib.evaluation.likelihood import mean_losses
    from clme_lib.evaluation.loading import load_subject

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/relevance.csv"))
    parser.add_argument("--source", type=Path, default=None)
    options = parser.parse_args()
    subject = load_subject(relevance.SCORER, "cpu")

    def losses(texts):
        return mean_losses(subject, texts)

    rows = pd.DataFrame([json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()])
    rows["help"] = np.round(relevance.intents_help(list(zip(rows["intent"], rows["snippet"])), losses), 4)
    rows["words"] = [round(shared_words(*pair), 4) for pair in zip(rows["intent"], rows["snippet"])]
    pairs = rows[["id", "level", "second", "help", "words"]]
    pairs.to_csv(options.out.with_suffix(".pairs.csv"), index=False)
    agreement(pairs).to_csv(options.out, index=False)
    print(agreement(pairs).to_string(index=False))
    print("thresholds:", thresholds(pairs["help"].to_numpy(), pairs["level"].to_numpy()).round(2).tolist())

    embedded = [row for name in ("cnle-targets", "cnle-pool") for row in embedded_cnle.read_rows(name)]
    scored = relevance.offline_scorer(losses).make([{"id": n, **row} for n, row in enumerate(embedded)])
    counts = Counter(row["level"] for row in scored)
    levels = [(level, counts[level], counts[level] / len(embedded)) for level in relevance.LEVELS[::-1]]
    pd.DataFrame(levels, columns=["level", "pairs", "share"]).to_csv(
        options.out.with_suffix(".levels.csv"), index=False
    )
    if options.source:
        collected = [(row["intent"], row["snippet"]) for row in kept(collect_pairs(str(options.source)))][:500]
        table = levels_of_source(collected, losses)
        table.to_csv(options.out.with_suffix(".source.csv"), index=False)
        print(table.to_string(index=False))


if __name__ == "__main__":
    main()
