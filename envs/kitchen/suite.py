"""The built-in kitchen as a suite (see envs.suite)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from envs import kitchen
from envs.base import Env, Episode
from envs.demos import Demonstrator
from envs.kitchen import demos, robot
from envs.suite import check_names

_DRAWERS = ("OpenDrawer", "CloseDrawer")


class KitchenSuite:
    """24 tasks in a kitchen of primitives."""

    name = "kitchen"
    tasks = tuple(kitchen.TASKS)
    sets: Mapping[str, tuple[str, ...]] = {
        "kitchen24": tasks,
        "drawers": _DRAWERS,
        "doors": tuple(task for task in tasks if "Door" in task),
        "carrying": tuple(task for task in tasks if task.startswith("PnP")),
    }
    own_keys = ("env.layouts", "env.styles", "env.objects")
    action_dim, state_dim, control_hz = robot.ACTION_DIM, robot.STATE_DIM, robot.CONTROL_HZ
    label = ""
    # The state is in metres and radians: the base, which the expert never moves, shakes by up to half a millimetre.
    state_rule = "millimetre"  # by which its dimensions count as constant (z1_jax.data.normalize)
    branches = True
    shares = False  # a simulator is a megabyte and 2 ms: turns would save nothing and cost 2 % of the time
    instructions: tuple[str, ...] = ()  # a tokenizer knows the kitchen's anyway

    def __init__(self, env: Any, evaluation: Any):
        self._env = env

    def settle(self, task: str) -> dict[str, Any]:
        return {}

    def check(self, task: str) -> None:
        env = self._env
        check_names("task", [task], list(kitchen.TASKS))
        check_names("env.cameras", list(env.cameras), list(kitchen.CAMERAS))
        check_names("env.layouts", list(env.layouts), [*kitchen.LAYOUTS, *kitchen.LAYOUT_SPLITS])
        check_names("env.styles", list(env.styles), [*kitchen.STYLES, *kitchen.STYLE_SPLITS])
        check_names("env.objects", list(env.objects), list(kitchen.OBJECT_SPLITS))

    def make_env(self, task: str) -> Callable[[], Env]:
        self.check(task)
        return functools.partial(kitchen.make, task, **self._options())

    def _options(self) -> dict[str, Any]:
        """KitchenEnv's arguments besides the task."""
        env = self._env
        return {
            "cameras": env.cameras,
            "image_size": env.image_size,
            "horizon": env.horizon or None,
            "layout": env.layouts,
            "style": env.styles,
            "objects": env.objects,
        }

    def horizon(self, task: str) -> int:
        return self._env.horizon or kitchen.TASKS[task].horizon

    def episode(self, task: str, seed: int) -> Episode:
        return Episode(seed, task)

    def demonstrator(self, task: str) -> Demonstrator:
        return demos.demonstrator(task, **self._options())

    def facts(self, task: str) -> dict[str, Any]:
        env = self._env
        return {
            "physics": robot.PHYSICS,
            "horizon": env.horizon or "the task's own",
            "layouts": list(env.layouts),
            "styles": list(env.styles),
            "objects": list(env.objects),
        }

    def other_names(self, task: str) -> tuple[str, ...]:
        """RoboCasa's: the kitchen's tasks are named after them."""
        from envs.robocasa import tables

        return tables.other_names(task)

    def state_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None
