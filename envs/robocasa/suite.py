"""RoboCasa as a suite (see envs.suite): v0.2 or v1.0.1, as installed, with its assets or on stand-ins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from envs.base import Env, Episode
from envs.robocasa import compat, standin, tables
from envs.suite import SettingError, check_names

_T = TypeVar("_T")


class RoboCasaSuite:
    """RoboCasa's atomic tasks. RoboCasa is not imported before an environment or its version is needed."""

    name = "robocasa"
    tasks = tuple(dict.fromkeys(task for names in tables.HORIZONS.values() for task in names))
    sets: Mapping[str, tuple[str, ...]] = {"robocasa24": tuple(tables.HORIZONS["v0.2"])}
    own_keys = ("env.version", "env.standins", "env.scenes", "env.objects", "eval.scenes", "eval.objects")
    action_dim, state_dim, control_hz = tables.ACTION_DIM, tables.STATE_DIM, float(tables.CONTROL_HZ)
    branches = True
    shares = False  # a snapshot of another episode is restored by building its scene
    instructions: tuple[str, ...] = ()

    def __init__(self, env: Any, evaluation: Any):
        self._env, self._evaluation = env, evaluation
        self.label = standin.LABEL if env.standins else ""

    @functools.cached_property
    def _found(self) -> Any:
        """The installed RoboCasa, with assets or stand-ins."""
        found = _refused("env.suite", compat.check, self._env.standins)
        if self._env.version not in ("", found.version):
            raise SettingError("env.version", f"got {self._env.version}, installed is RoboCasa {found.version}")
        return found

    def check_settings(self) -> None:
        """Raises SettingError for mistakes that show without a look at the installation."""
        examples = {"env.scenes": "training", "eval.scenes": "evaluation", "eval.objects": "heldout"}
        for key, example in examples.items():
            section, name = key.split(".")
            if not getattr(self._env if section == "env" else self._evaluation, name):
                raise SettingError(key, f"got nothing, expected e.g. {example} with env.suite=robocasa")
        if len(self._env.objects) != 1:
            raise SettingError("env.objects", f"got {', '.join(self._env.objects)}, expected one split")

    def settle(self, task: str) -> dict[str, Any]:
        return {"version": self._found.version}

    def planned(self, task: str) -> dict[str, Any]:
        """As `settle`, for a plan, which needs only the length of an episode and so no RoboCasa.

        Without an installation the version is `env.version`, or v0.2.
        """
        env = self._env
        try:
            compat.find()
        except ValueError:
            api = "v1" if env.version.startswith("1") else "v0.2"
        else:  # nothing is simulated: no assets are needed
            found = _refused("env.suite", compat.check, True)
            if env.version not in ("", found.version):
                raise SettingError("env.version", f"got {env.version}, installed is RoboCasa {found.version}")
            api = found.api
        return {"horizon": env.horizon or tables.HORIZONS[api][self._checked(task, api)]}

    def check(self, task: str) -> None:
        self._checked(task, self._found.api)

    def _checked(self, task: str, api: str) -> str:
        """RoboCasa's name of the task in that version, after a look at all names of the config."""
        env, evaluation = self._env, self._evaluation
        name = _refused("task", tables.task_name, task, api)
        check_names("env.cameras", list(env.cameras), list(tables.CAMERAS))
        _refused("env.scenes", tables.scenes, env.scenes, api)
        _refused("eval.scenes", tables.scenes, evaluation.scenes, api)
        check_names("env.objects", list(env.objects), list(tables.OBJECTS[api]))
        check_names("eval.objects", [evaluation.objects], list(tables.OBJECTS[api]))
        return name

    def make_env(self, task: str) -> Callable[[], Env]:
        from envs import robocasa

        env, evaluation = self._env, self._evaluation
        return functools.partial(
            robocasa.make,
            self._checked(task, self._found.api),
            cameras=env.cameras,
            image_size=env.image_size,
            horizon=env.horizon or None,
            scenes=env.scenes,
            objects=env.objects[0],
            heldout_scenes=evaluation.scenes,
            heldout_objects=evaluation.objects,
            heldout_seed=evaluation.first_seed,
            standins=env.standins,
        )

    def horizon(self, task: str) -> int:
        if self._env.horizon:
            return self._env.horizon
        api = self._found.api
        return tables.HORIZONS[api][tables.task_name(task, api)]

    def episode(self, task: str, seed: int) -> Episode:
        """The environment draws scene and objects by the seed: see `RoboCasaEnv.episode_of`."""
        return Episode(seed, task)

    def demonstrator(self, task: str) -> None:
        return None

    def facts(self, task: str) -> dict[str, Any]:
        env, evaluation, api = self._env, self._evaluation, self._found.api
        scenes = tables.scenes(evaluation.scenes, api)
        return {
            "versions": compat.versions(),
            "robocasa_task": tables.task_name(task, api),
            "horizon": self.horizon(task),
            "scenes": [f"{layout}/{style}" for layout, style in scenes],
            "episodes_per_scene": evaluation.episodes / len(scenes),
            "objects": f"{evaluation.objects} ({tables.OBJECTS[api][evaluation.objects] or 'all'})",
            "training_scenes": list(env.scenes),
            "training_objects": list(env.objects),
            "assets": self.label or "downloaded",
        }

    def other_names(self, task: str) -> tuple[str, ...]:
        return tables.other_names(task)

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = (np.array(bound) for bound in zip(*tables.state_bounds(), strict=True))
        return low, high


def _refused(key: str, function: Callable[..., _T], *args: Any) -> _T:
    """The function's value. A ValueError of it becomes a SettingError of the config's `key`."""
    try:
        return function(*args)
    except ValueError as error:
        raise SettingError(key, str(error)) from error
