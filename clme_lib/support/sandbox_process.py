"""The program of the sandbox's process (started by sandbox.py): runs untrusted snippets, each in a fork of itself.

Each line of standard input is a request and is answered by one line. This file runs on its own and imports only the standard
library. A snippet is confined by, from the outside in:

- namespaces for processes and network, where the kernel provides them: every process that a snippet starts ends with it;
- limits on CPU time, memory, file size and processes, and a time limit kept by the parent; standard input is empty, output is discarded;
- Landlock, where the kernel has it: nothing outside the snippet's own temporary folder can be written, moved or removed;
- an audit hook, which Python code cannot remove: no processes, sockets, ctypes or foreign frames, and the same rule for files.

The verdict is sent over a connection that is opened only after the test has passed or failed. While a snippet's code runs there is no
connection that it could write to, and it may not open any; an answer is accepted from the forked process only. Builtins
are restored before the test, and the code that sends the verdict uses nothing that Python code can replace.
"""

import _socket
import _thread
import ast
import builtins
import contextlib
import ctypes
import functools
import importlib
import io
import json
import math
import operator
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
from typing import Any

MEMORY_BYTES, FILE_BYTES, PROCESSES = 1 << 30, 16 << 20, 64  # memory and processes: in addition to those in use

_NAMESPACES, _OF_A_USER = 0x40000000 | 0x20000000 | 0x08000000, 0x10000000  # network, processes, System V IPC
_NO_NEW_PRIVILEGES = 38
# Landlock: its system calls, and its rights to write, make, remove, move and truncate, by the version that introduced them
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITES = {1: 0b1111111110010, 2: 1 << 13, 3: 1 << 14}
_WRITE_FILE = 1 << 1

# prefixes of audit events that are refused while a snippet or test runs
_REFUSED = (
    "socket.", "ctypes.", "subprocess.", "pty.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.startfile",
    "gc.get_", "sys._current_", "sys.addaudithook", "sys.setprofile", "sys.settrace", "sys.monitoring", "syslog.", "fcntl.",
    "signal.pthread_kill", "resource.", "cpython.run_", "os.mknod", "os.mkfifo", "os.chroot", "mmap.",
)  # fmt: skip
# Access to frames raises ValueError, which libraries expect where frames are not available.
_FRAMES = {"tb_frame", "gi_frame", "cr_frame", "ag_frame"}
# indices, among an event's arguments, of the paths that it changes and of the folders to which they are relative
_CHANGES = {
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((0, 2), (1, 2)), "os.truncate": ((0, None),),
    "os.setxattr": ((0, None),), "os.removexattr": ((0, None),), "sqlite3.connect": ((0, None),),
}  # fmt: skip


def serve() -> None:
    """Answer requests until standard input ends."""
    _become_first_process()
    for line in sys.stdin:
        request = json.loads(line)
        for module in request.pop("modules"):  # so that not every fork imports them
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        print(json.dumps(run(**request)), flush=True)


def _become_first_process() -> None:
    """Continue as the first process of new namespaces, which can end all others in them; or unchanged, if namespaces are not available."""
    unshare = ctypes.CDLL(None).unshare
    if unshare(_NAMESPACES) and unshare(_OF_A_USER | _NAMESPACES):
        return
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(abs(os.waitstatus_to_exitcode(status)))


def run(setup: str, snippet: str, test: str, seconds: float) -> dict[str, str]:
    """Run setup, snippet and test in a fork, for at most ``seconds``: the snippet's outcome as ``kind``, and an error as text."""
    try:
        program = _program(snippet)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"kind": "syntax", "error": str(error)[:200]}
    with tempfile.TemporaryDirectory(prefix="clme-sandbox-", ignore_cleanup_errors=True) as folder:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(address := b"\0clme-" + os.urandom(16).hex().encode())
            listener.listen(1)
            listener.setblocking(False)
            child = os.fork()
            if not child:
                try:
                    _confine(os.path.realpath(folder), math.ceil(seconds))
                    _judge(
                        address,
                        os.path.realpath(folder),
                        _recorded(setup),
                        program,
                        compile(test, "<test>", "exec"),
                    )
                finally:
                    os._exit(70)
            try:
                return _verdict(listener, child, seconds)
            finally:
                _end(child)


