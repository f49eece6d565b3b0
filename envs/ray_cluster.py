"""How this process comes into a Ray cluster: joins one, or starts one of its own; each failure is a line in time."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from envs.base import PoolError
from envs.text import shortened

RESOURCE = "simulator"  # what hosts offer for actors
CONNECT_S = 30.0  # longest that a cluster may take to answer at all
START_S = 60.0  # longest that one of our own may take to start
HEAD_EVERY_S = 2.0  # between two looks at a cluster's head
HEAD_GONE_S = 10.0  # of silence, after which it is taken for gone
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

_log = logging.getLogger(__name__)


class Told(NamedTuple):
    """What came of trying to join a cluster."""

    text: str  # why it cannot be joined, one line; empty: it can
    units: float = 0.0  # of the resource, on all its nodes


def refusal(address: str) -> Told:
    """Tries to join a cluster, in a process of its own: Ray would wait minutes for a silent one, then end the process.

    Args:
        address: HOST:PORT, or "auto".
    """
    where = "on this machine" if address == "auto" else f"at {address}"
    if unreachable := _unreachable(address):
        return Told(f"no Ray cluster {where}: {unreachable}")
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
    if kind == "ConnectionError" and address == "auto":
        text = "none is running; start one with ray start --head"
    return Told(f"cannot join the Ray cluster {where}: {shortened(text, 400)}")


def _unreachable(address: str) -> str:
    """What this machine knows at once of an address where nothing can be; empty: it has to be tried."""
    host, _, port = address.rpartition(":")
    if host in ("", "localhost", "127.0.0.1"):  # Ray takes another address of this machine for these
        return ""
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except OSError as error:
        return str(error.strerror or error)
    return ""


_HOLDER = f"""
import sys
import ray
ray.init(address="local", logging_level="error", log_to_driver=False,
         resources={{"{RESOURCE}": int(sys.argv[1])}}, object_store_memory=int(sys.argv[2]))
print("told:", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


class OwnCluster:
    """A cluster of this machine alone, held by a process of its own: Ray forks, which a process with XLA must not.

    It ends with `close`, and when this process ends, however that comes.

    Raises:
        PoolError: it did not start.
    """

    def __init__(self, units: int) -> None:
        _share_secret()
        environment = {"RAY_USAGE_STATS_ENABLED": "0"} | os.environ
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _HOLDER, str(units), str(_STORE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # an interrupt is this process's to handle
            )
            told = self._told()
            if not told:
                self.close()
                errors.seek(0)
                raise PoolError(
                    f"Ray did not start on this machine within {START_S:g} s: {shortened(errors.read(), 400)}"
                )
        self.address = told.removeprefix("told: ").strip()

    def _told(self) -> str:
        """The holder's line; empty: it ended, or took too long."""
        assert self._process.stdout is not None
        late = threading.Timer(START_S, self._process.kill)
        late.start()
        try:
            return next((line for line in self._process.stdout if line.startswith("told: ")), "")
        finally:
            late.cancel()

    def close(self) -> None:
        """Ends it. Closing twice is harmless."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _share_secret() -> None:
    """A token that other users of the machine do not have, for this process and what it starts.

    Ray makes one by itself in a cluster like this one, and would leave it in the home directory.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    with contextlib.suppress(ImportError, AttributeError):  # Ray before 2.52 has no tokens
        importlib.import_module("ray._raylet").Config.initialize("")  # it read the environment when it was imported


def connect(ray: Any, address: str, units: int) -> Callable[[], None]:
    """Brings this process into the cluster at an address; empty: RAY_ADDRESS, else one of `units` units of its own.

    Returns:
        What leaves it again. Who was in a cluster before stays there.

    Raises:
        PoolError: there is none, or it cannot be joined.
    """
    if ray.is_initialized():
        return lambda: None
    address = address or os.environ.get("RAY_ADDRESS", "")
    with contextlib.ExitStack() as stack:
        if not address:
            own = OwnCluster(units)
            stack.callback(own.close)
            address = own.address
        elif told := refusal(address).text:
            raise PoolError(told)
        if not sys.stderr.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        with _own_signals():
            try:
                ray.init(address=address, logging_level="warning")
            except Exception as error:  # noqa: BLE001 - Ray has no class of its own for these
                raise PoolError(f"cannot join the Ray cluster at {address}: {shortened(str(error), 400)}") from error
        stack.callback(ray.shutdown)
        return stack.pop_all().close


class HeadWatch:
    """Looks from time to time, in a thread, whether a cluster's head still listens.

    Without one, Ray ends this process after a minute, in lines of its own.

    Args:
        address: of the head, HOST:PORT.

    Attributes:
        gone: that it is gone and what to do, one line; empty while it is there.
    """

    def __init__(self, address: str) -> None:
        self.gone = ""
        self._address, self._closed = address, threading.Event()
        threading.Thread(target=self._watch, name="the head of the Ray cluster", daemon=True).start()

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()

    def _watch(self) -> None:
        host, _, port = self._address.rpartition(":")
        heard, failed = time.monotonic(), 0
        while not self.gone and not self._closed.wait(HEAD_EVERY_S):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_EVERY_S).close()
                heard, failed = time.monotonic(), 0
            except OSError as error:
                failed += 1  # one alone may come of this process having stood still
                if failed > 2 and time.monotonic() > heard + HEAD_GONE_S:
                    self.gone = (
                        f"the head of the Ray cluster at {self._address} is gone ({error.strerror or error}): start "
                        "Ray again, then the same command continues"
                    )
                    _log.warning(self.gone)  # the process may be busy with something else until Ray ends it


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts back the handlers of signals, which Ray replaces: a stop is this process's to handle."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
