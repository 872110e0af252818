"""Running untrusted snippets: one process for all, and a fork of it for each (sandbox_process.py documents the confinement).

It withstands a model's harmful mistakes and simple attacks. It is no defence against somebody who intends to break out of CPython or
the kernel: if you expect that, run everything in a virtual machine.
"""

from __future__ import annotations

import ast
import atexit
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import StudyError

PASSES = "passes"
# kinds of failure, in the order of tables, with their meaning
FAILURES = {
    "syntax": "does not parse",
    "name": "NameError",
    "import": "ImportError",
    "attribute": "AttributeError",
    "type": "TypeError",
    "memory": "too much memory",
    "other": "another error",
    "wrong": "runs, and the test fails",
    "time": "too slow",
    "ended": "ends the process",
}
_PROGRAM = Path(__file__).with_name("sandbox_process.py")
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own pool reserves more than the limit.
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Check:
    """Code that decides whether a snippet is right.

    Attributes:
        setup: code that is run before the snippet and defines the names it needs.
        test: code that is run after the snippet, in the same namespace, and raises an error unless the snippet is right. It can use
        ``result``, the value of the snippet's last statement if that is an expression or an assignment to a name, and ``output``,
        the printed text.
    """

    setup: str
    test: str


class Sandbox:
    """A process that runs snippets, each for at most ``seconds``; it is started when it is first needed."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._process: Any = None
        self._home: Any = None

    def run(self, check: Check, snippet: str) -> str:
        """``passes``, or how the snippet fails (one of ``FAILURES``).

        Raises:
            StudyError: this is not Linux, the process does not start, or the check's own setup fails.
        """
        request = {"setup": check.setup, "snippet": snippet, "test": check.test, "seconds": self._seconds}
        request["modules"] = _imported(check.setup)
        answer = self._ask(request) or self._ask(request)  # once more if the process itself was killed
        if answer is None:
            return "ended"
        if answer["kind"] == "setup":
            raise StudyError(f"the setup of a check fails: {answer['error']}: {check.setup!r}; correct the check")
        return answer["kind"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                stream.close()
            self._home.cleanup()
            self._process = None

    def _ask(self, request: dict[str, Any]) -> dict[str, str] | None:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        except (BrokenPipeError, ValueError):
            pass
        self.close()
        return None

    def _start(self) -> None:
        if sys.platform != "linux":
            raise StudyError(
                "snippets are only run on Linux, which can confine them: use a container, or leave out the metrics that run code (`executes`)"
            )
        self._home = tempfile.TemporaryDirectory(prefix="clme-sandbox-home-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT | {"HOME": self._home.name, "TMPDIR": self._home.name},
            cwd=self._home.name,
            text=True,
            encoding="utf-8",
        )


@lru_cache(maxsize=100_000)
def outcome(check: Check, snippet: str) -> str:
    """``passes``, or how the snippet fails, in this process's only sandbox."""
    return _sandbox().run(check, snippet)


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


@lru_cache(maxsize=10_000)
def _imported(code: str) -> list[str]:
    """Modules that code imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return sorted(set(names))
