"""The products with a model's matrices: PyTorch's default library on a CPU (MKL) against oneDNN (clme_lib/subjects/products.py).

Both are timed in turn on the same inputs: single products at the shapes of an edit, then editing and evaluating whole cases.

usage: python benchmarks/products.py [--subject smollm2-135m] [--cases 8] [--editors grace,ft-l] [--threads 2] [--out FILE.csv]
"""

import argparse
import os
import time
from pathlib import Path

import pandas as pd
import torch

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.evaluation.evaluate import Circumstances, requests_of, write
from clme_lib.evaluation.loading import load_subject
from clme_lib.evaluation.unedited import answers_for
from clme_lib.study.provenance import processor
from clme_lib.study.rq2.measure import ready
from clme_lib.subjects import products

ROWS = 32, 256, 1_024  # texts that are written together; columns of a batch of prompts
REPETITIONS = 50


def with_mkl(model):
    for module in model.modules():
        if isinstance(module, products.OneDnnLinear):
            module.__class__ = torch.nn.Linear
    products.is_faster_with_onednn = lambda: False


def with_onednn(model):
    products.use_onednn(model)
    products.is_faster_with_onednn = lambda: True


WAYS = {"MKL s": with_mkl, "oneDNN s": with_onednn}


def of_products(subject, rows):
    """Seconds of a pass through the linear layers of all blocks, and the largest relative difference of an output."""
    layers = [module for module in subject.blocks.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {width: torch.randn(rows, width) for width in {layer.in_features for layer in layers}}
    best, outputs = dict.fromkeys(WAYS, float("inf")), {}
    with torch.no_grad():
        for turn in range(REPETITIONS):
            for way, choose in WAYS.items():
                choose(subject.model)
                started = time.perf_counter()
                outputs[way] = [layer(inputs[layer.in_features]) for layer in layers]
                if turn:  # the first is a warm-up
                    best[way] = min(best[way], time.perf_counter() - started)
    pairs = zip(*outputs.values())
    return best, max(((left - right).norm() / left.norm()).item() for left, right in pairs)


def of_cases(subject, name, cases):
    """Seconds per case of editing and evaluating, and how many of the texts are equal."""
    editor = ready(subject, name, cases, random_weights=False)
    answers_for(subject, [prompt for case in cases for prompt in case.unrelated])
    times, texts = {}, {}
    for way, choose in WAYS.items():
        choose(subject.model)
        editor.edit(cases[:1], batch_size=1)  # warm-up
        started = time.perf_counter()
        edits = editor.edit(cases, batch_size=len(cases))
        edited = time.perf_counter()
        requests = requests_of(subject, cases, edits, Circumstances(name, metrics=None))
        write(subject, requests, edits)  # texts that no edit changes are written once and kept
        writing = time.perf_counter()
        texts[way] = [text.ids for text in write(subject, requests, edits)]
        times[way] = edited - started, time.perf_counter() - writing
    return times, texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="smollm2-135m")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--editors", default="grace,ft-l")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = load_subject(options.subject, "cpu")
    cases = sample_cases(load_cases("cnle"), options.cases, 1)
    machine = {"device": processor(), "threads": options.threads}
    rows = []
    for count in ROWS:
        seconds, apart = of_products(subject, count)
        rows.append({"what": f"linear layers of all blocks, {count:,} rows", **seconds, "the same": f"to {apart:.0e}"})
    for name in options.editors.split(","):
        times, texts = of_cases(subject, name, cases)
        same = sum(left == right for left, right in zip(*texts.values()))
        for part, what in enumerate(("editing", "evaluating")):
            per_case = {way: seconds[part] / len(cases) for way, seconds in times.items()}
            rows.append(
                {
                    "what": f"{what} a case, {name}, {len(cases)} at once",
                    **per_case,
                    "the same": f"{same} of {len(texts['MKL s'])} texts",
                }
            )
    for row in rows:
        row["ratio"] = round(row["MKL s"] / row["oneDNN s"], 2)
        row.update({way: float(f"{row[way]:.3g}") for way in WAYS}, **machine)
        print(", ".join(f"{column} {value}" for column, value in row.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows)[["what", *WAYS, "ratio", "the same", *machine]].to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
