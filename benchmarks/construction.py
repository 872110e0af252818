"""Construction at scale: seconds and peak memory of finding neighbours and of renaming, at growing synthetic sizes.

Texts are random words in Zipf's proportions, as many as intents and functions have; vectors are random and as wide as Arctic-embed's; renamed are
the mined functions, repeated. Each measurement runs in a process of its own, so that its peak is its own. The last column extrapolates to the paper's
size by the number of comparisons (neighbours) or of functions (renaming).

usage: python benchmarks/construction.py [--threads 2] [--out FILE.csv]
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

PAPER = {
    "neighbours, TF-IDF": 20_000 * 500_000,
    "neighbours of functions, TF-IDF": 16_000 * 440_000,
    "neighbours, 768 dimensions": 20_000 * 500_000,
    "renaming": 16_000,
}
WORDS = {"neighbours of functions, TF-IDF": 80}  # others: 10
SIZES = [("neighbours, TF-IDF", (1_000, 25_000)), ("neighbours, TF-IDF", (2_000, 100_000)), ("neighbours, TF-IDF", (2_000, 500_000)),
         ("neighbours of functions, TF-IDF", (500, 25_000)), ("neighbours of functions, TF-IDF", (500, 100_000)),
         ("neighbours, 768 dimensions", (1_000, 25_000)), ("neighbours, 768 dimensions", (2_000, 100_000)),
         ("renaming", (500, 2_200)), ("renaming", (2_000, 2_200)), ("renaming", (2_000, 20_000))]  # fmt: skip


def texts_of(count, words, draw):
    vocabulary = np.array(
        [f"w{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676 % 26)}" for n in range(15_000)]
    )
    words = np.minimum(draw.zipf(1.2, (count, words)) - 1, len(vocabulary) - 1)
    return [" ".join(row) for row in vocabulary[words]]


def neighbours(targets, pool, embed=None, words=10):
    from clme_lib.datasets.neighbours import nearest, tfidf

    texts = texts_of(targets + pool, words, np.random.default_rng(0))
    started = time.perf_counter()
    near = nearest(texts[:targets], texts[targets:], allowed=lambda target, entry: True, embed=embed or tfidf)
    assert len(near) == targets
    return time.perf_counter() - started


def dense(texts):
    vectors = np.random.default_rng(1).standard_normal((len(texts), 768), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def renaming(count, corpus):
    from clme_lib.datasets import embedded_csne
    from clme_lib.datasets.construction.rephrasing import corpus_names

    content = embedded_csne.load_content()
    codes, pool = ([row["code"] for row in content[part]] for part in ("targets", "pool"))
    rows = [{"id": n, "code": codes[n % len(codes)]} for n in range(count)]
    started = time.perf_counter()
    made = list(corpus_names([pool[n % len(pool)] for n in range(corpus)]).make(rows))
    assert len(made) == count
    return time.perf_counter() - started


def measure(kind, sizes, threads, answer):
    torch.set_num_threads(threads)
    if kind == "renaming":
        seconds = renaming(*sizes)
    else:
        seconds = neighbours(*sizes, dense if "dimensions" in kind else None, WORDS.get(kind, 10))
    answer.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for kind, sizes in SIZES:
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=measure, args=(kind, sizes, options.threads, answer))
        process.start()
        seconds, peak = answer.get()
        process.join()
        done = sizes[0] * sizes[1] if kind.startswith("neighbours") else sizes[0]
        rows.append(
            {
                "what": kind,
                "targets": sizes[0],
                "pool": sizes[1],
                "seconds": round(seconds, 1),
                "peak MiB": round(peak),
                "paper's size, hours": round(seconds * PAPER[kind] / done / 3600, 2),
            }
        )
        print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
