"""examples/reach.py's world with faults, each once in any process: what `survival.py` trains in.

A fault is a line of the file that Z1_FAULTS names: KIND CALLS FLAG. It happens at a worker's call number CALLS of
`step_chunk`, or while its environment is built, and the file FLAG is there from then on. Episodes begin close to the
square: a policy of little training succeeds in some, so that GRPO has something to learn from.
"""

from __future__ import annotations

import os
import pathlib
import signal
import time

import numpy as np

from envs.base import ChunkResult, Episode, Snapshot
from examples.reach import Reach

PAGES = "the solver diverged: " + 20_000_000 * "x"  # as a library's that prints its state


class World(Reach):
    """Reach, and what goes wrong in it."""

    def __init__(self) -> None:
        path = os.environ.get("Z1_FAULTS", "")
        rows = [line.split() for line in pathlib.Path(path).read_text().splitlines()] if path else []
        self._faults, self._calls = [(kind, int(calls), flag) for kind, calls, flag in rows], 0
        self._happen("build-")

    def reset(self, episode: Episode) -> None:
        super().reset(episode)
        self.dot = self.square + 0.3 * self.dot

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        self._calls += 1
        self._happen("")
        return super().step_chunk(actions)

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        for own in ("_faults", "_calls"):
            del snapshot.extra[own]
        return snapshot

    def _happen(self, when: str) -> None:
        for kind, calls, flag in self._faults:
            if kind.startswith("build-") != bool(when) or self._calls < calls:
                continue
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            misbehave(kind.removeprefix("build-"))


def misbehave(kind: str) -> None:
    """One fault: die, stop, hang, raise, pages."""
    if kind in ("die", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "die" else signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(1e6)
    else:
        raise RuntimeError(PAGES if kind == "pages" else "the solver diverged")
