"""How this process comes into a Ray cluster: joins one, or starts one of its own; each failure is a line in time."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any

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


_PROBE = """
import sys
import ray
try:
    ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
except BaseException as error:
    print("no:", type(error).__name__, *str(error).split())
else:
    print("yes")
"""


def _refusal(address: str) -> str:
    """Why this process cannot join a cluster; empty where it can.

    Another process tries first: Ray would wait minutes for a cluster that does not answer, and then end this one.
    """
    command = [sys.executable, "-c", _PROBE, address]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {CONNECT_S:g} s"
    told = [line for line in ended.stdout.splitlines() if line.startswith(("yes", "no:"))]
    if told and told[-1] == "yes":
        return ""
    return shortened(told[-1].removeprefix("no: ") if told else ended.stderr or "it ended without a word", 600)


def connect(ray: Any, address: str, units: int) -> bool:
    """Joins a cluster, or starts one of `units` units here. Returns whether this process was in none before."""
    if ray.is_initialized():
        return False
    refusal = _refusal(address or "auto")
    if refusal and (address or not refusal.startswith("ConnectionError")):
        where = "on this machine" if address in ("", "auto") else f"at {address}"
        hint = f"expected one that ray start began, of Ray {ray.__version__}, with this machine among its nodes"
        raise PoolError(f"cannot join a Ray cluster {where}: {refusal}; {hint}")
    options: dict[str, Any] = {"address": address or "auto"}
    if refusal:  # none is here, and none was asked for
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
