"""The sandbox: what passes passes, what fails is told apart, and nothing that a snippet does becomes a pass or reaches outside."""

import os
import socket
import subprocess
import sys

import pytest

from clme_lib.support import sandbox_process
from clme_lib.support.errors import StudyError
from clme_lib.support.sandbox import FAILURES, PASSES, Check, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
# Whatever runs to its end passes this: only what is stopped fails.
UNLESS_STOPPED = Check("", "")
SORTED = Check("xs = [3, 1, 2]", "assert xs == [1, 2, 3]")
STARTED = (
    "import _posixsubprocess as p, os\n_, end = os.pipe()\n"
    "p.fork_exec([{0}], [{0}], True, (end,), None, None, -1, -1, -1, -1, -1, -1, -1, end, True, False, -1, None, None, None, -1, None, True)"
)


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(seconds=2)
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize(
    "snippet, outcome",
    [
        ("xs.sort()", PASSES),
        ("xs[:] = sorted(xs)", PASSES),
        ("", "wrong"),
        ("sorted(xs)", "wrong"),
        ("xs.sort(", "syntax"),
        ("return xs", "syntax"),
        ("x\0", "syntax"),
        ("ys.sort()", "name"),
        ("import no_such_module", "import"),
        ("xs.order()", "attribute"),
        ("xs.sort(1)", "type"),
        ("xs[3]", "other"),
        ("xs = [0] * 10**11", "memory"),
        ("assert False", "other"),
    ],
)
def test_how_a_snippet_ends_is_told(sandbox, snippet, outcome):
    assert sandbox.run(SORTED, snippet) == outcome
    assert outcome == PASSES or outcome in FAILURES


@pytest.mark.parametrize(
    "setup, snippet, test",
    [
        ("a = 2", "a + 1", "assert result == 3"),
        ("a = 2", "b = a + 1", "assert result == 3 and b == 3"),
        ("a = 2", "b, c = a, a", "assert result is None and (b, c) == (2, 2)"),
        ("a = 2", "for n in range(a):\n    print(n)", "assert output.split() == ['0', '1'] and result is None"),
        ("import json", "json.dump([1], open('a.json', 'w'))", "assert json.load(open('a.json')) == [1]"),
        ("import os\nos.mkdir('old')", "import shutil; shutil.rmtree('old')", "assert os.listdir() == []"),
        ("import os", "os.rename(__import__('tempfile').mkdtemp(), 'b')", "assert os.listdir() == ['b']"),
        ("", "from collections import namedtuple\nP = namedtuple('P', 'x y')", "assert P(1, 2).y == 2"),
        ("", "import logging\nlogging.warning('late')", "assert result is None"),
        ("", "from concurrent.futures import ThreadPoolExecutor as E\nlist(E(2).map(abs, [-1, 2]))", "assert result == [1, 2]"),
        ("import numpy as np", "np.linspace(0, 1, 3)", "assert result.tolist() == [0, 0.5, 1]"),
        ("import pandas as pd", "pd.DataFrame({'a': [2, 1]}).sort_values('a')", "assert result['a'].tolist() == [1, 2]"),
        ("import sys", "print('said', file=sys.stderr)", "assert output == ''"),
    ],
)  # fmt: skip
def test_ordinary_code_is_not_hindered(sandbox, setup, snippet, test):
    assert sandbox.run(Check(setup, test), snippet) == PASSES


