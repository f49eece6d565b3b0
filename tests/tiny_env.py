"""A tiny environment with injected faults for the tests of the pool, alone in its file: workers import nothing more."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from envs.base import ChunkResult, EnvObservation, EnvSpec, Snapshot

HORIZON = 12


class TinyEnv:
    """A chaotic map with noise: any lost, repeated or reordered step shows in every later number."""

    def __init__(self, fault: str = "", flag: str = "") -> None:
        self.spec = EnvSpec("Tiny", ("eye",), 4, action_dim=3, state_dim=2, control_hz=20.0, horizon=HORIZON)
        self._fault, self._flag = fault, flag
        if fault == "build":
            raise OSError("no scene file")

    def reset(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._x = self._rng.uniform(0.2, 0.8, 2)
        self._t = 0

    def observe(self) -> EnvObservation:
        image = np.full((4, 4, 3), int(self._x[0] * 255), np.uint8)
        return EnvObservation({"eye": image}, self._x.astype(np.float32), "hold still")

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        steps = 0
        for action in actions:
            if self._t >= HORIZON:
                break
            self._x = (
                3.9 * self._x * (1 - self._x) + 0.01 * np.tanh(action[:2]) + 1e-3 * self._rng.normal(size=2)
            ) % 1.0
            self._t += 1
            steps += 1
        if self._t == 8:
            self._misbehave()
        success = bool(self._x[1] > 0.97)
        return ChunkResult(steps, success, success or self._t >= HORIZON)

    def _misbehave(self) -> None:
        if self._flag:  # only the first to get here, in any process
            try:
                open(self._flag, "x").close()
            except FileExistsError:
                return
        if self._fault == "raise":
            raise RuntimeError("the solver\ndiverged")
        if self._fault == "value":
            raise ValueError("a bad request")
        if self._fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "hang":
            time.sleep(1000)

    def snapshot(self) -> Snapshot:
        return Snapshot("Tiny", self._x.copy(), {"t": self._t, "rng": self._rng.bit_generator.state})

    def restore(self, snapshot: Snapshot) -> None:
        self._x, self._t = snapshot.physics.copy(), snapshot.extra["t"]
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = snapshot.extra["rng"]

    def render(self, camera: str, size: int) -> np.ndarray:
        return np.full((size, size, 3), int(self._x[1] * 255), np.uint8)

    def close(self) -> None:
        pass


class FleetingEnv(TinyEnv):
    """Succeeds often, and for a single step: the check need not hold any more when the chunk would have ended."""

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        steps = 0
        for action in actions:
            if super().step_chunk(action[None]).steps == 0:
                break
            steps += 1
            if self._x[1] > 0.85:
                return ChunkResult(steps, True, True)
        return ChunkResult(steps, False, self._t >= HORIZON)
