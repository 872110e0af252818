"""Where the time of a batch of whole cases goes, beside its floor: products with matrices, attention, and everything else.

Seconds are medians of three runs without the profiler; the profiler, in another run, says which share of the time each kind of operation takes.
*Floor / products* is the share of the floor that would be reached if everything but the products cost nothing.

usage: python benchmarks/whole_case_parts.py [--subject smollm2-135m] [--cases 16] [--editors ft-l,grace] [--threads 2] [--out FILE.csv]
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.evaluation.evaluate import Circumstances, requests_of, write
from clme_lib.evaluation.loading import load_subject
from clme_lib.evaluation.unedited import answers_for
from clme_lib.study.provenance import processor
from clme_lib.study.rq2.floor import measure_ceilings
from clme_lib.study.rq2.measure import phases_of_edits, phases_of_evaluation, ready

ROUNDS = 3
PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product"


def shares(act):
    """The shares of products and of attention in the time of all operations on the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        act()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole = sum(times.values())
    products = sum(times.get(name, 0.0) for name in PRODUCTS)
    return products / whole, sum(spent for name, spent in times.items() if name.startswith(ATTENTION)) / whole


def seconds(act):
    """The median of a few rounds."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        act()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="smollm2-135m")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--editors", default="ft-l,grace")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = load_subject(options.subject, "cpu")
    cases = sample_cases(load_cases("cnle"), options.cases, 42)
    answers_for(subject, [prompt for case in cases for prompt in case.unrelated])
    rows = []
    for name in options.editors.split(","):
        editor = ready(subject, name, cases, random_weights=False)
        edits = editor.edit(cases, batch_size=len(cases))  # warm-up
        requests = requests_of(subject, cases, edits, Circumstances(name, metrics=None))
        texts = write(subject, requests, edits)  # texts that no edit changes are written once and kept
        ceilings = measure_ceilings(subject)
        parts = {
            "editing": (
                partial(editor.edit, cases, batch_size=len(cases)),
                phases_of_edits(editor, cases, edits),
            ),
            "evaluating": (
                partial(write, subject, requests, edits),
                phases_of_evaluation(subject, requests, texts, edits),
            ),
        }
        for part, (act, phases) in parts.items():
            taken, floor = seconds(act), ceilings.seconds(phases)
            of_products, of_attention = shares(act)
            row = {
                "editor": name,
                "part": part,
                "cases": len(cases),
                "s/case": taken / len(cases),
                "products": of_products,
                "attention": of_attention,
                "other": 1 - of_products - of_attention,
                "floor s/case": floor / len(cases),
                "floor / time": floor / taken,
                "floor / products": floor / (taken * of_products),
            }
            rows.append({**row, "device": processor(), "threads": options.threads})
            print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(3).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
