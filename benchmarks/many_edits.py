"""Many edits in one model: their cost against the same number of edits made alone, how fast a model with many edits writes, and how
UltraEdit's single pass compares with ROME's optimisation. Each row is a ratio within one process.

usage: python benchmarks/many_edits.py [--subject smollm2-135m] [--edits 100] [--cases 3] [--held 300] [--threads 1] [--out results/benchmarks/many_edits.csv]
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import clme_lib as clme
from clme_lib.edits.base import Edit
from clme_lib.edits.weights import LowRankUpdate
from clme_lib.evaluation.generation import Request, generate

ROUNDS = 3


def seconds(act) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def ratio(what: str, ours: list[float], beside: list[float], count: int, limit: float) -> dict:
    times = statistics.median(ours), statistics.median(beside)
    return {
        "what": what,
        "n": count,
        "seconds": times[0],
        "beside": times[1],
        "ratio": times[0] / times[1],
        "asked": limit,
    }


def sequence_against_alone(subject, cases) -> dict:
    """MEMIT's edits one after another against edits made alone, in seconds for all; its statistics are random, because they do not
    affect an edit's cost. Both edits of a case are timed in turn, so that what slows the machine down for a while slows both."""
    editor = clme.load_editor("memit", subject, accumulate=True)
    editor.stand_in(cases)
    editor.setup()
    editor.edit(cases[:1])

    held, whole = editor, None

    def next_edit(case) -> None:
        nonlocal held, whole
        edits = held.edit([case])
        whole = Edit.compose([whole, *edits] if whole else edits)
        held = editor.of(subject.edited(whole))

    acts = {"sequence": next_edit, "alone": lambda case: editor.edit([case])}
    totals = dict.fromkeys(acts, 0.0)
    for n, case in enumerate(cases):
        for name in sorted(acts, reverse=bool(n % 2)):
            totals[name] += seconds(lambda name=name, case=case: acts[name](case))
    times = ([totals[name]] for name in ("sequence", "alone"))
    return ratio("MEMIT, one after another / alone", *times, count=len(cases), limit=1.3)


def writing_with(subject, cases, held: int) -> dict:
    """Greedy texts of a model with many rank-one updates in five layers, against the unedited model."""
    draw = torch.Generator().manual_seed(0)
    d, d_f = subject.hidden_size, subject.inner_size
    scale = 1e-4  # so small that the texts, and their lengths, do not change

    def drawn(case_id: int) -> LowRankUpdate:
        pairs = {
            layer: (scale * torch.randn(d, 1, generator=draw), torch.randn(1, d_f, generator=draw) / d_f)
            for layer in range(4, 9)
        }
        return LowRankUpdate(case_id, "memit", factors=pairs)

    whole = Edit.compose([drawn(n) for n in range(held)])
    requests = [Request(prompt, 32) for case in cases for prompt in (case.prompt, *case.unrelated)]
    edited = [replace(request, edit=0) for request in requests]
    generate(subject, requests[:2])
    both = [
        (seconds(lambda: generate(subject, edited, [whole])), seconds(lambda: generate(subject, requests)))
        for _ in range(ROUNDS)
    ]
    return ratio(f"writing with {held} edits / unedited", *map(list, zip(*both)), count=len(requests), limit=1.5)


def ultraedit_against_rome(subject, cases, others) -> dict:
    ultraedit, rome = clme.load_editor("ultraedit", subject, records=16), clme.load_editor("rome", subject)
    ultraedit.fit(others)
    ultraedit.edit(cases[:1])
    rome.edit(cases[:1])
    both = [
        (seconds(lambda case=case: ultraedit.edit([case])), seconds(lambda case=case: rome.edit([case])))
        for case in cases
    ]
    return ratio("UltraEdit / ROME", *map(list, zip(*both)), count=len(cases), limit=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--held", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject, everything = clme.load_subject(options.subject), clme.load_cases("cnle")
    cases = clme.sample_cases(everything, options.cases, seed=0)
    others = [case for case in everything if case not in cases]
    rows = [
        sequence_against_alone(subject, clme.sample_cases(everything, options.edits, seed=0)),
        writing_with(subject, cases, options.held),
        ultraedit_against_rome(subject, cases, others),
    ]
    table = pd.DataFrame(rows).round({"seconds": 3, "beside": 3, "ratio": 3})
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
