"""The environments that there are: the built-in kitchen, and RoboCasa. Each question that depends on which, answered.

Nothing here imports a simulator: what is missing is said before any worker starts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from envs.base import Env
from z1_jax.config.schema import Config, ConfigError
from z1_jax.data.normalize import NormStats

_T = TypeVar("_T")
_KITCHEN_EXPERT = "kitchen expert"  # what made the kitchen's demonstrations, in their source


def make_env(config: Config, task: str) -> functools.partial[Env]:
    """What a worker calls to build one environment.

    Raises:
        ConfigError: the suite has no such task, camera, scene, layout, style or objects, or is not installed.
    """
    if config.env.suite == "robocasa":
        return _robocasa(config, task)
    from envs import kitchen

    check_names("task", [task], list(kitchen.TASKS))
    check_names("env.cameras", list(config.env.cameras), list(kitchen.CAMERAS))
    check_names("env.layouts", list(config.env.layouts), [*kitchen.LAYOUTS, *kitchen.LAYOUT_SPLITS])
    check_names("env.styles", list(config.env.styles), [*kitchen.STYLES, *kitchen.STYLE_SPLITS])
    check_names("env.objects", list(config.env.objects), list(kitchen.OBJECT_SPLITS))
    return functools.partial(kitchen.make, task, **kitchen_options(config))


def kitchen_options(config: Config) -> dict[str, Any]:
    """KitchenEnv's arguments besides the task."""
    env = config.env
    return {
        "cameras": env.cameras,
        "image_size": env.image_size,
        "horizon": env.horizon or None,
        "layout": env.layouts,
        "style": env.styles,
        "objects": env.objects,
    }


def planned(config: Config) -> Config:
    """The config as a plan needs it: names checked, and of RoboCasa, which need not be there, how long an episode is.

    Where none can be used, the version is `env.version`, or v0.2.

    Raises:
        ConfigError: the suite has no such task, camera, scene, layout, style or objects.
    """
    if config.env.suite != "robocasa":
        make_env(config, config.task)
        return config
    from envs.robocasa import compat, tables

    env = config.env
    try:
        compat.find()
    except ValueError:
        api = "v1" if env.version.startswith("1") else "v0.2"
    else:  # nothing is simulated: no assets are needed
        api = _installed(dataclasses.replace(config, env=dataclasses.replace(env, standins=True))).api
    task = _checked_task(config, config.task, api)
    return dataclasses.replace(config, env=dataclasses.replace(env, horizon=env.horizon or tables.HORIZONS[api][task]))


def _checked_task(config: Config, task: str, api: str) -> str:
    """RoboCasa's name of the task in that version, after a look at all names of the config."""
    from envs.robocasa import tables

    env = config.env
    name = _refused("task", tables.task_name, task, api)
    check_names("env.cameras", list(env.cameras), list(tables.CAMERAS))
    _refused("env.scenes", tables.scenes, env.scenes, api)
    _refused("eval.scenes", tables.scenes, config.eval.scenes, api)
    check_names("env.objects", list(env.objects), list(tables.OBJECTS[api]))
    check_names("eval.objects", [config.eval.objects], list(tables.OBJECTS[api]))
    return name


def _robocasa(config: Config, task: str) -> functools.partial[Env]:
    from envs import robocasa

    env = config.env
    return functools.partial(
        robocasa.make,
        _checked_task(config, task, _installed(config).api),
        cameras=env.cameras,
        image_size=env.image_size,
        horizon=env.horizon or None,
        scenes=env.scenes,
        objects=env.objects[0],
        heldout_scenes=config.eval.scenes,
        heldout_objects=config.eval.objects,
        heldout_seed=config.eval.first_seed,
        standins=env.standins,
    )


def _installed(config: Config) -> Any:
    """The RoboCasa that is there, with assets or stand-ins."""
    from envs.robocasa import compat

    found = _refused("env.suite", compat.check, config.env.standins)
    if config.env.version not in ("", found.version):
        raise ConfigError(f"config key env.version: got {config.env.version}, installed is RoboCasa {found.version}")
    return found


def _refused(key: str, function: Callable[..., _T], *args: Any) -> _T:
    """The function's value; what it refuses is a mistake in the config's `key`."""
    try:
        return function(*args)
    except ValueError as error:
        raise ConfigError(f"config key {key}: {error}") from error


