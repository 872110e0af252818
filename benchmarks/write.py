"""One layer's write in MEMIT or PMET: the dense solve of the textbook formula against a solve with a factor that is computed once.

Both compute ``(weight * C + k k^T)^-1 k`` in double precision for one key after another, on the same second moment.

usage: python benchmarks/write.py [--device cpu|cuda] [--width 1536] [--keys 20] [--threads 2] [--out FILE.csv]
"""

import argparse
import os
import time
from pathlib import Path

import pandas as pd
import torch

from clme_lib.editors.locate_then_edit.second_moments import SecondMoment
from clme_lib.study.provenance import processor

WEIGHT = 15_000.0


def seconds(device, act):
    act()  # warm-up: computes the factor and loads libraries
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = torch.Generator(options.device).manual_seed(0)
    samples = torch.randn(10 * options.width, options.width, device=options.device, generator=draw)
    moment = SecondMoment(
        samples.T @ samples / len(samples), {"layer": 0, "tokens": len(samples), "corpus": "random"}, samples.device
    )
    keys = torch.randn(options.keys, options.width, device=options.device, generator=draw)

    def dense():
        written = []
        for key in keys.double():
            written.append(
                torch.linalg.solve(WEIGHT * moment.matrix.to(moment.device).double() + torch.outer(key, key), key)
            )
        return torch.stack(written)

    def factored():
        written = []
        for key in keys:
            scaled = moment.solve(key[None])[0] / WEIGHT
            written.append(scaled / (1 + key.double() @ scaled))
        return torch.stack(written)

    slow, expected = seconds(options.device, dense)
    fast, solved = seconds(options.device, factored)
    apart = ((solved - expected).norm() / expected.norm()).item()
    row = {
        "width": options.width,
        "keys": options.keys,
        "dense s/key": round(slow / options.keys, 4),
        "factored s/key": float(f"{fast / options.keys:.2g}"),
        "ratio": round(slow / fast),
        "relative difference": f"{apart:.0e}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "threads": options.threads,
    }
    print(", ".join(f"{column} {value}" for column, value in row.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
