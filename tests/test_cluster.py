"""A run on many machines: what is asked of whom, what is made once, and that faults of workers, nodes and drivers cost no record."""

import contextlib
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import make_subject, run_config, write_source

from clme_lib.cli import main
from clme_lib.datasets.cases import dataset_sha256
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.grace import GRACE
from clme_lib.evaluation.records import FAILED, SCORED
from clme_lib.metrics.base import TEXTS
from clme_lib.study import run_folder, runs
from clme_lib.study.cluster import crew
from clme_lib.study.cluster.driver import Driver
from clme_lib.study.cluster.queue import Group, Queue, Unit
from clme_lib.study.cluster.sharing import Registry, Sharing, cache_id
from clme_lib.study.cluster.worker import Job, Worker
from clme_lib.study.config import RunConfig
from clme_lib.support.artifact import Artifact, shared_by
from clme_lib.support.errors import StudyError

SMALL = "malmen.layers=[2,3],malmen.rank=8,malmen.iterations=2"
PLACE, OTHER = ("cnle", "grace", 0), ("cnle", "malmen", 0)


class Named(Worker):
    """A worker that knows what it is called."""

    def __init__(self, job, name, *rest):
        super().__init__(job, name, *rest)
        self.own_name = name


def queue_of(*groups):
    return Queue(groups)


def test_a_group_is_prepared_before_its_batches_and_the_longest_come_first():
    queue = queue_of(Group(PLACE, [5, 3, 9, 1]), Group(OTHER, [1, 2]))
    first = queue.next(None, 8, 1)
    assert first == Unit(PLACE, "prepare")
    second = queue.next(None, 8, 1)
    assert second == Unit(OTHER, "prepare") and queue.next(None, 8, 1) is None
    queue.finished(first)
    assert queue.next(PLACE, 2, 1) == Unit(PLACE, "edit", (5, 3))
    queue.finished(second)
    assert queue.next(PLACE, 2, 1) == Unit(PLACE, "edit", (9, 1)), "a worker stays where it is"
    assert queue.next(PLACE, 2, 1) == Unit(OTHER, "edit", (1,)), "the last batches are small"
    assert queue.unfinished


def test_what_kills_workers_is_halved_until_the_case_is_known():
    queue = queue_of(Group(PLACE, [1, 2, 3, 4]))
    queue.finished(queue.next(None, 4, 1))
    asked, blamed, edited = 0, [], []
    unit = queue.next(PLACE, 4, 0.5)
    while unit:
        asked += 1
        if 3 in unit.cases:
            blamed += queue.died(unit)
        else:
            edited += unit.cases
            queue.finished(unit)
        unit = queue.next(PLACE, 4, 0.5)
    assert blamed == [3] and sorted(edited) == [1, 2, 4] and asked < 12 and not queue.unfinished
    queue = queue_of(Group(PLACE, [1]))
    for last in (False, False, True):
        with (
            pytest.raises(StudyError, match="prepare grace on cnle: 3 workers died")
            if last
            else contextlib.nullcontext()
        ):
            queue.died(queue.next(None, 1, 1))


def test_workers_are_asked_ahead_while_there_is_plenty_and_what_they_had_not_begun_is_nobodys_fault():
    queue = queue_of(Group(PLACE, list(range(12))))
    queue.finished(queue.next(None, 2, 1))
    first = queue.next(PLACE, 2, 1)
    ahead = queue.ahead(PLACE, 2, 1)
    assert (first.cases, ahead.cases) == ((0, 1), (2, 3))
    queue.returned(ahead)
    assert queue.died(first) == ()
    assert [queue.next(PLACE, 2, 1) for _ in range(2)] == [replace(first, deaths=1), ahead]
    assert queue.ahead(PLACE, 2, 1).cases == (4, 5)
    assert queue.ahead(PLACE, 2, 1) is None, "towards the end others would wait for it"