def pin_version(config: Config) -> Config:
    """The config with the simulator's version in it where that matters: a run must not go on with another one.

    Raises:
        ConfigError: RoboCasa is wanted and not installed, or in another version.
    """
    if config.env.suite != "robocasa":
        return config
    return dataclasses.replace(config, env=dataclasses.replace(config.env, version=_installed(config).version))


def episode_steps(config: Config) -> int:
    """Control steps of an episode."""
    if config.env.horizon:
        return config.env.horizon
    if config.env.suite == "robocasa":
        from envs.robocasa import tables

        api = _installed(config).api
        return tables.HORIZONS[api][tables.task_name(config.task, api)]
    from envs import kitchen

    return kitchen.TASKS[config.task].horizon


def widths(config: Config) -> dict[str, int]:
    """Widths of an action and a state."""
    if config.env.suite == "robocasa":
        from envs.robocasa import tables

        return {"actions": tables.ACTION_DIM, "state": tables.STATE_DIM}
    from envs.kitchen import robot

    return {"actions": robot.ACTION_DIM, "state": robot.STATE_DIM}


def label(config: Config) -> str:
    """What must stand beside every figure of a run; empty for most."""
    if not config.env.standins:
        return ""
    from envs.robocasa import standin

    return standin.LABEL


def facts(config: Config) -> dict[str, Any]:
    """What success in the environments depends on, for the protocol."""
    env = config.env
    if env.suite != "robocasa":
        return {
            "horizon": env.horizon or "the task's own",
            "layouts": list(env.layouts),
            "styles": list(env.styles),
            "objects": list(env.objects),
        }
    from envs.robocasa import compat, tables

    api = _installed(config).api
    scenes = tables.scenes(config.eval.scenes, api)
    return {
        "versions": compat.versions(),
        "robocasa_task": tables.task_name(config.task, api),
        "horizon": episode_steps(config),
        "scenes": [f"{layout}/{style}" for layout, style in scenes],
        "episodes_per_scene": config.eval.episodes / len(scenes),
        "objects": f"{config.eval.objects} ({tables.OBJECTS[api][config.eval.objects] or 'all'})",
        "training_scenes": list(env.scenes),
        "training_objects": list(env.objects),
        "assets": label(config) or "downloaded",
    }


def other_names(task: str) -> tuple[str, ...]:
    """What versions of RoboCasa call the same task."""
    from envs.robocasa import tables

    return (*tables.TWINS.get(task, ()), *(old for old, new in tables.TWINS.items() if task in new))


def rate_of(source: Mapping[str, Any]) -> float | None:
    """Control steps a second of demonstrations, by what made them; None where that is not known."""
    if source.get("made_by") == _KITCHEN_EXPERT:
        from envs.kitchen import robot

        return robot.CONTROL_HZ
    return source.get("fps")


def training_statistics(source: Mapping[str, Any], stats: Mapping[str, NormStats]) -> dict[str, NormStats]:
    """The statistics for a fresh policy, by what made the demonstrations.

    The kitchen's state is in metres and radians: its base, which the expert never moves, shakes by up to half a
    millimetre, and is held. Of other data the unit is not known.
    """
    if source.get("made_by") != _KITCHEN_EXPERT:
        return dict(stats)
    return {**stats, "state": dataclasses.replace(stats["state"], rule="millimetre")}


def assumed_statistics(config: Config) -> dict[str, NormStats]:
    """Statistics for a policy that has seen no data: uniform over the ranges of state and action.

    Raises:
        ConfigError: the suite has demonstrations, which say better.
    """
    if config.env.suite != "robocasa":
        raise ConfigError(f"config key init: got random, but env.suite={config.env.suite} has an expert; leave it out")
    from envs.robocasa import tables

    low, high = (np.array(bound) for bound in zip(*tables.state_bounds(), strict=True))
    one = np.ones(tables.ACTION_DIM)
    return {"state": _uniform(low, high), "actions": _uniform(-one, one)}


def _uniform(low: np.ndarray, high: np.ndarray) -> NormStats:
    return NormStats(mean=(low + high) / 2, std=(high - low) / np.sqrt(12), q01=low, q99=high)


def check_names(key: str, given: list[str], known: list[str]) -> None:
    """Refuses names that are not known.

    Raises:
        ConfigError: one line.
    """
    if not given:
        raise ConfigError(f"config key {key}: got nothing, expected one or more of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ConfigError(f"config key {key}: {name!r} does not exist; known: {', '.join(known)}")