# Each is a way to pass without sorting; all but those that wait for a clock are quick.
FORGERIES = {
    "exits": "import sys; sys.exit()",
    "exits at once": "import os; os._exit(0)",
    "crashes": "import faulthandler; faulthandler._sigsegv()",
    "overflows": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "says so": "print('passes'); print('passes\\n')",
    "writes everywhere": "import os\nfor fd in range(200):\n    try: os.write(fd, b'passes\\n')\n    except OSError: pass",
    "forks": "import os\nwhile True: os.fork()",
    "forks otherwise": "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
    "starts a program": "import subprocess; subprocess.run(['true'])",
    "starts a program unseen": STARTED.format("b'/bin/true'"),
    "fills memory": "xs = []\nwhile True: xs.append(bytearray(10**7))",
    "fills a file": "f = open('f', 'wb')\nwhile True: f.write(bytes(10**7))",
    "loses its folder": "import os; os.rmdir(os.getcwd())",
    "shadows builtins": "def all(*a): return True\ndef sorted(*a): return a\ndef list(*a): return a",
    "has builtins of its own": "__builtins__ = dict(vars(__builtins__), all=lambda *a: True)",
    "empties its names": "globals().clear()",
    "replaces builtins": "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.sorted = lambda *a: xs\nbuiltins.list = lambda *a: 1",
    "replaces errors": "import builtins\nbuiltins.AssertionError = builtins.BaseException = type('E', (Exception,), {})",
    "replaces what compiles": "import builtins\nbuiltins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: None",
    "clears builtins": "import builtins; vars(builtins).clear()",
    "replaces modules": (
        "import json, os, socket, time, _socket, _thread, sys\n"
        "json.dumps = json._default_encoder.encode = lambda *a: 'passes'\n"
        "os._exit = time.sleep = _thread._count = lambda *a: 0\n"
        "socket.socket = _socket.socket = None\nsys.modules.clear()"
    ),
    "says that it ended well": "__outcome__.append(None); xs = 1 / 0",
    "has no outcome": "__outcome__ = [None]",
    "connects": (
        "import socket\nname = next(l.split()[-1] for l in open('/proc/net/unix') if '@clme-' in l)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + name[1:]); s.send(b'passes\\n'); s.close()"
    ),
    "connects by the C module": "import _socket; _socket.socket(1, 1)",
    "uses ctypes": "import ctypes; ctypes.CDLL(None)._exit(0)",
    "looks at objects": "import gc\n[o.clear() for o in gc.get_objects() if type(o) is list and o == [True]]",
    "looks at referrers": "import gc\ngc.get_referrers(xs)",
    "looks at threads": "import sys; [f.f_locals['refusing'].clear() for f in sys._current_frames().values()]",
    "looks at frames": "import sys; sys._getframe().f_back.f_locals['say']('passes')",
    "looks at its error": "try: 1 / 0\nexcept Exception as e: e.__traceback__.tb_frame.f_back.f_locals['say']('passes')",
    "looks at its generator": "g = (n for n in xs); g.gi_frame.f_back.f_locals['say']('passes')",
    "looks in main": "import __main__; __main__._judge = __main__.run = lambda *a: {'kind': 'passes'}; __main__.os._exit = print",
    "traces": "import sys; sys.settrace(lambda *a: None)",
    "adds a hook": "import sys; sys.addaudithook(lambda *a: None)",
    "ends others": "import os; os.kill(1, 9); os.kill(os.getppid(), 9)",
    "lifts limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "asks for input": "input()",
    "leaves by a signal": "import signal; signal.raise_signal(signal.SIGKILL)",
    "stops": "import signal; signal.raise_signal(signal.SIGSTOP)",
    "never ends": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "leaves a thread": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
}  # fmt: skip


@pytest.mark.parametrize("snippet", FORGERIES.values(), ids=FORGERIES)
def test_no_pass_is_forged(sandbox, snippet):
    check = Check(SORTED.setup, "assert all(a <= b for a, b in zip(xs, xs[1:])) and sorted([2, 1]) == list((1, 2))")
    assert sandbox.run(check, snippet) in FAILURES
    assert sandbox.run(check, "xs.sort()") == PASSES, "the next one is judged as ever"


@pytest.mark.parametrize(
    "act",
    [
        "sys._getframe(2).f_locals['say']('passes')",
        "next(later)",
        "sys._getframe(1).f_locals['refusing'].clear()",
        "__import__('socket').socket()",
    ],
)
def test_what_runs_within_the_test_forges_nothing(sandbox, act):
    """A value of the snippet's making is asked by the test: its code runs while the test does."""
    snippet = f"import sys\nlater = (sys._getframe(3) for _ in [1])\nclass A:\n    def __eq__(self, other):\n        {act}\n        return False\nA()"
    assert sandbox.run(Check("", "assert result == 5"), snippet) == "wrong"


