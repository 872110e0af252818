"""Running snippets that nobody vouches for: one process for many, a fork of it for each (sandbox_process.py says what holds them).

It holds code that a model wrote by mistake, and clumsy attacks. It is no defence against somebody who means to break out of CPython or
of the kernel: who expects that runs all of it in a virtual machine.
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
# how a snippet fails, in the order of tables, and what that means
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
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Its own reserves more than the limit.
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Check:
    """How it is known that a snippet is right.

    Attributes:
        setup: code that is run before it and makes the names it needs.
        test: code that is run after it, in the same namespace, and raises unless it is right. It also finds ``result``, the value of
            the snippet's last statement if that is an expression or an assignment to a name, and ``output``, what was printed.
    """

    setup: str
    test: str


class Sandbox:
    """A process that runs snippets, each for so many ``seconds`` at most; it is started when it is first needed."""

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
        answer = self._ask(request) or self._ask(request)  # once more where the process itself was ended
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
    """``passes``, or how the snippet fails, from this process's one sandbox."""
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
