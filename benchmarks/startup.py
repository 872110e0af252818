"""How long the library and its command take to start: medians over processes, and whether each loads torch; and how long it takes to
compare the embedded subject with its model's own forward pass, which is done once for each version of the subject and the libraries.

usage: python benchmarks/startup.py [--runs 15] [--out results/benchmarks/startup.csv]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

STARTS = {
    "python": "pass",
    "import clme_lib": "import clme_lib",
    "clme --help": "from clme_lib.cli import main; main(['--help'])",
    "clme run --help": "from clme_lib.cli import main; main(['run', '--help'])",
}


def seconds(code: str) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - started


def loads_torch(code: str) -> bool:
    wrapped = f"import atexit, sys; atexit.register(lambda: print('torch loaded:', 'torch' in sys.modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True)
    assert "torch loaded:" in done.stdout, done.stderr
    return "torch loaded: True" in done.stdout


def seconds_of_comparison(runs: int) -> list[float]:
    from clme_lib.evaluation.loading import check_behaviour, load_subject

    subject = load_subject("smollm2-135m", "cpu")
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        check_behaviour(subject)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    medians = {name: statistics.median(seconds(code) for _ in range(options.runs)) for name, code in STARTS.items()}
    rows = [
        {"start": name, "runs": options.runs, "ms": round(1000 * median), "ms over python": round(1000 * (median - medians["python"])),
         "loads torch": "yes" if loads_torch(STARTS[name]) else "no"}
        for name, median in medians.items()
    ]  # fmt: skip
    comparison = statistics.median(seconds_of_comparison(options.runs))
    rows.append({"start": "comparison with the model's own pass", "runs": options.runs, "ms": round(1000 * comparison)})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, na_rep="-"))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