def test_a_single_death_is_nobodys_fault():
    queue = queue_of(Group(PLACE, [1, 2]))
    queue.finished(queue.next(None, 2, 0.5))
    unit = queue.next(PLACE, 2, 0.5)
    assert queue.died(unit) == () and queue.next(None, 2, 0.5).cases == (1, 2)


def test_a_file_is_made_once_over_caches(tmp_path, monkeypatch):
    """Two caches: the second has the bytes of the first; what a dead worker held is free; a failed making is not passed on."""
    registry, made = Registry(), []

    def ask(method, *args):
        return getattr(registry, method)(*args)

    def make(cache, worker, fails=False):
        monkeypatch.setenv("CLME_CACHE", str(tmp_path / cache))
        file = Artifact.cached("encoders", "x", {"format": "test"})
        with shared_by(Sharing(worker, ask)), file.made_once():
            if not file.exists():
                made.append(worker)
                if fails:
                    raise StudyError("no text")
                file.file.write_bytes(b"learnt by " + worker.encode())
        return file.file.read_bytes()

    ask("join", "another cache")
    with pytest.raises(StudyError, match="no text"):
        make("a", "w0", fails=True)
    assert make("a", "w1") == make("b", "w2") == b"learnt by w1" and made == ["w0", "w1"]
    assert registry.acquire("encoders/y", "w1", "a") == "make" and registry.acquire("encoders/y", "w2", "b") == "wait"
    registry.forget("w1")
    assert registry.acquire("encoders/y", "w2", "b") == "make"
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "a"))
    own = cache_id()
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "b"))
    assert cache_id() == cache_id() != own


def _hold(folder, seconds):
    os.environ["CLME_CACHE"] = folder
    file = Artifact.cached("encoders", "x", {})
    with file.made_once():
        Path(folder, "held").touch()
        time.sleep(seconds)
        file.file.write_bytes(b"made")


def test_processes_that_share_a_cache_wait_for_who_makes_a_file_or_dies(tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path), 60))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    threading.Timer(0.3, process.kill).start()
    file = Artifact.cached("encoders", "x", {})
    with file.made_once():
        process.join(10)
        assert process.exitcode == -signal.SIGKILL and not file.exists()


# Ray's part in one process: every answer is there when it is asked for.


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Dead(Exception):
    pass


class Unreachable(Dead):
    pass


class PlainRay:
    exceptions = SimpleNamespace(RayTaskError=TaskError, RayError=Dead, ActorUnavailableError=Unreachable)

    def wait(self, references, num_returns=1, timeout=None):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        try:
            return reference()
        except (StudyError, ValueError) as error:
            raise TaskError(error) from error

    def kill(self, actor):
        pass


