"""Connecting to a cluster or starting Ray on this machine, and the resources of each worker."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from ...support.errors import StudyError
from ..config import RunConfig


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[Any]:
    """Ray, connected inside the block: to ``ray_address`` or ``$RAY_ADDRESS``, else started on this machine and bound to it alone."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Ray reads this when it is imported: it makes Ray use the loopback interface on any system.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise StudyError('on: Ray is not installed: pip install -c constraints.txt -e ".[cluster]"') from None
    if ray.is_initialized():
        yield ray
        return
    if address:
        _check_reachable(address)
    place: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    for last in (False, True):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **place)
            break
        except Exception as error:  # Ray's own and its transport's
            ray.shutdown()
            # Ray gives a node half a minute to start, which a busy machine may exceed once
            if address or last:
                where = address or "this machine"
                raise StudyError(f"ray_address: no cluster can be reached or started at {where}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise at once if nothing listens at the address, which Ray takes minutes to find out."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>.+):(?P<port>[0-9]+)", address)
    if match is None:
        return  # such as auto, which Ray looks up
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise StudyError(
            f"ray_address: nothing can be reached at {address}: {error}. Start a cluster there (ray start --head), or omit the address"
        ) from error


def resources_of(ray: Any, config: RunConfig) -> dict[str, float]:
    """CPUs and GPUs of a worker, as Ray's options name them."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0 and config.device != "cpu"
    gpus = (1.0 if has_gpus else 0.0) if config.gpus_per_worker == "auto" else float(config.gpus_per_worker)
    return {"num_cpus": config.cpus_per_worker, "num_gpus": gpus}


def room(ray: Any, config: RunConfig) -> int:
    """How many workers there should be: as requested, or as many as fit on the nodes that are alive."""
    if config.workers != "auto":
        return int(config.workers)
    options, workers = resources_of(ray, config), 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [
                has.get(name, 0) // options[key]
                for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
                if options[key]
            ]
            workers += int(min(fits))
    return workers
