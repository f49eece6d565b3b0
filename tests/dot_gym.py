"""A small environment of gymnasium for tests: a dot on a line is to be moved to its end. Workers import this file."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium
import numpy as np


class Dot(gymnasium.Env):
    """Wide pictures, actions with bounds of their own, a nested observation, and success in a nested info."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, render_mode: str | None = None, flag: str = "", drifts: bool = False):
        self.render_mode, self._flag, self._drifts = render_mode, flag, drifts
        self.action_space = gymnasium.spaces.Box(np.array([0.0, -4.0], "f"), np.array([2.0, 4.0], "f"))
        self.observation_space = gymnasium.spaces.Dict()
        self.taken: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        super().reset(seed=None if self._drifts else seed)
        self.place, self.steps = float(self.np_random.uniform(0, 2)), 0
        return self._look()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.taken.append(action)
        self.steps += 1
        if self._flag and self.steps == 3:
            try:
                open(self._flag, "x").close()  # only the first process that gets here
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        self.place += float(action[0]) + 0.01 * float(self.np_random.normal())
        return *self._look()[:1], 0.0, self.place < -9, False, self._look()[1]

    def _look(self) -> tuple[dict, dict]:
        seen = {"agent": {"place": np.array([self.place, self.steps])}, "words": "move on"}
        return seen, {"task": {"solved": np.bool_(self.place > 10)}}

    def render(self) -> np.ndarray:
        picture = np.zeros((10, 20, 3), np.uint8)
        picture[:, : min(20, max(1, int(self.place))), 0] = 200
        return picture


class Push:
    """An expert that moves on as fast as may be."""

    def __init__(self, env: Any):
        self.env = env

    def act(self) -> np.ndarray:
        return np.array([1.0, 0.0])


for name, kwargs in {"Dot": {}, "Drifts": {"drifts": True}}.items():
    gymnasium.register(
        f"tests/{name}-v0", entry_point=Dot, max_episode_steps=12, disable_env_checker=True, kwargs=kwargs
    )
