"""Seconds per step of MALMEN's training: in the first epoch, which computes everything below the edited layers, and later, when this is kept.

A few random records are trained on for two epochs. The last columns extrapolate to a network with the subject's own number of steps and
records: each record is computed once, in the first epoch, and kept for all later steps.

usage: python benchmarks/malmen_training.py [--data cnle,csne] [--records 24] [--threads 2] [--out FILE.csv]
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

import clme_lib as clme
from clme_lib.editors.malmen.training import Training
from clme_lib.evaluation.unedited import answers_for
from clme_lib.study import provenance


def measure(subject, dataset, records):
    values = clme.load_editor("malmen", subject).hparams
    cases = clme.sample_cases(clme.load_cases(dataset), records, seed=0)
    training = Training(subject, values, cases, seed=0)
    prompts = [prompt for case in cases for prompt in case.unrelated]
    training.answers = dict(zip(prompts, answers_for(subject, prompts)))
    epochs = []
    for _ in range(2):
        seconds = []
        for first in range(0, records, values.batch):
            started = time.perf_counter()
            training.step(cases[first : first + values.batch])
            seconds.append(time.perf_counter() - started)
        epochs.append(statistics.median(seconds))
    first, kept = epochs
    filling = (values.records or len(clme.load_cases(dataset)) // 2) // values.batch
    return {
        "data": dataset,
        "records": records,
        "s per step, first epoch": round(first, 2),
        "s per step, kept": round(kept, 2),
        "minutes for all steps once kept": round(values.iterations * kept / 60, 1),
        "minutes with the first epoch": round((filling * first + (values.iterations - filling) * kept) / 60, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cnle,csne")
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.records < 1:
        parser.error("--records: at least one")
    torch.set_num_threads(options.threads)
    subject = clme.load_subject("smollm2-135m")
    machine = {"device": provenance.hardware(subject)["name"], "threads": options.threads}
    rows = []
    for dataset in options.data.split(","):
        rows.append(measure(subject, dataset, options.records) | machine)
        print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
