"""LIBERO and LIBERO-PRO as a suite (see envs.suite)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from envs import libero
from envs.base import Env, Episode
from envs.demos import Demonstrator
from envs.libero import compat, protocols, tables
from envs.suite import SettingError, check_names

_T = TypeVar("_T")

EXPERTS = ("libero_spatial", "libero_object", "libero_goal")  # suites whose tasks all have a scripted expert
NOISE_PROFILE = (1.0,) * 3 + (0.3,) * 3 + (0.0,)  # a unit of rotation is half a radian; a disturbed grip drops things


def _numbered(suite: str) -> tuple[str, ...]:
    """A suite's tasks as SUITE/NUMBER. Needs no installation of LIBERO."""
    return tuple(f"{suite}/{number}" for number in range(90 if suite == "libero_90" else 10))


class LiberoSuite:
    """290 tasks in 21 suites. LIBERO is not imported before its installation is needed."""

    name = "libero"
    sets: Mapping[str, tuple[str, ...]] = {suite: _numbered(suite) for suite in tables.SUITES}
    tasks = tuple(task for names in sets.values() for task in names)  # their full names are understood as well
    own_keys = ("env.version", "env.protocol", "env.train_on")
    action_dim, state_dim, control_hz = tables.ACTION_DIM, tables.STATE_DIM, tables.CONTROL_HZ
    branches = shares = True
    renderer_bytes = 460_000_000  # libero_spatial: textures 336 MB with alpha and mipmaps, shadows 67, meshes 40
    instructions: tuple[str, ...] = ()  # a tokenizer learns those of the demonstrations

    def __init__(self, env: Any, evaluation: Any):
        self._env, self._evaluation = env, evaluation
        self.label = "" if env.train_on == "placements" else protocols.ON_INITIAL_STATES

    @property
    def _protocol(self) -> protocols.Protocol:
        return _refused("env.protocol", protocols.protocol, self._env.protocol)

    @functools.cached_property
    def _version(self) -> str:
        """The versions of LIBERO, robosuite and MuJoCo: success depends on each of them."""
        found = _refused("env.suite", compat.versions)
        version = ", ".join(f"{name} {found[name]}" for name in ("libero", "robosuite", "mujoco"))
        if self._env.version not in ("", version):
            raise SettingError("env.version", f"got {self._env.version!r}, installed is {version!r}")
        return version

    def check_settings(self) -> None:
        """Raises SettingError for mistakes that show without a look at the installation."""
        env, evaluation = self._env, self._evaluation
        check_names("env.protocol", [env.protocol], list(protocols.PROTOCOLS))
        check_names("env.train_on", [env.train_on], protocols.TRAIN_ON)
        check_names("env.cameras", list(env.cameras), tables.CAMERAS)
        if tuple(env.objects) != ("train",):
            got = ", ".join(env.objects)
            raise SettingError("env.objects", f"got {got}, but a task of LIBERO says its objects: leave it out")
        if evaluation.episodes > tables.INITIAL_STATES:
            raise SettingError(
                "eval.episodes",
                f"got {evaluation.episodes}, expected at most the {tables.INITIAL_STATES} initial states of a task",
            )

    def settle(self, task: str) -> dict[str, Any]:
        return {"version": self._version}

    def planned(self, task: str) -> dict[str, Any]:
        """As `settle`, for a plan, which needs only the length of an episode and so no LIBERO."""
        check_names("task", [task.partition("/")[0]], tables.SUITES)
        return {"horizon": self.horizon(task)}

    def check(self, task: str) -> None:
        self.check_settings()
        _ = self._version
        _refused("task", tables.task_name, task)
        self.horizon(task)
        from envs import opengl  # which imports MuJoCo

        _refused("env.suite", opengl.check, "LIBERO")

    def make_env(self, task: str) -> Callable[[], Env]:
        self.check(task)
        return self._factory(task)

    def _factory(self, task: str) -> Callable[[], Any]:
        env = self._env
        return functools.partial(
            libero.make,
            task,
            cameras=tuple(env.cameras),
            image_size=env.image_size,
            horizon=self.horizon(task),
            protocol=env.protocol,
            train_on=env.train_on,
        )

    def horizon(self, task: str) -> int:
        """The config's horizon, or else the protocol's."""
        return self._env.horizon or _refused("env.horizon", self._protocol.horizon, task.partition("/")[0])

    def episode(self, task: str, seed: int) -> Episode:
        """Seeds from `eval.first_seed` on are the benchmark's initial states 0 to 49, in their order."""
        number = seed - self._evaluation.first_seed
        if number < 0:
            return Episode(seed, task)
        if number >= tables.INITIAL_STATES:
            raise SettingError(
                "eval.first_seed", f"seed {seed} is initial state {number}: LIBERO has 0 to {tables.INITIAL_STATES - 1}"
            )
        return Episode(seed, task, init_state=number)  # the protocol's own seed draws the fixtures

    def demonstrator(self, task: str) -> Demonstrator | None:
        if task.partition("/")[0] not in EXPERTS:
            return None
        return Demonstrator(self._factory(task), make_expert, NOISE_PROFILE)

    def facts(self, task: str) -> dict[str, Any]:
        protocol = self._protocol
        return {
            "versions": _refused("env.suite", compat.versions),
            "libero_task": _refused("task", tables.task_name, task),
            "libero_protocol": f"{protocol.name} ({protocol.source})",
            "horizon": self.horizon(task),
            "settle_steps": protocol.settle_steps,
            "fixtures_seed": protocol.seed,
            "pictures": "mirrored" if protocol.mirrored else "as seen",
            "training_starts": self._env.train_on,
            "evaluation_starts": f"initial states 0 to {min(self._evaluation.episodes, tables.INITIAL_STATES) - 1}",
        }

    def other_names(self, task: str) -> tuple[str, ...]:
        """Its full name, where it is given as a number, and the other way round."""
        full = _refused("task", tables.task_name, task)
        number = f"{full.partition('/')[0]}/{tables.tasks(full.partition('/')[0]).index(full)}"
        return tuple(name for name in (full, number) if name != task)

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Given for every task, because libero_10, _90 and LIBERO-PRO have no expert whose data could replace them."""
        low, high = (np.array(bound) for bound in zip(*tables.STATE_BOUNDS, strict=True))
        return low, high


def make_expert(env: Any) -> Any:
    """The task's scripted expert: `envs.libero.experts`, which needs MuJoCo, imported where it is made."""
    from envs.libero import experts

    return experts.make_expert(env)


def _refused(key: str, function: Callable[..., _T], *args: Any) -> _T:
    """The function's value. A ValueError of it becomes a SettingError of the config's `key`."""
    try:
        return function(*args)
    except ValueError as error:
        raise SettingError(key, str(error)) from error
