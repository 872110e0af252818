"""How long the commands in README and on the page *Reproducing* take, one after another in a fresh clone with an empty cache.

usage: python benchmarks/commands.py [--only "make setup,make test,rq1"] [--out results/benchmarks/commands.csv]

The last commit is cloned. Commands that fail are named at the end and left out of the table.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
# RQ3 is left out: it trains an encoder for each margin of its sweep
STEPS = "make setup,make test,make test-all,make lint,make book,.venv/bin/python -m pytest -m browser,rq1,rq2,rq4"


def papermill_commands() -> dict[str, str]:
    """The page's first command for each research question's notebook, by research question."""
    page = (ROOT / "book" / "reproducing.md").read_text(encoding="utf-8").replace("\\\n", " ")
    listed: dict[str, str] = {}
    for line in re.findall(r"^ {4}(papermill notebooks/\w+\.ipynb .*)$", page, re.M):
        listed.setdefault(re.search(r"notebooks/([a-z0-9]+)_", line)[1], " ".join(line.split()))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=STEPS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what the commands print")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="clme-commands-") as folder, open(options.log, "a") as log:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        version = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
        ).stdout.strip()
        environment = os.environ | {
            "CLME_CACHE": str(Path(folder) / "cache"),
            "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        for name in ("PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV"):
            environment.pop(name, None)
        for step in options.only.split(","):
            command = papermill_commands().get(step, step)
            began = time.monotonic()
            done = subprocess.run(shlex.split(command), cwd=clone, env=environment, stdout=log, stderr=log)
            minutes = (time.monotonic() - began) / 60
            if done.returncode:
                failed.append(f"{command} (status {done.returncode}, after {minutes:.1f} minutes)")
                print(failed[-1], flush=True)
                continue
            rows.append(
                {
                    "command": f"`{command}`",
                    "minutes": f"{minutes:.1f}",
                    "CPU cores": str(os.cpu_count()),
                    "version": version,
                }
            )
            print(rows[-1], flush=True)
            if options.out:
                pd.DataFrame(rows).to_csv(options.out, index=False)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
        ).stdout
        if changed:
            failed.append(f"the tree is not clean:\n{changed}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
