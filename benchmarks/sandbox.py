"""The cost of running a snippet in the sandbox: all checks of embedded CNLE, with their targets and with three changes of each, one after another.

usage: python benchmarks/sandbox.py [--out results/benchmarks/sandbox.csv]

The first pass also starts the process and imports the setups' modules (NumPy, pandas, ...), as a batch's first check does for the others.
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tqdm import tqdm
from wrong_snippets import TARGETS, wrong_snippets

from clme_lib.datasets.embedded_cnle import read_rows
from clme_lib.support.sandbox import PASSES, Check, Sandbox


def measure(sandbox: Sandbox, what: str, pairs: list[tuple[Check, str]]) -> dict:
    """Seconds taken to run these snippets."""
    started = time.perf_counter()
    passed = sum(sandbox.run(check, snippet) == PASSES for check, snippet in tqdm(pairs, desc=what))
    seconds = time.perf_counter() - started
    return {"What": what, "Snippets": len(pairs), "Pass": passed, "ms each": round(1_000 * seconds / len(pairs), 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sandbox.csv"))
    arguments = parser.parse_args()
    checks = {row["case_id"]: Check(row["setup"], row["test"]) for row in read_rows("cnle-checks")}
    targets = [(check, TARGETS[case_id]["snippet"]) for case_id, check in checks.items()]
    changed = [(check, snippet) for case_id, check in checks.items() for snippet in wrong_snippets(case_id)[:3]]
    sandbox = Sandbox()
    rows = [
        measure(sandbox, "targets, from the start of the process", targets),
        measure(sandbox, "targets again", targets),
        measure(sandbox, "targets with a change", changed),
    ]
    sandbox.close()
    table = pd.DataFrame(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False)
    print(table.to_string(index=False))
