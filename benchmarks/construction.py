"""Dataset construction at scale: seconds and peak memory of the search for neighbours and of renaming, at growing synthetic sizes.

Texts are random words in Zipf's proportions, as long as intents and functions; vectors are random and as wide as Arctic-embed's; renaming uses
the mined functions, repeated. Each measurement runs in its own process, so that its peak memory is its own. The last column extrapolates to the
paper's size by the number of comparisons (neighbours) or of functions (renaming).

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

# kind -> (comparisons or functions at the paper's size, targets and pool of each measurement)
KINDS = {
    "neighbours, TF-IDF": (20_000 * 500_000, [(1_000, 25_000), (2_000, 100_000), (2_000, 500_000)]),
    "neighbours of functions, TF-IDF": (16_000 * 440_000, [(500, 25_000), (500, 100_000)]),
    "neighbours, 768 dimensions": (20_000 * 500_000, [(1_000, 25_000), (2_000, 100_000)]),
    "renaming": (16_000, [(500, 2_200), (2_000, 2_200), (2_000, 20_000)]),
}


def texts_of(count, words, draw):
    vocabulary = np.array(
        [f"w{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676 % 26)}" for n in range(15_000)]
    )
    words = np.minimum(draw.zipf(1.2, (count, words)) - 1, len(vocabulary) - 1)
    return [" ".join(row) for row in vocabulary[words]]


def neighbours(kind, targets, pool):
    from clme_lib.datasets.neighbours import nearest, tfidf

    words, embed = 80 if "functions" in kind else 10, dense if "dimensions" in kind else tfidf
    texts = texts_of(targets + pool, words, np.random.default_rng(0))
    started = time.perf_counter()
    near = nearest(texts[:targets], texts[targets:], allowed=lambda target, entry: True, embed=embed)
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
    seconds = renaming(*sizes) if kind == "renaming" else neighbours(kind, *sizes)
    answer.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for kind, sizes in ((kind, sizes) for kind, (_, measured) in KINDS.items() for sizes in measured):
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=measure, args=(kind, sizes, options.threads, answer))
        process.start()
        seconds, peak = answer.get()
        process.join()
        done = sizes[0] if kind == "renaming" else sizes[0] * sizes[1]
        rows.append({"what": kind, "targets": sizes[0], "pool": sizes[1], "seconds": round(seconds, 1), "peak MiB": round(peak),
                     "paper's size, hours": round(seconds * KINDS[kind][0] / done / 3600, 2)})  # fmt: skip
        print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
