"""What a run survives: kills at random moments, and the bad inputs of the tests.

usage: python benchmarks/faults.py [--kills 20] [--out results/benchmarks/faults.csv]

Each kill hits a run of a tiny subject (15 cases, one per batch), which the next start resumes; after at most five kills the run is left to
finish and compared with an undisturbed run. ``kills`` is the number for each signal.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import conftest  # noqa: E402
import interrupted  # noqa: E402
from tqdm import tqdm  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
KILLS_OF_A_RUN = 5


def killed(sent: signal.Signals, kills: int, source: Path, undisturbed: dict, seconds: float) -> dict:
    """How many kills hit a running run, and how many of its final records were lost, doubled or different."""
    counts = {"What": sent.name, "Tried": 0, "Lost": 0, "Doubled or damaged": 0, "Other texts": 0}
    moments = random.Random(sent.name)
    with tqdm(total=kills, desc=sent.name, unit="kill") as bar:
        while counts["Tried"] < kills:
            with tempfile.TemporaryDirectory() as scratch:
                out, before = Path(scratch) / "run", set()
                for _ in range(KILLS_OF_A_RUN):
                    process = interrupted.start(source, out)
                    process.join(moments.uniform(0, 1) * seconds)
                    if not process.is_alive() or counts["Tried"] == kills:
                        break
                    interrupted.os.kill(process.pid, sent)
                    process.join()
                    counts["Tried"] += 1
                    bar.update()
                    recorded = interrupted.recorded(out)
                    counts["Lost"] += len(before - set(recorded))
                    counts["Doubled or damaged"] += len(recorded) - len(set(recorded))
                    before = set(recorded)
                process.join()
                interrupted.finished(interrupted.start(source, out))
                texts = interrupted.texts(out)
                counts["Lost"] += len(set(undisturbed) - set(texts))
                counts["Other texts"] += sum(texts[key] != undisturbed[key] for key in set(texts) & set(undisturbed))
    return counts


def answered() -> dict:
    """How many bad inputs the tests try; exits if any of them is not answered properly."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-k",
        "test_a_bad_input_is_answered",
        str(TESTS / "test_inputs.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    if done.returncode:
        sys.exit(done.stdout[-2_000:])
    return {"What": "bad inputs", "Tried": int(re.search(r"(\d+) passed", done.stdout)[1])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/faults.csv"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, out = conftest.write_source(Path(scratch)), Path(scratch) / "whole"
        before = time.monotonic()
        interrupted.finished(interrupted.start(source, out))
        seconds, undisturbed = time.monotonic() - before, interrupted.texts(out)
        rows = [killed(sent, arguments.kills, source, undisturbed, seconds) for sent in SIGNALS]
    table = pd.DataFrame([*rows, answered()]).astype({"Tried": int})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False, float_format="%.0f")
    print(table.to_string(index=False))
