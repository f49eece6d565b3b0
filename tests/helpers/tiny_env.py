"""A tiny environment with injected faults for the tests of the pool, alone in its file: workers import nothing more."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable

import numpy as np

from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, Snapshot

HORIZON = 12


class TinyEnv:
    """A chaotic map with noise: any lost, repeated or reordered step shows in every later number."""

    def __init__(self, fault: str = "", flag: str = "") -> None:
        self.spec = EnvSpec("Tiny", ("eye",), 4, action_dim=3, state_dim=2, control_hz=20.0, horizon=HORIZON)
        self._fault, self._flag = fault, flag
        if fault == "build":
            raise OSError("no scene file")

    def reset(self, episode: Episode) -> None:
        self._rng = np.random.default_rng(episode.seed)
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


class TinyExpert:
    """Its actions follow from the environment's state."""

    def __init__(self, env: TinyEnv) -> None:
        self._env = env

    def act(self) -> np.ndarray:
        return np.array([*self._env._x, 0.1 * self._env._t])


def die_once(flag: str) -> TinyEnv:
    """An environment whose first process dies while it builds it."""
    env = TinyEnv("die", flag)
    if not os.path.exists(flag):
        env._misbehave()
    return env


class FragileEnv(TinyEnv):
    """Misbehaves after its eighth step in episodes of odd seeds, or where it begins them.

    Args:
        fault: as of `TinyEnv`, or stop; folder: notes each time; times: so often in all processes.
        again: it is the second beginning of an episode and those after it that fail, as if the state were lost.
    """

    def __init__(self, fault: str, folder: str, times: int = 10**6, again: bool = False) -> None:
        super().__init__()
        self._kind, self._folder, self._times, self._again = fault, folder, times, again

    def reset(self, episode: Episode) -> None:
        super().reset(episode)
        self._odd = bool(episode.seed % 2)
        if self._again and self._odd and self._note("begun") > 1:
            self._break()

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        result = super().step_chunk(actions)
        result = dataclasses.replace(result, success=False, done=self._t >= HORIZON)
        if self._t == 8 and self._odd and not self._again:
            self._break()
        return result

    def snapshot(self) -> Snapshot:
        taken = super().snapshot()
        return dataclasses.replace(taken, extra={**taken.extra, "odd": self._odd})

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._odd = snapshot.extra["odd"]

    def _break(self) -> None:
        if self._note("broken") <= self._times:
            self._fault, self._flag = self._kind, ""
            self._misbehave()

    def _note(self, what: str) -> int:
        """How often it happened by now."""
        with open(os.path.join(self._folder, what), "a+") as file:
            file.write("x")
            file.flush()
            return file.tell()


def stopped(folder: str, times: int) -> TinyEnv:
    """An environment whose first processes, so many, stop while they build it."""
    if FragileEnv("", folder)._note("built") <= times:
        os.kill(os.getpid(), signal.SIGSTOP)
    return TinyEnv()


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


def _seen(**changes: object) -> Callable[[EnvObservation], object]:
    return lambda seen: dataclasses.replace(seen, **{k: f(seen) for k, f in changes.items()})


def _image(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[EnvObservation], object]:
    return _seen(images=lambda seen: {"eye": change(seen.images["eye"])})


def _result(**values: object) -> Callable[[ChunkResult], object]:
    return lambda result: dataclasses.replace(result, **values)


NAN = float("nan")
# What is wrong -> what becomes of the observation, or of the result of a chunk that is not the episode's last.
BROKEN: dict[str, Callable] = {
    "no observation": lambda seen: None,
    "images are a list": _seen(images=lambda seen: list(seen.images.values())),
    "missing camera": _seen(images=lambda seen: {}),
    "extra camera": _seen(images=lambda seen: {**seen.images, "hand": seen.images["eye"]}),
    "small image": _image(lambda image: image[:3]),
    "grey image": _image(lambda image: image[..., 0]),
    "float image": _image(lambda image: image / np.float32(255)),
    "NaN state": _seen(state=lambda seen: np.array([seen.state[0], NAN], np.float32)),
    "infinite state": _seen(state=lambda seen: np.array([-np.inf, 0], np.float32)),
    "wide state": _seen(state=lambda seen: np.append(seen.state, np.float32(0))),
    "double state": _seen(state=lambda seen: seen.state.astype(np.float64)),
    "state is a list": _seen(state=lambda seen: seen.state.tolist()),
    "no instruction": _seen(instruction=lambda seen: None),
    "no result": lambda result: None,
    "NaN steps": _result(steps=NAN),
    "negative steps": _result(steps=-1),
    "too many steps": lambda result: dataclasses.replace(result, steps=result.steps + 1),
    "too few steps": lambda result: dataclasses.replace(result, steps=result.steps - 1),
    "success None": _result(success=None),
    "success 1": _result(success=1.0),
    "done None": _result(done=None),
    "success that goes on": _result(success=True),
    "NaN seconds": _result(simulate_s=NAN),
}
_OF_RESULTS = list(BROKEN)[list(BROKEN).index("no result") :]
_OF_OBSERVATIONS = BROKEN.keys() - set(_OF_RESULTS)


class BrokenEnv(TinyEnv):
    """Never succeeds, and breaks the interface in one way (a key of BROKEN, "frame" or "snapshot") from a step on."""

    def __init__(self, kind: str, since: int = 1) -> None:
        super().__init__()
        self._kind, self._since = kind, since

    def observe(self) -> object:
        seen = super().observe()
        broken = self._kind in _OF_OBSERVATIONS and self._t >= self._since
        return BROKEN[self._kind](seen) if broken else seen

    def step_chunk(self, actions: np.ndarray) -> object:
        result = dataclasses.replace(super().step_chunk(actions), success=False, done=self._t >= HORIZON)
        return BROKEN[self._kind](result) if self._kind in _OF_RESULTS else result

    def snapshot(self) -> object:
        return None if self._kind == "snapshot" else super().snapshot()

    def render(self, camera: str, size: int) -> object:
        return None if self._kind == "frame" else super().render(camera, size)
