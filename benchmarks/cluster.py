"""A cluster's costs and its resistance to faults: random kills, the overhead of a worker, and how many workers one driver can serve.

faults: workers, nodes and drivers are killed at random while a run uses three nodes on this machine; its records must equal those of one process.
overhead: cases per second of one worker against a plain process, and of two workers with one thread each against one process with two.
scaling: the real driver and Ray, with workers that sleep for as long as edits of the published runs took; many workers share
a few processes, because one machine cannot hold a thousand.

study: hours of the whole study, computed from the measurements of scaling and RQ2.

usage: python benchmarks/cluster.py faults|overhead|scaling|study [--kills 50] [--workers 64,256,1024] [--out results/benchmarks/cluster_NAME.csv]
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PUBLISHED = ROOT / "results" / "runs" / "smollm2-135m-code"
SEED = 0
PATIENCE = 90  # seconds after which something is killed even if nothing was written


def workers_alive() -> list[int]:
    return list(map(int, subprocess.run(["pgrep", "-f", "ray::_Actor"], capture_output=True, text=True).stdout.split()))


def faults(kills: int) -> pd.DataFrame:
    """Kill something at random whenever new records have been written, ``kills`` times; then let the run finish."""
    from conftest import make_subject, write_source
    from ray.cluster_utils import Cluster

    from clme_lib.metrics.base import TEXTS
    from clme_lib.study import run_folder

    folder = Path(tempfile.mkdtemp(prefix="clme-cluster-"))
    os.environ["CLME_CACHE"] = str(folder / "cache")
    llama = make_subject("llama")
    llama.model.save_pretrained(folder / "tiny")
    llama.tokenizer.save_pretrained(folder / "tiny")
    source = write_source(folder, copies=40)
    settings = ["--subject", str(folder / "tiny"), "--dataset", "cnle", "--editor", "none,ft-l,grace", "--cases", "200", "--name", "x",
                "--source", str(source), "--batch-size", "2"]  # fmt: skip

    def command(out: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "clme_lib.cli", "run", *settings, "--out", str(folder / out), *more]

    subprocess.run(command("alone"), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    draw, killed = random.Random(SEED), {"worker": 0, "node": 0, "driver": 0}

    def drive() -> subprocess.Popen:
        return subprocess.Popen(command("run", "--on", "ray", "--ray-address", cluster.address), stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL)  # fmt: skip

    def lines() -> int:
        return sum(len(file.read_bytes().splitlines()) for file in (folder / "run").glob("records/*.jsonl"))

    driver, began, seen, patience = drive(), time.monotonic(), 0, time.monotonic() + PATIENCE
    while driver.poll() is None or driver.returncode:
        if driver.poll() is not None:
            driver = drive()
        time.sleep(draw.uniform(0.5, 3))
        # wait for new records, so that processes are killed at work and not while starting
        if lines() == seen and time.monotonic() < patience:
            continue
        seen, patience = lines(), time.monotonic() + PATIENCE
        what = draw.choices(["worker", "node", "driver"], [6, 2, 2])[0]
        if sum(killed.values()) >= kills or driver.poll() is not None:
            continue
        if what == "worker" and (alive := workers_alive()):
            os.kill(draw.choice(alive), signal.SIGKILL)
        elif what == "node":
            cluster.remove_node(nodes.pop(draw.randrange(len(nodes))), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
        else:
            what = "driver"
            driver.kill()
            driver.wait()
        killed[what] += 1
    seconds = time.monotonic() - began
    cluster.shutdown()
    runs = [
        run_folder.load_run(folder / name).set_index(["editor", "case_id"]).sort_index() for name in ("alone", "run")
    ]
    columns = ["state", *(f"sha256_{name}" for name in TEXTS)]
    alone, run = (records[columns].astype(str) for records in runs)
    doubled = lines() - len(run)
    differing = int((run.reindex(alone.index) != alone).any(axis=1).sum())
    rows = [{**{f"{name}s killed": count for name, count in killed.items()}, "records": len(run), "lost": len(alone.index.difference(run.index)),
             "doubled": doubled, "differing": differing, "seconds": round(seconds)}]  # fmt: skip
    shutil.rmtree(folder)
    return pd.DataFrame(rows)


def overhead(cases: int, turns: int) -> pd.DataFrame:
    """Cases per second between the first and the last batch, so that starting up does not count; the variants take turns."""
    variants = {
        "one process, one thread": (1, []),
        "one worker, one thread": (1, ["--on", "ray", "--workers", "1"]),
        "one process, two threads": (2, []),
        "two workers, one thread each": (1, ["--on", "ray", "--workers", "2"]),
    }
    batch, rates = 4, {name: [] for name in variants}
    for turn in range(turns):
        for name, (threads, options) in variants.items():
            folder = Path(tempfile.mkdtemp(prefix="clme-cluster-"))
            file = folder / "run" / "records" / "cnle.grace.jsonl"
            command = [sys.executable, "-m", "clme_lib.cli", "run", "--subject", "smollm2-135m-code", "--dataset", "cnle", "--editor", "grace",
                       "--set", "grace.steps=10", "--cases", str(cases), "--sample", str(turn), "--batch-size", str(batch), "--out",
                       str(folder / "run"), *options]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            log = (folder / "log").open("w")
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            times: dict[int, float] = {}
            while process.poll() is None:
                count = len(file.read_bytes().splitlines()) if file.is_file() else 0
                times.setdefault(count, time.monotonic())
                time.sleep(0.02)
            assert process.returncode == 0, (folder / "log").read_text()[-2000:]
            count = len(file.read_bytes().splitlines())
            times.setdefault(count, time.monotonic())
            counts = sorted(number for number in times if number)
            rates[name].append((counts[-1] - counts[0]) / (times[counts[-1]] - times[counts[0]]))
            shutil.rmtree(folder)
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    base = {name: means["one process, two threads" if "two" in name else "one process, one thread"] for name in means}
    return pd.DataFrame(
        {
            "variant": name,
            "cases": cases * turns,
            "cases per minute": round(60 * mean, 1),
            "time relative to the plain process": round(base[name] / mean, 2),
        }
        for name, mean in means.items()
    )


class Sleepers:
    """Many workers in one process: each call sleeps for as long as an edit took."""

    def __init__(self, seconds: list[float], row: dict, workers: int) -> None:
        self._seconds, self._row, self._draw = seconds, row, random.Random(SEED)
        self._awaited, self._at_work = workers, {}

    async def load(self) -> None:
        """Load the library, as a worker does before it says hello."""
        import clme_lib.study.cluster.worker  # noqa: F401

    async def hello(self, about: dict) -> dict:
        self._awaited -= 1
        return about

    async def prepare(self, unit, start):
        # measure from the time when all workers are ready
        while self._awaited:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        return {"hyperparameters": {"values": {}}, "setup": {}}

    async def edit(self, worker, unit, start, texts=None):
        from clme_lib.study.cluster.worker import Result

        # a worker handles its requests one at a time, in order
        async with self._at_work.setdefault(worker, asyncio.Lock()):
            began = time.perf_counter()
            await asyncio.sleep(sum(self._draw.choice(self._seconds) for _ in unit.cases))
            seconds = time.perf_counter() - began
        return Result([{**self._row, "case_id": case, "start": start["id"]} for case in unit.cases], seconds)


def scaling(sizes: list[int], each: int, faster: float, processes: int = 4) -> pd.DataFrame:
    """Each worker edits about ``each`` cases, one at a time, ``faster`` times as fast as the published run's machine."""
    from clme_lib.datasets import published
    from clme_lib.datasets.cases import Case, dataset_sha256
    from clme_lib.datasets.paper import CNLE
    from clme_lib.datasets.registry import load_cases
    from clme_lib.study import provenance
    from clme_lib.study.cluster.connection import connected
    from clme_lib.study.cluster.crew import Crew
    from clme_lib.study.cluster.driver import Driver
    from clme_lib.study.cluster.worker import MUST_AGREE
    from clme_lib.study.config import make_config

    class Timed(Driver):
        """Notes when the workers begin to edit, and when their last record came."""

        def _prepared(self, unit, prepared) -> None:
            super()._prepared(unit, prepared)
            self.began, self.usage = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)

        def _came(self, *args) -> None:
            super()._came(*args)
            self.ended = time.monotonic()

    lines = (PUBLISHED / "records" / "cnle.grace.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seconds = [record["edit_seconds"] / faster for record in records]
    stack = contextlib.ExitStack()
    ray = stack.enter_context(connected(make_config()))
    about = {"node": "this", "cache": "", "library": provenance.library_sha256(), "model": "m", "dtype": "float32", "hardware": {"device": "cpu"},
             **{name: provenance.versions()[name] for name in MUST_AGREE}}  # fmt: skip
    rows = []
    for workers in sizes:
        folder = Path(tempfile.mkdtemp(prefix="clme-cluster-"))
        cases = [Case(n, "cnle", CNLE.prompt(f"task {n}"), "x = 1", (CNLE.prompt(f"do task {n}"),), tuple(CNLE.prompt(f"other {k}") for k in range(5)))
                 for n in range(workers * each)]  # fmt: skip
        published.write(folder / "EditConala.json", cases)
        config = make_config(subject="smollm2-135m", dataset="cnle", editors="grace", cases=len(cases), source=str(folder / "EditConala.json"),
                             out=folder / "run", batch_size=1, on="ray", workers=workers)  # fmt: skip
        loaded = load_cases("cnle", config.source)
        actors = [
            ray.remote(Sleepers)
            .options(num_cpus=0, max_concurrency=2 * workers)
            .remote(seconds, records[0], workers // processes)
            for _ in range(processes)
        ]

        ray.get([actor.load.remote() for actor in actors])

        class Handle:
            def __init__(self, actor, name) -> None:
                self.prepare, self._actor = actor.prepare, actor
                self.edit = type("Edit", (), {"remote": staticmethod(lambda *args: actor.edit.remote(name, *args))})
                self.hello = type("Hello", (), {"remote": staticmethod(lambda: actor.hello.remote(about))})

        names = iter(range(workers))
        crew = Crew(ray, lambda name: Handle(actors[next(names) % processes], name), lambda: workers)  # noqa: B023
        driver = Timed(
            config, {"cnle": loaded}, {"cnle": loaded}, {"cnle": dataset_sha256(loaded)}, [("cnle", "grace")], crew
        )
        driver.run()
        wall, before = driver.ended - driver.began, driver.usage
        after = resource.getrusage(resource.RUSAGE_SELF)
        busy = sum(member.busy for member in crew.past)
        rows.append({"workers": workers, "cases": len(cases), "mean seconds of an edit": round(busy / len(cases), 2), "seconds": round(wall, 1),
                     "utilisation": f"{100 * busy / (workers * wall):.1f}%", "records a second": round(len(cases) / wall),
                     "driver's CPU": f"{100 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / wall:.0f}%",
                     "driver's memory MiB": round(after.ru_maxrss / 1024)})  # fmt: skip
        for actor in actors:
            ray.kill(actor)
        shutil.rmtree(folder)
    stack.close()
    return pd.DataFrame(rows)


def study() -> pd.DataFrame:
    """Hours of the whole study on 1, 8 and 64 workers: the work divided by the number of workers and by scaling's measured utilisation."""
    from clme_lib.study.rq2.measure import load_measurements
    from clme_lib.study.rq2.tables import PAPER_CASES, projection_table

    scaled = pd.read_csv(ROOT / "results" / "benchmarks" / "cluster_scaling.csv").set_index("workers")
    used = float(scaled.loc[64, "utilisation"].removesuffix("%")) / 100
    measured = projection_table(load_measurements(ROOT / "results" / "efficiency"), label="tab").data
    (hours,) = measured.loc[measured["Subject"] == "smollm2-135m", "in batches (h)"].astype(float)
    work = {
        "smollm2-135m, hours": hours,
        "any subject, hours for each second of a case": 9 * sum(PAPER_CASES.values()) / 3600,
    }
    return pd.DataFrame(
        {
            "what": what,
            "1 worker": f"{alone:.1f}",
            **{f"{count} workers": f"{alone / count / used:.1f}" for count in (8, 64)},
        }
        for what, alone in work.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "overhead", "scaling", "study"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--workers", default="64,256,1024")
    parser.add_argument("--each", type=int, default=50)
    parser.add_argument("--faster", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.what == "faults":
        table = faults(options.kills)
    elif options.what == "overhead":
        table = overhead(options.cases, options.turns)
    elif options.what == "study":
        table = study()
    else:
        table = scaling(list(map(int, options.workers.split(","))), options.each, options.faster)
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
