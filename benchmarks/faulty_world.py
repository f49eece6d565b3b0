"""examples/reach.py's world with faults, each once in any process: what `survival.py` trains in.

A fault is a line of the file that Z1_FAULTS names: KIND CALLS FLAG. `die`, `stop`, `hang`, `raise` and `pages` happen
at a worker's call number CALLS of `step_chunk` in rollouts, with `demos-` before them in demonstrations, and with
`build-` while an environment is built; the file FLAG is there from then on. `state` happens whenever the episode of
seed CALLS is stepped. Episodes begin close to the square: after little training some succeed, so that GRPO learns.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
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
        self._faults = [(kind, int(calls), pathlib.Path(flag)) for kind, calls, flag in rows]
        self._calls = {"build-": 0, "demos-": 0, "": 0}
        if sys.argv[:1] == ["-c"]:  # in a worker: the command itself builds one too, to look at it
            self._happen("build-")

    def reset(self, episode: Episode) -> None:
        super().reset(episode)
        self.dot, self.seed = self.square + 0.3 * self.dot, episode.seed

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        for kind, seed, flag in self._faults:
            if kind == "state" and seed == self.seed:
                flag.touch()
                misbehave("raise")
        self._happen("demos-" if len(actions) == 1 else "")  # an expert takes one step at a time
        return super().step_chunk(actions)

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        for own in ("_faults", "_calls"):
            del snapshot.extra[own]
        return snapshot

    def _happen(self, where: str) -> None:
        self._calls[where] += 1
        for kind, calls, flag in self._faults:
            mine = kind.startswith(where) if where else "-" not in kind and kind != "state"
            if mine and self._calls[where] >= calls:
                try:
                    flag.touch(exist_ok=False)
                except FileExistsError:
                    continue
                misbehave(kind.removeprefix(where))


def misbehave(kind: str) -> None:
    """One fault: die, stop, hang, raise, pages."""
    if kind in ("die", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "die" else signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(1e6)
    else:
        raise RuntimeError(PAGES if kind == "pages" else "the solver diverged")
