"""The actor's side of Ray workers: it serves the slots of a pool's worker on whatever host Ray has put it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

from envs.worker import HOME, Request, SlotServer

_ALIKE = ("numpy", "mujoco")  # packages whose version decides about numbers


def actor_class() -> type:
    """The class of the actors. Made in a function, so that Ray sends its code: it can say that `envs` is missing."""

    class Simulators:
        def __init__(self, path: list[str], packed: bytes, title: str) -> None:
            import os
            import sys

            import ray

            self._title, self._server = title, None
            sys.path[:0] = [entry for entry in path if entry not in sys.path and os.path.isdir(entry)]
            node = ray.get_runtime_context().get_node_id()
            host = f"{os.uname().nodename} (node {node[:8]})"
            self._facts = {"host": host, "node": node, "pid": os.getpid(), "error": ""}
            try:
                from envs.ray_actor import facts, opened

                self._facts |= facts()
                self._server = opened(packed)
            except Exception as error:  # noqa: BLE001 - what is missing here is the learner's to report
                self._facts["error"] = f"{type(error).__name__}: {error}"

        def hello(self) -> dict:
            return self._facts

        def serve(self, request: tuple) -> Any:
            if self._server is None:
                return None
            if request[0] == "make":
                from envs.ray_actor import environments

                print(f"{self._title} on {self._facts['host']}: {environments(request)}", file=sys.stderr, flush=True)
            return self._server.serve(request)

        def close(self) -> None:
            if self._server is not None:
                self._server.close()

        def __repr__(self) -> str:  # in Ray's log lines
            return self._title

    return Simulators


def opened(packed: bytes) -> SlotServer:
    """The slots' server of pickled factories."""
    from ray import cloudpickle

    return SlotServer(*cloudpickle.loads(packed))


def environments(request: Request) -> str:
    """The slots of a request to build, by their tasks."""
    slots: dict[str, list[int]] = {}
    for slot, task in request[1]:
        slots.setdefault(task, []).append(slot)
    return "; ".join(f"{numbered('slot', numbers)} {task}".rstrip() for task, numbers in slots.items())


@functools.cache
def facts() -> dict[str, str]:
    """What must be equal here and at the learner for equal numbers."""
    digest = hashlib.sha256()
    root = pathlib.Path(HOME) / "envs"
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "machine": platform.machine()}
    for name in _ALIKE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"code of envs": digest.hexdigest()[:12]}


def numbered(noun: str, indices: Sequence[int]) -> str:
    """E.g. "simulators 0, 1, 5"."""
    return f"{noun}{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
