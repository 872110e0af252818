"""Memory: peaks (the allocator's high-water mark on CUDA, the resident set's on CPU with Linux), what is in use, what is free."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_GROUPS = Path("/sys/fs/cgroup")
_LEFT_TO_OTHERS = 0.05  # of the free memory
_SYMPTOMS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or not permitted: the mark then covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """High-water mark since the last reset; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _kib(_STATUS, "VmHWM:") / 1024


def memory_in_use_mib(device: torch.device) -> float:
    """What is allocated now: by tensors on CUDA, the resident set on CPU; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _kib(_STATUS, "VmRSS:") / 1024


def free_memory_bytes(device: torch.device) -> float:
    """What may still be allocated; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(
        _or_infinity(1024 * _kib(Path("/proc/meminfo"), "MemAvailable:")),
        _below_limit("RLIMIT_AS", "VmSize:"),
        _below_limit("RLIMIT_DATA", "VmData:"),
        _free_in_group(),
    )


@contextlib.contextmanager
def raising_when_full(device: torch.device) -> Iterator[None]:
    """On a CPU with Linux, asking for more memory than is free raises inside the block, as it does on a GPU.

    Without this the system grants the memory, and ends the process when it is used.
    """
    free = free_memory_bytes(device)
    if device.type == "cuda" or resource is None or free == float("inf"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound = 1024 * _kib(_STATUS, "VmData:") + (1 - _LEFT_TO_OTHERS) * free
    resource.setrlimit(resource.RLIMIT_DATA, (int(bound), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def release_memory(device: torch.device) -> None:
    """Give back what an abandoned computation held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(symptom in str(error) for symptom in _SYMPTOMS)
    )


def _kib(file: Path, field: str) -> float:
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return float("nan")
    return float(line.split()[1])


def _or_infinity(value: float) -> float:
    return float("inf") if value != value else value


def _below_limit(name: str, used: str) -> float:
    """What a limit of this process (``ulimit``) leaves."""
    limit = resource.getrlimit(getattr(resource, name))[0] if resource else -1
    unlimited = limit in (-1, getattr(resource, "RLIM_INFINITY", -1))
    return float("inf") if unlimited else _or_infinity(limit - 1024 * _kib(_STATUS, used))


def _free_in_group() -> float:
    """What the memory limit of this process's control group (a container, a batch system's job) leaves."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return float("inf")
    free = [float("inf")]
    for _, controllers, path in lines:
        if controllers == "":
            free.append(_free_in(_GROUPS, path, "memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            free.append(_free_in(_GROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return min(free)


def _free_in(root: Path, path: str, limit: str, used: str) -> float:
    group = root / path.lstrip("/")
    group = group if group.is_dir() else root  # inside a container the group itself is the root
    try:
        bound, taken = float((group / limit).read_text()), float((group / used).read_text())
        cached = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):  # no such controller, or no limit ("max")
        return float("inf")
    # files that were read count as used, and are given up when memory is asked for
    return bound - taken + sum(float(size) for name, size in cached if name == "inactive_file")
