"""Meta-World as a suite (see envs.suite)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from envs import metaworld
from envs.base import Env, Episode
from envs.demos import Demonstrator
from envs.metaworld import compat, protocols, tables
from envs.suite import SettingError, check_names

_T = TypeVar("_T")

NOISE_PROFILE = (1.0,) * 3 + (0.0,)  # a disturbed grip drops things


class MetaWorldSuite:
    """50 tasks on a table. Meta-World is not imported before its installation is needed."""

    name = "metaworld"
    tasks = tables.TASKS
    sets: Mapping[str, tuple[str, ...]] = tables.SETS
    own_keys = ("env.version", "env.protocol")
    action_dim, state_dim, control_hz = tables.ACTION_DIM, tables.STATE_DIM, tables.CONTROL_HZ
    branches = shares = True
    renderer_bytes = 100_000_000  # shadows 67 MB, textures and meshes 12, the picture 15
    label = ""
    instructions = tuple(dict.fromkeys(tables.INSTRUCTIONS.values()))

    def __init__(self, env: Any, evaluation: Any):
        self._env, self._evaluation = env, evaluation

    @property
    def _protocol(self) -> protocols.Protocol:
        return _refused("env.protocol", protocols.protocol, self._env.protocol)

    @functools.cached_property
    def _version(self) -> str:
        """The versions of Meta-World and MuJoCo: success depends on both."""
        found = _refused("env.suite", compat.versions)
        version = ", ".join(f"{name} {found[name]}" for name in ("metaworld", "mujoco"))
        if self._env.version not in ("", version):
            raise SettingError("env.version", f"got {self._env.version!r}, installed is {version!r}")
        return version

    def check_settings(self) -> None:
        """Raises SettingError for mistakes that show without a look at the installation."""
        env = self._env
        check_names("env.protocol", [env.protocol], list(protocols.PROTOCOLS))
        check_names("env.cameras", list(env.cameras), tables.CAMERAS)
        if tuple(env.objects) != ("train",):
            got = ", ".join(env.objects)
            raise SettingError("env.objects", f"got {got}, but a task of Meta-World says its objects: leave it out")

    def settle(self, task: str) -> dict[str, Any]:
        return {"version": self._version}

    def planned(self, task: str) -> dict[str, Any]:
        """As `settle`, for a plan, which needs only the length of an episode and so no Meta-World."""
        _refused("task", tables.check_task, task)
        return {"horizon": self.horizon(task)}

    def check(self, task: str) -> None:
        self.check_settings()
        _ = self._version
        _refused("task", tables.check_task, task)
        _refused("env.suite", compat.check_mujoco)
        from envs import opengl  # which imports MuJoCo

        _refused("env.suite", opengl.check, "Meta-World")

    def make_env(self, task: str) -> Callable[[], Env]:
        self.check(task)
        return self._factory(task)

    def _factory(self, task: str) -> Callable[[], Any]:
        env = self._env
        return functools.partial(
            metaworld.make,
            task,
            cameras=tuple(env.cameras),
            image_size=env.image_size,
            horizon=self.horizon(task),
            protocol=env.protocol,
        )

    def horizon(self, task: str) -> int:
        """The config's horizon, or else the protocol's."""
        return self._env.horizon or self._protocol.max_steps

    def episode(self, task: str, seed: int) -> Episode:
        return Episode(seed, task)

    def demonstrator(self, task: str) -> Demonstrator:
        return Demonstrator(self._factory(task), make_expert, NOISE_PROFILE)

    def facts(self, task: str) -> dict[str, Any]:
        protocol, env = self._protocol, self._env
        return {
            "versions": _refused("env.suite", compat.versions),
            "metaworld_protocol": f"{protocol.name} ({protocol.source})",
            "horizon": self.horizon(task),
            "settle_steps": protocol.settle_steps,
            "cameras": list(env.cameras),
            "shadows": protocol.shadows,
            "placements": "drawn by the episode's seed from the task's own regions, in training and evaluation",
        }

    def other_names(self, task: str) -> tuple[str, ...]:
        return ()

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None


def make_expert(env: Any) -> Any:
    """The task's scripted expert: `envs.metaworld.experts`, imported where it is made."""
    from envs.metaworld import experts

    return experts.make_expert(env)


def _refused(key: str, function: Callable[..., _T], *args: Any) -> _T:
    """The function's value. A ValueError of it becomes a SettingError of the config's `key`."""
    try:
        return function(*args)
    except ValueError as error:
        raise SettingError(key, str(error)) from error
