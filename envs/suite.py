"""The interface of a suite of environments: its tasks, how to build them, and the facts that results depend on.

Each suite has a folder of its own, `envs/NAME/suite.py`. Code outside never depends on which suite it is. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from envs.base import Env, EnvSpec, Episode, copies
from envs.contract import ContractError, check_observation, check_result, check_spec
from envs.demos import Demonstrator, Expert

_LOOKS = 8  # a tokenizer learns the words of so many episodes, if the environment does not list its instructions


class SettingError(ValueError):
    """A setting that a suite refuses; `key` is its name in the config."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


@runtime_checkable
class Suite(Protocol):
    """Made once a run, from the sections `env` and `eval` of its config.

    It may also have `shares = True`, if snapshots cost little beside a chunk: then the environments of a worker take
    turns in one simulator for each task. And `renderer_bytes`, if it draws by OpenGL: what the renderer of one
    simulator takes of a card's memory.
    """

    name: str
    tasks: tuple[str, ...]  # every name that there is
    sets: Mapping[str, tuple[str, ...]]  # named sets of tasks
    own_keys: tuple[str, ...]  # keys of the config without effect in suites that do not list them
    action_dim: int
    state_dim: int
    control_hz: float
    branches: bool  # environments can be copied exactly: snapshots restore to the bit
    label: str  # a caveat that is printed beside every figure; empty for most suites
    instructions: tuple[str, ...]  # words that a tokenizer made for this suite must know, besides the kitchen's

    def settle(self, task: str) -> dict[str, Any]:
        """Values for keys of `env` that only the machine can tell, such as an installed version."""

    def check(self, task: str) -> None:
        """Raises SettingError for settings that the suite does not have."""

    def make_env(self, task: str) -> Callable[[], Env]:
        """The function that a worker calls to build one environment; picklable, importable in a fresh interpreter."""

    def horizon(self, task: str) -> int:
        """Control steps of an episode."""

    def episode(self, task: str, seed: int) -> Episode:
        """The episode of a seed. Seeds from `eval.first_seed` on are those of evaluations."""

    def demonstrator(self, task: str) -> Demonstrator | None:
        """The demonstrator of the task; None if there is none."""

    def facts(self, task: str) -> dict[str, Any]:
        """The facts that success depends on, as JSON values, for the protocol of a result."""

    def other_names(self, task: str) -> tuple[str, ...]:
        """Other names of the same task, in datasets or other versions."""

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest state, for a policy that has seen no data; None if there are demonstrations."""


def check_names(key: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuses names that are not known. Raises SettingError."""
    if not given:
        raise SettingError(key, f"got nothing, expected one or more of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise SettingError(key, f"{name!r} does not exist; known: {', '.join(known)}")


class SingleEnv:
    """The suite of a user's own environment: a factory of `envs.base.Env`.

    The factory may have attributes: `expert`, a callable that takes the environment and returns an object with `act()`;
    `noise_profile`, how much of the demonstrations' noise each action takes (default: all); `instructions`, every
    instruction that an episode may have (default: those of the first episodes).
    """

    sets: Mapping[str, tuple[str, ...]] = {}
    own_keys: tuple[str, ...] = ()

    def __init__(self, factory: Callable[[], Env], name: str, expert: Callable[[Any], Expert] | None = None):
        """Builds one environment, and looks at its spec, its first episodes and a step.

        Args:
            expert: in place of the factory's.

        Raises:
            SettingError: the factory fails, or its environment breaks the interface.
        """
        self.name, self._factory = name, factory
        self._expert = expert or getattr(factory, "expert", None)
        try:
            self._spec, words, self.branches = _tried(factory)
        except Exception as error:  # noqa: BLE001 - it is the user's code: anything can be wrong in it
            text = " ".join(
                (str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}").split()
            )
            raise SettingError("env.suite", f"{name} failed: {text}") from error
        spec = self._spec
        self.tasks: tuple[str, ...] = (spec.task,)
        self.instructions: tuple[str, ...] = tuple(getattr(factory, "instructions", words))
        self.action_dim, self.state_dim, self.control_hz = spec.action_dim, spec.state_dim, spec.control_hz
        self.label = spec.label

    def settle(self, task: str) -> dict[str, Any]:
        return {"cameras": self._spec.cameras, "image_size": self._spec.image_size, "horizon": self._spec.horizon}

    def check(self, task: str) -> None:
        check_names("task", [task], self.tasks)

    def make_env(self, task: str) -> Callable[[], Env]:
        self.check(task)
        return self._factory

    def horizon(self, task: str) -> int:
        return self._spec.horizon

    def episode(self, task: str, seed: int) -> Episode:
        return Episode(seed, task)

    def demonstrator(self, task: str) -> Demonstrator | None:
        if self._expert is None:
            return None
        profile = getattr(self._factory, "noise_profile", (1.0,) * self.action_dim)
        return Demonstrator(self._factory, self._expert, tuple(profile))

    def facts(self, task: str) -> dict[str, Any]:
        return {"horizon": self._spec.horizon, "environment": self._spec.version or "no version"}

    def other_names(self, task: str) -> tuple[str, ...]:
        return ()

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None


def _tried(factory: Callable[[], Env]) -> tuple[EnvSpec, tuple[str, ...], bool]:
    """Tries an environment: returns its spec, the words of its first episodes, and whether it can be copied.

    Raises:
        ContractError: it breaks the interface of `envs.base.Env`.
    """
    env = factory()
    try:
        spec = check_spec(env.spec)
        looks = []
        for seed in (0, *range(_LOOKS)):
            env.reset(Episode(seed, spec.task))
            looks.append(check_observation(env.observe(), spec))
        first, again = looks[0], looks[1]
        same = all(np.array_equal(first.images[camera], again.images[camera]) for camera in spec.cameras)
        if not same or not np.array_equal(first.state, again.state) or first.instruction != again.instruction:
            raise ContractError("seed 0 started differently the second time: a start must follow from its seed")
        check_result(env.step_chunk(np.zeros((1, spec.action_dim))), 1, spec.horizon)
    finally:
        env.close()
    return spec, tuple(dict.fromkeys(look.instruction for look in looks)), copies(env)
