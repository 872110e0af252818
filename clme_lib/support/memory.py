"""Memory: peaks (the allocator's high-water mark on CUDA, the resident set's on CPU with Linux), what is in use, what is free."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_GROUPS = Path("/sys/fs/cgroup")
_LEFT_TO_OTHERS = 0.05  # of the free memory
_SYMPTOMS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Elsewhere the mark covers the whole process.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """High-water mark since the last reset; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    except (OSError, IndexError):  # not Linux
        return float("nan")


def memory_in_use_mib(device: torch.device) -> float:
    """What is allocated now: by tensors on CUDA, the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def free_memory_bytes(device: torch.device) -> float:
    """What may still be allocated: by the device, on a CPU also by the limits of this process (``ulimit``) and its group."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [psutil.virtual_memory().available, _free_in_group()]
    if psutil.LINUX:
        process = psutil.Process()
        used = process.memory_info()
        for resource, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
            limit = process.rlimit(resource)[0]
            free.append(float("inf") if limit == psutil.RLIM_INFINITY else limit - taken)
    return float(min(free))


@contextlib.contextmanager
def raising_when_full(device: torch.device) -> Iterator[None]:
    """On a CPU with Linux, asking for more memory than is free raises inside the block, as it does on a GPU.

    Without this the system grants the memory, and ends the process when it is used.
    """
    if device.type == "cuda" or not psutil.LINUX:
        yield
        return
    process = psutil.Process()
    soft, hard = process.rlimit(psutil.RLIMIT_DATA)
    bound = process.memory_info().data + (1 - _LEFT_TO_OTHERS) * free_memory_bytes(device)
    process.rlimit(psutil.RLIMIT_DATA, (int(bound), hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_DATA, (soft, hard))


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
    group = group if group.is_dir() else root  # Inside a container the group itself is the root.
    try:
        bound, taken = float((group / limit).read_text()), float((group / used).read_text())
        cached = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):  # There is no such controller, or no limit ("max").
        return float("inf")
    # Cached files count as used, but the system gives their memory up when it is needed.
    return bound - taken + sum(float(size) for name, size in cached if name == "inactive_file")