def _program(snippet: str):
    """Compile a snippet; its code binds the value of its last statement to ``result`` if that is an expression or an assignment to a
    name, and appends an error that ends it to the list ``__error__``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = ast.parse(snippet).body
        compile(snippet, "<snippet>", "exec")
        last = body[-1] if body else None
        if isinstance(last, ast.Expr):
            body[-1] = ast.Assign([ast.Name("result", ast.Store())], last.value)
        elif isinstance(last, ast.Assign) and len(last.targets) == 1 and isinstance(last.targets[0], ast.Name):
            body.append(ast.Assign([ast.Name("result", ast.Store())], ast.Name(last.targets[0].id, ast.Load())))
        frame = ast.parse("try: pass\nexcept BaseException as __e: __error__.append(__e); raise")
        frame.body[0].body += body  # type: ignore[attr-defined]
        return compile(ast.fix_missing_locations(frame), "<snippet>", "exec")


def _recorded(code: str):
    """Compile code that appends an error that ends it to the list ``__error__``."""
    frame = ast.parse("try: pass\nexcept BaseException as __e: __error__.append(__e); raise")
    frame.body[0].body += ast.parse(code).body  # type: ignore[attr-defined]
    return compile(ast.fix_missing_locations(frame), "<setup>", "exec")


def _verdict(listener: socket.socket, child: int, seconds: float) -> dict[str, str]:
    """The child's verdict, if it arrives in time."""
    until, exited = time.monotonic() + seconds, False
    while (left := until - time.monotonic()) > 0:
        if select.select([listener], [], [], 0.002)[0]:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(left)
                    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                    if struct.unpack("3i", credentials)[0] == child:
                        with connection.makefile("rb") as said:
                            kind, _, error = said.read(4096).decode("utf-8", "replace").partition("\n")
                        return {"kind": kind, "error": error}
        elif exited:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return (
                {"kind": "time", "error": ""}
                if code == -signal.SIGXCPU
                else {"kind": "ended", "error": f"status {code}"}
            )
        # after the child's exit, check once more for a verdict that it sent just before
        exited = exited or bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    return {"kind": "time", "error": ""}


def _end(child: int) -> None:
    """End the child and all processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    first = os.getpid() == 1
    if first:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all processes of the namespace except this one
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
        while first:
            os.waitpid(-1, 0)


def _confine(folder: str, seconds: int) -> None:
    """Apply all restrictions on this process that do not depend on Python."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.closerange(3, 4096)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    tempfile.tempdir = folder
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    limits = {"CPU": seconds, "AS": memory, "FSIZE": FILE_BYTES, "CORE": 0, "NPROC": _of_this_user() + PROCESSES}
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # beyond the soft limit of CPU time the process gets SIGXCPU; at the hard limit it is killed
        resource.setrlimit(limit, (soft, soft + 1 if name == "CPU" and soft == value else soft))
    _forbid_writing(folder)


