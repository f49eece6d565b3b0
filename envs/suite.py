"""What a suite of environments offers to the rest: its tasks, how to build them, and the facts that results depend on.

A suite lives in a folder of its own, `envs/NAME/suite.py`, and nothing outside asks which one it is. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from envs.base import Env, EnvSpec, Episode
from envs.demos import Demonstrator


class SettingError(ValueError):
    """A setting that a suite refuses; `key` is its name in the config."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


@runtime_checkable
class Suite(Protocol):
    """Made once a run, from the sections `env` and `eval` of its config."""

    name: str
    tasks: tuple[str, ...]  # every name that there is
    sets: Mapping[str, tuple[str, ...]]  # named sets of tasks
    own_keys: tuple[str, ...]  # keys of the config that mean something in this suite and in no other by default
    action_dim: int
    state_dim: int
    control_hz: float
    branches: bool  # environments can be copied exactly: snapshots restore to the bit
    label: str  # what must stand beside every figure; empty for most
    instructions: tuple[str, ...]  # words that a tokenizer made for this suite must know, besides the kitchen's

    def settle(self, task: str) -> dict[str, Any]:
        """Keys of `env` as they are from here on: what is found only by looking, such as an installed version."""

    def check(self, task: str) -> None:
        """Refuses what the suite does not have. Raises SettingError."""

    def make_env(self, task: str) -> Callable[[], Env]:
        """What a worker calls to build one environment; picklable, importable in a fresh interpreter."""

    def horizon(self, task: str) -> int:
        """Control steps of an episode."""

    def episode(self, task: str, seed: int) -> Episode:
        """The episode of a seed. Seeds from `eval.first_seed` on are those of evaluations."""

    def demonstrator(self, task: str) -> Demonstrator | None:
        """Who demonstrates the task; None where nobody does."""

    def facts(self, task: str) -> dict[str, Any]:
        """What success depends on, JSON values, for the protocol of a result."""

    def other_names(self, task: str) -> tuple[str, ...]:
        """What else the same task is called, in data or by other versions."""

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest state, for a policy that has seen no data; None where there are demonstrations."""


def check_names(key: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuses names that are not known. Raises SettingError."""
    if not given:
        raise SettingError(key, f"got nothing, expected one or more of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise SettingError(key, f"{name!r} does not exist; known: {', '.join(known)}")


class SingleEnv:
    """The suite of a user's own environment: a factory of `envs.base.Env`, and what it says of itself.

    The factory may carry attributes: `expert`, called with the environment, gives one with `act()`; `noise_profile`
    says how much of the demonstrations' noise each action takes (all of it by default).
    """

    sets: Mapping[str, tuple[str, ...]] = {}
    own_keys: tuple[str, ...] = ()

    def __init__(self, factory: Callable[[], Env], name: str):
        """Builds one environment and looks at its spec and its first episode's words.

        Raises:
            SettingError: the factory fails, or gives no environment.
        """
        self.name, self._factory = name, factory
        try:
            env = factory()
            spec = env.spec
            env.reset(Episode(0))
            words = env.observe().instruction
            env.close()
        except Exception as error:  # noqa: BLE001 - it is the user's code: anything can be wrong in it
            raise SettingError("env.suite", f"{name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(spec, EnvSpec):
            raise SettingError("env.suite", f"{name} gives {type(env).__name__}, expected an envs.base.Env with a spec")
        self._spec = spec
        self.tasks, self.instructions = (spec.task,), (words,)
        self.action_dim, self.state_dim, self.control_hz = spec.action_dim, spec.state_dim, spec.control_hz
        self.label = spec.label
        self.branches = all(callable(getattr(env, name, None)) for name in ("snapshot", "restore"))

    def settle(self, task: str) -> dict[str, Any]:
        return {"cameras": self._spec.cameras, "image_size": self._spec.image_size, "horizon": self._spec.horizon}

    def check(self, task: str) -> None:
        check_names("task", [task], self.tasks)

    def make_env(self, task: str) -> Callable[[], Env]:
        return self._factory

    def horizon(self, task: str) -> int:
        return self._spec.horizon

    def episode(self, task: str, seed: int) -> Episode:
        return Episode(seed, task)

    def demonstrator(self, task: str) -> Demonstrator | None:
        expert = getattr(self._factory, "expert", None)
        if expert is None:
            return None
        profile = getattr(self._factory, "noise_profile", (1.0,) * self.action_dim)
        return Demonstrator(self._factory, expert, tuple(profile))

    def facts(self, task: str) -> dict[str, Any]:
        return {"horizon": self._spec.horizon, "environment": self._spec.version or "no version"}

    def other_names(self, task: str) -> tuple[str, ...]:
        return ()

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None
