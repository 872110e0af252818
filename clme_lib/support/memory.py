"""Memory: peaks (the allocator's high-water mark on CUDA, the resident set's on CPU with Linux), what is in use, what is free."""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path

import psutil
import torch

_SYMPTOMS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Elsewhere the mark covers the whole process.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """High-water mark since the last reset; NaN if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    except (OSError, IndexError):  # not Linux
        return float("nan")


def memory_in_use_mib(device: torch.device) -> float:
    """The memory in use: by tensors on CUDA, the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def free_memory_bytes(device: torch.device) -> float:
    """The memory that can still be allocated on the device; on a CPU, limits of this process or its container are ignored."""
    return float(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def release_memory(device: torch.device) -> None:
    """Release the memory of an abandoned computation."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(symptom in str(error) for symptom in _SYMPTOMS)
    )