class Actor:
    def __init__(self, worker):
        self._worker = worker

    def __getattr__(self, name):
        method = getattr(self._worker, name)
        return SimpleNamespace(remote=lambda *args: lambda: method(*args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A subject that other processes can load, and five cases."""
    folder = tmp_path_factory.mktemp("cluster")
    llama = make_subject("llama")
    llama.model.save_pretrained(folder / "tiny")
    llama.tokenizer.save_pretrained(folder / "tiny")
    write_source(folder)
    (folder / "corpus").mkdir()
    for n in range(30):
        (folder / "corpus" / f"{n}.txt").write_text("".join(chr(40 + (n * k * 7 + k) % 80) for k in range(300)))
    return folder


def config(folder, out, **changes):
    small = f"memit.layers=[1,2],memit.steps=3,memit.corpus={folder / 'corpus'},{SMALL}"
    fields = {"subject": str(folder / "tiny"), "name": "x", "set": small, "cases": 5, "editors": "none,grace"}
    return run_config(folder / "EditConala.json", out, **{**fields, **changes})


def texts(out):
    """What a run wrote, and how it came out, by record."""
    records = run_folder.load_run(out)
    columns = ["state", *(f"sha256_{name}" for name in TEXTS)]
    rows = records.set_index(["dataset", "editor", "position", "case_id"])[columns].astype(str)
    assert rows.index.is_unique
    return rows.sort_index()


def drive(configured, workers, room=lambda: 2):
    """Complete a run with in-process workers; each is what ``workers`` gives for its name."""
    everything = {name: load_cases(name, configured.source) for name in configured.dataset}
    chosen = {name: runs.sampled(configured, name) for name in configured.dataset}
    ids = {name: [case.case_id for case in cases] for name, cases in chosen.items()}
    job = Job(configured, (), everything, ids)
    data = {name: dataset_sha256(cases) for name, cases in everything.items()}
    pending = [(name, editor) for name in configured.dataset for editor in configured.editors]
    workers_here = crew.Crew(PlainRay(), lambda name: Actor(workers(job, name)), room)
    Driver(configured, chosen, everything, data, pending, workers_here).run()
    return run_folder.load_run(configured.out)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["single", "sequential", "simie"])
def test_workers_make_the_records_of_one_process(folder, tmp_path, protocol, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    editors = "ft-l,rome" if protocol == "simie" else "none,grace"
    alone = runs.run(config(folder, tmp_path / "alone", protocol=protocol, editors=editors))
    together = drive(config(folder, tmp_path / "together", protocol=protocol, editors=editors), Worker)
    assert len(alone) == len(together)
    assert texts(tmp_path / "alone").equals(texts(tmp_path / "together"))
    (start,) = run_folder.load_manifest(tmp_path / "together")["starts"]
    assert sum(worker["records"] for worker in start["workers"]) == len(together) and "finished" in start
    assert start["hyperparameters"].keys() == set(editors.split(","))
    rates = start["rates"]["cnle"]
    assert sum(rate["records"] for rate in rates.values()) == len(together) and all(
        rate["seconds"] > 0 for rate in rates.values()
    )
    assert (start["model"], start["dtype"]) == tuple(
        run_folder.load_manifest(tmp_path / "alone")["starts"][0][name] for name in ("model", "dtype")
    )


@pytest.mark.slow
def test_a_worker_that_dies_between_two_states_loses_the_edit_in_flight(folder, tmp_path, monkeypatch):
    """The model is evaluated with 1, 3 and 5 edits; the worker dies when it has made four."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    alone = runs.run(config(folder, tmp_path / "alone", protocol="sequential", editors="grace"))
    edited, died, make = [], [], GRACE._edit_batch
    monkeypatch.setattr(
        GRACE, "_edit_batch", lambda self, cases, *given: edited.extend(cases) or make(self, cases, *given)
    )

    class DiesOnce(Worker):
        def go_on(self, unit):
            if len(edited) == 4 and not died:
                died.append(unit)
                raise Dead("gone")
            return super().go_on(unit)

    together = drive(config(folder, tmp_path / "run", protocol="sequential", editors="grace"), DiesOnce)
    assert died and len({case.case_id for case in edited}) == len(edited) == 5, "no edit is made again"
    assert len(together) == len(alone) and texts(tmp_path / "alone").equals(texts(tmp_path / "run"))
    assert [file.name for file in (tmp_path / "run" / "states").iterdir()] == ["cnle.grace.safetensors"]


class Dies(Worker):
    def edit(self, unit, *args):
        if 2 in unit.cases and unit.place[1] == "grace":
            raise Dead("gone")
        return super().edit(unit, *args)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_a_case_that_kills_workers_fails_and_the_others_do_not(folder, tmp_path, monkeypatch, batch_size):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    runs.run(config(folder, tmp_path / "alone"))
    records = drive(config(folder, tmp_path / "run", batch_size=batch_size), Dies)
    failed = records[records["state"] == FAILED]
    assert failed[["editor", "case_id", "error"]].values.tolist() == [["grace", 2, "3 workers died of this case alone"]]
    both = texts(tmp_path / "alone"), texts(tmp_path / "run")
    assert len(both[0]) == len(both[1]) == 10
    good = both[1]["state"] == SCORED
    assert good.sum() == 9 and both[0][good].equals(both[1][good])
    (start,) = run_folder.load_manifest(tmp_path / "run")["starts"]
    assert start["retried"] > 0 and "died" in {worker["state"] for worker in start["workers"]}
    again = drive(config(folder, tmp_path / "run", batch_size=batch_size, retry_failed=True), Worker)
    assert (again["state"] == SCORED).all() and texts(tmp_path / "run").equals(both[0])


@pytest.mark.slow
def test_a_case_is_not_blamed_for_nodes_that_go(folder, tmp_path, monkeypatch):
    """Not even if that happens again and again while a worker has it."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    lost = []

    class Lost(Worker):
        def edit(self, unit, *args):
            if 2 in unit.cases and unit.place[1] == "grace" and len(lost) < 6:
                lost.append(unit)
                raise (Unreachable("gone"), Dead("the actor died because its node has died"))[len(lost) % 2]
            return super().edit(unit, *args)

    records = drive(config(folder, tmp_path / "run", batch_size=1), Lost)
    assert len(lost) == 6 and len(records) == 10 and (records["state"] == SCORED).all()


@pytest.mark.slow
def test_workers_that_differ_or_cannot_start(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))

    class Older(Worker):
        def hello(self):
            return {**super().hello(), "torch": "1.0"}

    with pytest.raises(
        StudyError, match=r"on: node \S+ has torch 1.0, but this process has \S+: install the same version on all nodes"
    ):
        drive(config(folder, tmp_path / "older"), Older)

    class OtherModel(Worker):
        def hello(self):
            return {**super().hello(), "model": "x"}

    def second_differs(job, name):
        return (OtherModel if name == "worker-2" else Worker)(job, name)

    with pytest.raises(StudyError, match="has a different model from the first worker's: x"):
        drive(config(folder, tmp_path / "other"), second_differs)

    class Lacks(Worker):
        def hello(self):
            return {"node": "node-7", "problem": "no folder tiny: copy it there"}

    def second_lacks(job, name):
        return (Lacks if name == "worker-2" else Worker)(job, name)

    assert len(drive(config(folder, tmp_path / "lacks"), second_lacks)) == 10
    assert "worker-2 is left out: node node-7: no folder tiny: copy it there" in capsys.readouterr().err
    with pytest.raises(StudyError, match="on: no worker can start: node node-7: no folder tiny"):
        drive(config(folder, tmp_path / "none"), Lacks)

    class DiesAtFirst(Named):
        def hello(self):
            if self.own_name in ("worker-1", "worker-2"):
                raise Dead("its node is gone")
            return super().hello()

    assert len(drive(config(folder, tmp_path / "again"), DiesAtFirst)) == 10

    class AlwaysDies(Worker):
        def hello(self):
            raise Dead("out of memory")

    with pytest.raises(StudyError, match="on: no worker can start: it died while starting"):
        drive(config(folder, tmp_path / "never"), AlwaysDies)

    class Breaks(Worker):
        def edit(self, unit, *args):
            raise StudyError("the disk is full")

    with pytest.raises(StudyError, match=r"worker-1 on node \S+: the disk is full"):
        drive(config(folder, tmp_path / "breaks"), Breaks)
    with pytest.raises(StudyError, match="but seed=1 was requested"):
        runs.run(config(folder, tmp_path / "lacks", seed=1, on="ray"))


@pytest.mark.slow
def test_caches_that_are_not_shared_get_the_unedited_texts(folder, tmp_path, monkeypatch):
    """The second worker is given what the first generated with the model alone, and generates none of it."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    given = []

    class Counts(Named):
        def hello(self):
            return {**super().hello(), "cache": self.own_name}

        def edit(self, unit, start, texts=None):
            result = super().edit(unit, start, texts)
            given.append((unit.place[1], len(texts)))
            return result

    drive(config(folder, tmp_path / "run", editors="grace,ft-l,rome", batch_size=1), Counts)
    *_, last = dict.fromkeys(editor for editor, _ in given)
    counts = [count for editor, count in given if editor == last]
    assert len(counts) == 5 and all(counts) and given[0][1] == 0


@pytest.mark.slow
def test_workers_are_started_where_nodes_join(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crew, "COUNTS_NODES_EVERY", 0)
    nodes = iter([1, 1, 1, 1])
    drive(config(folder, tmp_path / "run", batch_size=1), Worker, lambda: next(nodes, 3))
    (start,) = run_folder.load_manifest(tmp_path / "run")["starts"]
    assert len(start["workers"]) == 3 and all(worker["records"] for worker in start["workers"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://localhost:1", "127.0.0.1:99999999999"])
def test_an_address_where_nobody_listens_is_said_at_once(folder, tmp_path, monkeypatch, address):
    pytest.importorskip("ray", reason="Ray has no wheel for this Python")
    began = time.monotonic()
    with pytest.raises(StudyError, match=f"ray_address: nothing can be reached at {address}: .* Start a cluster there"):
        runs.run(config(folder, tmp_path / "run", on="ray", ray_address=address))
    assert time.monotonic() - began < 30 and not list((tmp_path / "run").glob("records/*"))


def test_a_plan_says_what_is_left(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    options = ["--subject", str(folder / "tiny"), "--dataset", "cnle", "--editor", "none,malmen", "--source", str(folder / "EditConala.json"),
               "--out", str(tmp_path / "run"), "--name", "x", "--set", SMALL, "--batch-size", "2"]  # fmt: skip
    plan = ["run", *options, "--cases", "5", "--dry-run", "--on", "ray", "--workers", "3"]
    assert main(plan) == 0 and not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert "workers: 3\nexpected: unknown; run a few cases" in shown
    assert re.search(r"cnle +none +5 +3 +unknown +–\n", shown)
    lacking = f"missing: malmen of {folder / 'tiny'} for cnle, which malmen prepares once before it edits"
    assert lacking in shown
    assert re.search(r"cnle +malmen +5 +\d +unknown +2 times, from [23] and [23] cases\n", shown)
    assert main(["run", *options, "--cases", "2"]) == 0
    capsys.readouterr()
    assert main(plan) == 0
    shown = capsys.readouterr().out
    assert re.search(r"cnle +none +3 +2 +\d+\.\d s", shown) and "expected: 0.00 hours" in shown
    assert lacking not in shown
    with pytest.raises(StudyError, match="dry_run: .* prints a plan"):
        runs.run(config(folder, tmp_path / "run", dry_run=True))


def test_a_plan_names_what_the_editor_really_prepares(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    prepared = {"memit": "statistics", "a-grace": "encoders", "malmen": "malmen"}
    editors = ",".join([*prepared, "neuraldb", "rome", "grace"])
    options = ["--subject", str(folder / "tiny"), "--dataset", "cnle", "--source", str(folder / "EditConala.json"), "--out", str(tmp_path / "run")]  # fmt: skip
    shrunk = "malmen.layers=[2, 3],memit.layers=[1, 2]"
    assert main(["run", *options, "--editor", editors, "--set", shrunk, "--cases", "5", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert dict(re.findall(r"missing: (\w+) of .*, which ([\w-]+) prepares", shown)) == {
        v: k for k, v in prepared.items()
    }


def test_the_pages_scripts_are_well_formed():
    page = (Path(__file__).resolve().parent.parent / "book" / "many_machines.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(.+?)```", page, re.S)
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr and script.startswith("#!/bin/bash\n#SBATCH")
    (manifest,) = map(yaml.safe_load, re.findall(r"```yaml\n(.+?)```", page, re.S))
    pins = dict(
        re.findall(
            r"^([\w.-]+)==(\S+)$", (Path(__file__).resolve().parent.parent / "constraints.txt").read_text(), re.M
        )
    )
    assert manifest["kind"] == "RayJob" and manifest["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for command in (script, manifest["spec"]["entrypoint"], page):
        for line in re.findall(r"clme run ([^`\n]+(?:\\\n[^`\n]+)*)", command):
            words = shlex.split(
                line.replace("\\\n", " ").rstrip("\\ ").replace("$SCRATCH", "x").replace("$ip:6379", "x")
            )
            known = {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields} | {"--editor"}
            assert {word for word in words if word.startswith("--")} <= known, line


# With Ray itself.


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="Ray has no wheel for this Python")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_three_nodes_of_which_two_die_make_the_records_of_one_process(folder, cluster, tmp_path, monkeypatch):
    """Begun in one process; each node has a cache of its own; a node and a worker are killed."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    editors = "none,memit,malmen"
    runs.run(config(folder, tmp_path / "alone", editors=editors))
    runs.run(config(folder, tmp_path / "run", editors=editors, cases=1))
    nodes = [cluster.add_node(num_cpus=1, env_vars={"CLME_CACHE": str(tmp_path / f"cache-{n}")}) for n in (1, 2)]

    def disturb():
        file = tmp_path / "run" / "records" / "cnle.memit.jsonl"
        while len(file.read_bytes().splitlines()) < 2:
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)
        os.kill(workers_alive()[0], signal.SIGKILL)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    runs.run(config(folder, tmp_path / "run", editors=editors, on="ray", ray_address=cluster.address, batch_size=1))
    disturbing.join()
    assert texts(tmp_path / "alone").equals(texts(tmp_path / "run"))
    start = run_folder.load_manifest(tmp_path / "run")["starts"][-1]
    assert {worker["state"] for worker in start["workers"]} >= {"died"} and start["setup"]["memit"]["statistics"]


def workers_alive():
    """Their process ids."""
    return [
        int(pid)
        for pid in subprocess.run(["pgrep", "-f", "ray::_Actor"], capture_output=True, text=True).stdout.split()
    ]


def listening():
    """Addresses that are listened on beyond the loopback."""
    addresses = set()
    for file, loopback in (("/proc/net/tcp", "0100007F"), ("/proc/net/tcp6", "0000000000000000FFFF00000100007F")):
        for line in Path(file).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and not address.startswith(loopback):
                addresses.add(address)
    return addresses


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_and_one_process_goes_on(folder, tmp_path, monkeypatch):
    """A run on this machine's workers listens on the loopback alone; what it has recorded stays."""
    pytest.importorskip("ray", reason="Ray has no wheel for this Python")
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    options = {"protocol": "sequential", "editors": "grace", "set": ""}
    runs.run(config(folder, tmp_path / "alone", **options))
    before, out = listening(), tmp_path / "run"
    command = [sys.executable, "-m", "clme_lib.cli", "run", "--subject", str(folder / "tiny"), "--dataset", "cnle", "--editor", "grace",
               "--cases", "5", "--source", str(folder / "EditConala.json"), "--out", str(out), "--name", "x", "--batch-size", "2",
               "--protocol", "sequential", "--on", "ray"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    records = out / "records" / "cnle.grace.jsonl"
    while not records.is_file() and process.poll() is None:
        time.sleep(0.05)
    beyond = listening() - before
    process.kill()
    process.wait()
    assert records.is_file(), process.stderr.read()
    assert not beyond
    kept = records.read_bytes()
    runs.run(config(folder, out, **options))
    assert records.read_bytes().startswith(kept)
    assert texts(tmp_path / "alone").equals(texts(out))
    until = time.monotonic() + 20
    while workers_alive() and time.monotonic() < until:
        time.sleep(0.2)
    assert not workers_alive()