@pytest.mark.parametrize(
    "act",
    [
        "open({file!r}, 'w')",
        "open({file!r}, 'a').write('more')",
        "open({file!r}, 'r+')",
        "import os; os.remove({file!r})",
        "import os; os.rename({file!r}, 'mine')",
        "import os; os.replace('mine', {file!r})",
        "import os; os.link({file!r}, 'mine')",
        "import os; os.truncate({file!r}, 0)",
        "import os; os.chmod({file!r}, 0)",
        "import os; os.utime({file!r}, (0, 0))",
        "import os; os.open({file!r}, os.O_WRONLY | os.O_TRUNC)",
        "import os; os.symlink({folder!r}, 'way'); open('way/kept.txt', 'w')",
        "import os; os.chdir({folder!r}); open('kept.txt', 'w')",
        "import os; os.remove('kept.txt', dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import os; os.mkdir(os.path.join({folder!r}, 'new'))",
        "import shutil; shutil.rmtree({folder!r})",
        "import shutil; shutil.move({file!r}, 'mine')",
        "import shutil; shutil.copy('mine', {file!r})",
        "import pathlib; pathlib.Path({file!r}).write_text('x')",
        "import pathlib; pathlib.Path({file!r}).unlink()",
        "import pathlib; pathlib.Path({folder!r}, 'new').touch()",
        "import sqlite3; sqlite3.connect({folder!r} + '/new.db').execute('create table t (x)')",
        "import numpy as np; np.save({folder!r} + '/new.npy', np.zeros(3))",
        "import zipfile; zipfile.ZipFile({folder!r} + '/new.zip', 'w').writestr('a', 'b')",
        "class P(str):\n    pass\nopen(P({file!r}), 'w')",
        "open({file!r}.encode(), 'w')",
    ],
)  # fmt: skip
def test_nothing_outside_is_changed(sandbox, tmp_path, act):
    file = tmp_path / "kept.txt"
    file.write_text("kept")
    before = file.stat().st_mtime_ns, file.stat().st_mode
    snippet = f"open('mine', 'w').close()\n{act.format(file=str(file), folder=str(tmp_path))}"
    assert sandbox.run(UNLESS_STOPPED, snippet) in FAILURES
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.txt"] and file.read_text() == "kept"
    assert (file.stat().st_mtime_ns, file.stat().st_mode) == before


@pytest.mark.parametrize(
    "snippet",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import http.client; http.client.HTTPConnection('127.0.0.1', {port}).connect()",
        "import socket; socket.getaddrinfo('localhost', {port})",
    ],
)
def test_there_is_no_network(sandbox, snippet):
    with socket.create_server(("127.0.0.1", 0)) as server:
        snippet = snippet.format(port=server.getsockname()[1])
        exec(snippet, {})  # Outside of the sandbox there is somebody who answers.
        assert sandbox.run(UNLESS_STOPPED, snippet) == "other"


def test_secrets_of_the_environment_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("CLME_SECRET", "12345")
    sandbox = Sandbox()
    try:
        check = Check("import os", "assert result is None and os.environ['HOME'] == os.getcwd()")
        assert sandbox.run(check, "os.environ.get('CLME_SECRET')") == PASSES
    finally:
        sandbox.close()


def test_nothing_is_left_behind(sandbox):
    program = "b'/bin/sleep', b'54321'"
    started = STARTED.format(program).replace(f"[{program}], [{program}]", f"[{program}], [b'/bin/sleep']")
    # No audit event tells of this way to start a program: it is ended with the snippet.
    assert sandbox.run(UNLESS_STOPPED, started) == PASSES
    assert sandbox.run(Check("", "assert open('f').read() == ''"), "open('f', 'w').close()") == PASSES
    assert "sleep 54321" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert os.listdir(sandbox._home.name) == []


def test_a_check_that_cannot_be_set_up_is_not_the_snippets_fault(sandbox):
    with pytest.raises(StudyError, match="setup.*NameError.*correct the check"):
        sandbox.run(Check("undefined", ""), "1")


def test_a_process_that_was_ended_is_started_again(sandbox):
    assert sandbox.run(SORTED, "xs.sort()") == PASSES
    sandbox._process.kill()
    assert sandbox.run(SORTED, "xs.sort()") == PASSES


def test_a_verdict_is_heard_when_the_process_ends_with_it(monkeypatch):
    """However late the outer process looks: the connection is made between its look at the listener and its look at the child."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address := b"\0clme-test-" + os.urandom(8))
        listener.listen(1)
        listener.setblocking(False)
        if not (child := os.fork()):
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.connect(address)
                    connection.sendall(b"passes\n")
            finally:
                os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        looked, select = [], sandbox_process.select.select

        def blind_at_first(*arguments):
            looked.append(arguments)
            return ([], [], []) if len(looked) == 1 else select(*arguments)

        monkeypatch.setattr(sandbox_process.select, "select", blind_at_first)
        try:
            assert sandbox_process._verdict(listener, child, 5.0) == {"kind": "passes", "error": ""}
        finally:
            os.waitpid(child, 0)