def _of_this_user() -> int:
    """The number of threads of this user's visible processes."""
    count = 0
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def _forbid_writing(folder: str) -> None:
    """If the kernel has Landlock, allow writing only to the folder and the null device from now on."""
    libc = ctypes.CDLL(None)
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1 or libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return
    rights = sum(right for since, right in _WRITES.items() if since <= version)
    rules = libc.syscall(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    for path, allowed in ((folder, rights), (os.devnull, rights & (_WRITE_FILE | 1 << 14))):
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, place)
        libc.syscall(_ADD_RULE, rules, 1, rule, 0)
        os.close(place)
    libc.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _judge(address: bytes, folder: str, setup, program, test) -> None:
    """Run setup, snippet and test, and send the verdict.

    They run in a second thread (the same for all three, because some objects belong to a thread), called one after another by C code
    that stops at the first error. So no frame of this file is below theirs; and the sign that the test has passed is a lock that C code
    releases after it, which Python code cannot reach. All names used here while they run are local, because a module's names can be replaced.
    """
    leave, running, is_a, kind_of, text, base = os._exit, _thread._count, isinstance, type, str, BaseException
    make, family, name_of = _socket.socket, _socket.AF_UNIX, type.__dict__["__name__"].__get__
    known = (
        (NameError, "name"),
        (ImportError, "import"),
        (AttributeError, "attribute"),
        (TypeError, "type"),
        (MemoryError, "memory"),
    )
    space = vars(builtins)
    plain = dict(space)
    refusing: list = []
    ended = {part: _thread.allocate_lock() for part in ("setup", "snippet", "test")}
    begins = {part: _thread.allocate_lock() for part in ("snippet", "test")}
    for lock in (*ended.values(), *begins.values()):
        lock.acquire()

    def say(kind: str, error: str = "") -> None:
        refusing.clear()
        connection = make(family)
        connection.connect(address)
        connection.sendall(f"{kind}\n{error}".encode("utf-8", "replace"))
        connection.close()
        leave(0)

    def described(errors: list) -> str:
        try:
            return f"{name_of(kind_of(errors[-1]))}: {text(errors[-1])}"[:200]
        except base:
            return ""

    def ends(part: str) -> bool:
        """Wait for a part to end; returns whether it ended without an error."""
        while not ended[part].acquire(timeout=0.0005):
            if running() <= others:
                return ended[part].acquire(blocking=False)
        return True

    errors: list = []
    names = {"__name__": "__main__", "__builtins__": builtins, "__error__": errors}
    begun = _thread.allocate_lock()
    begun.acquire()
    steps: list[Any] = [
        begun.release,
        functools.partial(exec, setup, names), ended["setup"].release, begins["snippet"].acquire,
        functools.partial(exec, program, names), ended["snippet"].release, begins["test"].acquire,
        functools.partial(exec, test, names), ended["test"].release, functools.partial(_thread.allocate_lock().acquire, True, 60),
    ]  # fmt: skip
    others = running()
    _thread.start_new_thread(list, (map(operator.call, steps),))
    begun.acquire()  # the thread has started, so running() counts it from now on
    if not ends("setup"):
        return say("setup", described(errors))
    names["result"] = None
    errors.clear()
    of_setup, builtins_module = dict(names), builtins
    of_setup_builtins = {name: value for name, value in of_setup.items() if name in plain}
    before, printed = sys.stdout, io.StringIO()
    sys.stdout = printed
    sys.modules.pop("__main__")
    sys.addaudithook(_guard(folder, refusing, _thread.get_ident()))
    refusing.append(True)
    begins["snippet"].release()
    if not ends("snippet"):
        kinds = [kind for type_, kind in known if errors and is_a(errors[-1], type_)]
        return say(kinds[0] if kinds else "other", described(errors))
    space.update(plain)
    for name in [*space]:
        if name not in plain:
            del space[name]
    sys.stdout = before
    # a snippet's global that is named like a builtin would hide the builtin from the test
    for name in [*names]:
        if name in plain and names[name] is not of_setup.get(name):
            del names[name]
    names |= of_setup_builtins
    names["__builtins__"], names["output"] = builtins_module, printed.getvalue()
    begins["test"].release()
    say("passes" if ends("test") else "wrong")


def _guard(folder: str, refusing: list, judge: int):
    """An audit hook that refuses forbidden events: to all threads while ``refusing`` is not empty, and always to all except the ``judge``."""
    here, link, path_of, thread = os.getcwd, os.readlink, os.fspath, _thread.get_ident
    texts, number, writes = (str, bytes), int, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    kind_of, refused, frames, changes, allowed = type, _REFUSED, _FRAMES, _CHANGES, (folder, os.devnull)
    no_frames, no_permission, starts, length = ValueError, PermissionError, str.startswith, len

    def inside(path, relative_to) -> bool:
        if kind_of(path) is number:
            return True  # a file descriptor: the file was opened before
        path = path_of(path)
        if kind_of(path) not in texts:
            return False
        if kind_of(path) is bytes:
            path = path.decode("utf-8", "surrogateescape")
        if not starts(path, "/"):
            base = (
                link(f"/proc/self/fd/{relative_to}") if kind_of(relative_to) is number and relative_to >= 0 else here()
            )
            path = f"{base}/{path}"
        parts: list = []
        for part in path.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        whole = "/" + "/".join(parts)
        return whole == allowed[1] or whole == folder or starts(whole, folder + "/")

    def hook(event: str, arguments: tuple) -> None:
        if not refusing and thread() == judge:
            return
        if event == "sys._getframe" or (event == "object.__getattr__" and arguments[1] in frames):
            raise no_frames("there are no frames in the sandbox")
        if starts(event, refused):
            raise no_permission(f"{event} is refused in the sandbox")
        if event == "open":
            path, _, flags = arguments
            if flags & writes and not inside(path, -1):
                raise no_permission("nothing can be written outside of the sandbox's folder")
        elif event in changes:
            for place, relative in changes[event]:
                relative_to = arguments[relative] if relative is not None and relative < length(arguments) else -1
                if not inside(arguments[place], relative_to):
                    raise no_permission("nothing can be changed outside of the sandbox's folder")

    return hook


if __name__ == "__main__":
    serve()
