"""The one loop in which environments step: until success, the horizon, or physics that breaks down."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from envs.base import ChunkResult, EnvSpec, checked_actions


class SteppedEnv:
    """An environment that steps MuJoCo: counts control steps, latches success, ends episodes that break down.

    A subclass sets `_spec`, begins episodes with `_begin_count` and says in `_control_step` what one step does.
    """

    _spec: EnvSpec
    _steps, _succeeded, _broken = 0, False, ""

    @property
    def spec(self) -> EnvSpec:
        """The environment's constants."""
        return self._spec

    @property
    def steps(self) -> int:
        """Control steps executed in this episode."""
        return self._steps

    @property
    def success(self) -> bool:
        """Whether the task's check has held at some step of this episode."""
        return self._succeeded

    @property
    def broken(self) -> str:
        """What was reported when this episode's simulation broke down; empty where it did not."""
        return self._broken

    @property
    def done(self) -> bool:
        """Whether the episode has ended: in success, at the horizon, or because the simulation broke down."""
        return self._succeeded or bool(self._broken) or self._steps >= self.spec.horizon

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions [E, action_dim] in [-1, 1] (clipped), checking success after every control step.

        A control step in which physics breaks down ends the episode as a failure, `unstable`.

        Raises:
          ValueError: a wrong shape, a value that is not finite, or no episode yet.
        """
        actions = checked_actions(actions, self.spec.action_dim)
        executed, started = 0, time.perf_counter()
        with self._stepping():
            for action in np.clip(actions, -1.0, 1.0):
                if self.done:
                    break
                self._broken, success = self._control_step(action)
                self._succeeded = success and not self._broken
                self._steps += 1
                executed += 1
        spent = time.perf_counter() - started
        return ChunkResult(executed, self._succeeded, self.done, spent, unstable=bool(self._broken))

    def _begin_count(self) -> None:
        self._steps, self._succeeded, self._broken = 0, False, ""

    def _count(self) -> dict[str, object]:
        """The counters and latches for a snapshot."""
        return {"steps": self._steps, "succeeded": self._succeeded, "broken": self._broken}

    def _set_count(self, extra: dict) -> None:
        self._steps, self._succeeded, self._broken = extra["steps"], extra["succeeded"], extra["broken"]

    def _stepping(self) -> contextlib.AbstractContextManager:
        """A context that is active while a chunk is executed."""
        return contextlib.nullcontext()

    def _control_step(self, action: np.ndarray) -> tuple[str, bool]:
        """One control step. Returns what broke down (empty if nothing did), and whether the task's check holds."""
        raise NotImplementedError
