"""Memory: peaks (the allocator's high-water mark on CUDA, the resident set's on CPU with Linux), what is in use, what is free."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


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
    free = _kib(Path("/proc/meminfo"), "MemAvailable:")
    return float("inf") if free != free else 1024 * free


def release_memory(device: torch.device) -> None:
    """Give back what an abandoned computation held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _kib(file: Path, field: str) -> float:
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return float("nan")
    return float(line.split()[1])
