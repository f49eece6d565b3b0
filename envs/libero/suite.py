"""LIBERO as a suite (see envs.suite): `env.suite=envs.libero.suite:LiberoSuite`, or `:RLinf` or `:LeRobot`.

The three differ in the protocol alone: what is evaluated, and how long episodes are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from envs import libero
from envs.base import Env, Episode
from envs.demos import Demonstrator
from envs.libero import compat, protocols, tables
from envs.suite import SettingError, check_names

_T = TypeVar("_T")
_EXPERTS = ("libero_object", "libero_spatial", "libero_goal")
# Full noise on the position; less where a unit is half a radian; none on the gripper, which only opens or closes.
NOISE_PROFILE = (1.0,) * 3 + (0.3,) * 3 + (0.0,)


class LiberoSuite:
    """The tasks of LIBERO and LIBERO-PRO as `SUITE/NAME`, under openpi's protocol."""

    name, protocol = "libero", protocols.PROTOCOLS["openpi"]
    own_keys: tuple[str, ...] = ()
    action_dim, state_dim, control_hz = tables.ACTION_DIM, tables.STATE_DIM, tables.CONTROL_HZ
    branches = True
    label = ""

    def __init__(self, env: Any, evaluation: Any):
        self._env, self._evaluation = env, evaluation

    @functools.cached_property
    def sets(self) -> Mapping[str, tuple[str, ...]]:
        """Each of LIBERO's suites, e.g. `libero_object`."""
        return {suite: _refused("env.suite", tables.tasks, suite) for suite in tables.SUITES}

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for names in self.sets.values() for task in names)

    @functools.cached_property
    def instructions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tables.instruction(task) for task in self.tasks))

    def settle(self, task: str) -> dict[str, Any]:
        return {}

    def check(self, task: str) -> None:
        _refused("env.suite", compat.find)
        check_names("task", [task], self.tasks)
        check_names("env.cameras", list(self._env.cameras), list(tables.CAMERAS))
        self.horizon(task)

    def make_env(self, task: str) -> Callable[[], Env]:
        self.check(task)
        env = self._env
        return functools.partial(
            libero.make,
            task,
            cameras=env.cameras,
            image_size=env.image_size,
            horizon=self.horizon(task),
            protocol=self.protocol.name,
        )

    def horizon(self, task: str) -> int:
        return self._env.horizon or _refused("env.horizon", self.protocol.horizon, task.partition("/")[0])

    def episode(self, task: str, seed: int) -> Episode:
        """Seeds from `eval.first_seed` on are the benchmark's fixed initial states 0 to 49; others draw placements."""
        number = seed - self._evaluation.first_seed
        if number < 0:
            return Episode(seed, task)
        if number >= tables.INITIAL_STATES:
            raise SettingError(
                "eval.episodes", f"LIBERO has {tables.INITIAL_STATES} initial states a task; got number {number}"
            )
        return Episode(self.protocol.seed, task, init_state=number)

    def demonstrator(self, task: str) -> Demonstrator | None:
        if task.partition("/")[0] not in _EXPERTS:
            return None
        return Demonstrator(self.make_env(task), _make_expert, NOISE_PROFILE)

    def facts(self, task: str) -> dict[str, Any]:
        protocol = self.protocol
        return {
            "versions": compat.versions(),
            "libero_protocol": protocol.name,
            "horizon": self.horizon(task),
            "settle_steps": protocol.settle_steps,
            "pictures": "turned by 180 degrees: upright, mirrored",
            "initial_states": f"the benchmark's 0 to {self._evaluation.episodes - 1}",
            "seed_of_fixtures": protocol.seed,
            "training_episodes": "placements drawn from the task's regions",
        }

    def other_names(self, task: str) -> tuple[str, ...]:
        return ()

    def state_bounds(self) -> None:
        return None


class RLinf(LiberoSuite):
    """The same under RLinf's protocol."""

    protocol = protocols.PROTOCOLS["rlinf"]


class LeRobot(LiberoSuite):
    """The same under LeRobot's protocol."""

    protocol = protocols.PROTOCOLS["lerobot"]


def _make_expert(env: Any) -> Any:
    from envs.libero.experts import make_expert

    return make_expert(env)


def _refused(key: str, function: Callable[..., _T], *args: Any) -> _T:
    """The function's value; what it refuses is a mistake in the config's `key`."""
    try:
        return function(*args)
    except ValueError as error:
        raise SettingError(key, str(error)) from error
