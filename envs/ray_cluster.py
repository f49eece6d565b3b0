"""How this process comes into a Ray cluster: joins one, or starts one of its own; each failure is a line in time."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from envs.pool import PoolError
from envs.text import shortened

RESOURCE = "simulator"  # what hosts offer for actors
CONNECT_S = 30.0  # longest that a cluster may take to answer at all
_STORE = 512 * 2**20  # bytes of the object store of a Ray of our own


def ray_module() -> Any:
    """Ray.

    Raises:
        ModuleNotFoundError: it is not installed; the text names the extra.
    """
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Ray is not installed: pip install 'z1-jax[ray]'", name="ray") from error


_PROBE = f"""
import sys, json
import ray
try:
    ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
    print("told:", json.dumps(["", "", ray.cluster_resources().get("{RESOURCE}", 0.0)]))
except BaseException as error:
    print("told:", json.dumps([type(error).__name__, str(error), 0.0]))
"""


class Told(NamedTuple):
    """What came of trying to join a cluster."""

    text: str  # why it cannot be joined, one line; empty: it can
    units: float = 0.0  # of the resource, on all its nodes
    absent: bool = False  # there is none


def refusal(address: str) -> Told:
    """Tries to join a cluster, in a process of its own: Ray would wait minutes for a silent one, then end the process.

    Args:
        address: HOST:PORT, or "auto".
    """
    where = "on this machine" if address == "auto" else f"at {address}"
    command = [sys.executable, "-c", _PROBE, address]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S)
    except subprocess.TimeoutExpired:
        return Told(f"no Ray cluster {where} answered within {CONNECT_S:g} s: is it up, and not behind a firewall?")
    lines = [line for line in ended.stdout.splitlines() if line.startswith("told: ")]
    if not lines:
        return Told(f"trying to join the Ray cluster {where} failed: {shortened(ended.stderr, 400)}")
    kind, text, units = json.loads(lines[-1].removeprefix("told: "))
    if not kind:
        return Told("", units)
    absent = kind == "ConnectionError" and address == "auto"
    text = "none is running" if absent else shortened(text, 400)
    return Told(f"cannot join the Ray cluster {where}: {text}", absent=absent)


def connect(ray: Any, address: str, units: int) -> bool:
    """Joins a cluster, or starts one of `units` units here. Returns whether this process was in none before."""
    if ray.is_initialized():
        return False
    told = refusal(address or "auto")
    if told.text and (address or not told.absent):
        raise PoolError(told.text)
    options: dict[str, Any] = {"address": address or "auto"}
    if told.text:  # none is here, and none was asked for
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"address": "local", "resources": {RESOURCE: units}, "object_store_memory": _STORE}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(logging_level="warning", **options)
    except Exception as error:  # noqa: BLE001 - Ray has no class of its own for these
        raise PoolError(f"cannot join or start a Ray cluster: {shortened(str(error), 600)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # a stop is this process's to handle
                signal.signal(number, handler)
    return True
