"""The whole state of a RoboCasa simulation, to be copied bit for bit into another one of the same episode.

MuJoCo's integration state is not enough: controllers keep goals, fixtures latch, observables remember when they last
sampled. A snapshot stores the differences from the episode's start; a copy starts the same episode and applies them.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import mujoco
import numpy as np

PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION

# Fields of the model that RoboCasa's `update_state` writes: water, flames, lamps, liquids.
MODEL_FIELDS = ("site_rgba", "site_size", "geom_rgba")

# What MuJoCo derives from qpos at the start of a substep. After a control step it lags qpos by one substep, and both
# success checks and cameras read it: a copy must not recompute it.
DERIVED = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)

_SCALARS = (bool, int, float, str, type(None), np.generic)


def holders(env: Any) -> Iterator[tuple[str, Any]]:
    """(path, object or dictionary) of everything whose plain attributes or items are part of the state.

    `env` is the robosuite environment. A dictionary that holds more than plain values counts by itself: the regions of
    v1's drawers move along with them, beside the XML elements that they were read from.
    """
    for path, holder in _objects(env):
        yield path, holder
        yield from _dictionaries(path, holder)


def _dictionaries(path: str, holder: Any, depth: int = 3) -> Iterator[tuple[str, dict]]:
    for name, value in _fields(holder).items():
        if depth and isinstance(value, dict) and not plain(value):
            yield f"{path}.{name}", value
            yield from _dictionaries(f"{path}.{name}", value, depth - 1)


def _fields(holder: Any) -> dict[Any, Any]:
    """The live attributes of an object, or the items of a dictionary."""
    return holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})


def _objects(env: Any) -> Iterator[tuple[str, Any]]:
    yield "env", env
    for i, robot in enumerate(env.robots):
        yield f"robots[{i}]", robot
        for name, value in sorted(vars(robot).items()):
            if name.startswith("recent_"):  # buffers, one or one per arm
                parts = value.items() if isinstance(value, Mapping) else [("", value)]
                yield from ((f"robots[{i}].{name}[{part}]", buffer) for part, buffer in parts)
        for arm, gripper in robot.gripper.items():
            yield f"robots[{i}].gripper[{arm}]", gripper
        controller = robot.composite_controller
        yield f"robots[{i}].controller", controller
        for part, one in controller.part_controllers.items():
            yield f"robots[{i}].controller[{part}]", one
    for name, fixture in env.fixtures.items():
        yield f"fixtures[{name}]", fixture
    for name, observable in env._observables.items():
        yield f"observables[{name}]", observable


def attributes(env: Any) -> dict[tuple[str, str], Any]:
    """(holder's path, attribute or key) → value, uncopied, of all that are plain."""
    return {
        (path, name): value for path, holder in holders(env) for name, value in _fields(holder).items() if plain(value)
    }


def baseline(env: Any) -> dict[tuple[str, str], Any]:
    """A copy of the attributes at the start of an episode; `capture` stores the changes since then."""
    return copy.deepcopy(attributes(env))


def capture(env: Any, start: Mapping[tuple[str, str], Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """(physics, the rest) of a simulation; everything is copied, and picklable."""
    model, data = env.sim.model._model, env.sim.data._data
    physics = np.empty(mujoco.mj_stateSize(model, PHYSICS))
    mujoco.mj_getState(model, data, physics, PHYSICS)
    now = attributes(env)
    return physics, {
        "attributes": copy.deepcopy(
            {key: value for key, value in now.items() if key not in start or not same(value, start[key])}
        ),
        "gone": start.keys() - now.keys(),
        "model": {name: getattr(model, name).copy() for name in MODEL_FIELDS},
        "derived": {name: getattr(data, name).copy() for name in DERIVED},
        "rng": env.rng.bit_generator.state,
    }


def apply(env: Any, start: Mapping[tuple[str, str], Any], physics: np.ndarray, rest: Mapping[str, Any]) -> None:
    """Puts a simulation of the same episode into the captured state.

    Raises:
        ValueError: the state does not fit this model, or names a part that it lacks: it is of another episode.
    """
    model, data = env.sim.model._model, env.sim.data._data
    if physics.shape != (mujoco.mj_stateSize(model, PHYSICS),):
        raise ValueError("the snapshot's physics does not fit this scene: it is of another episode")
    mujoco.mj_setState(model, data, physics, PHYSICS)
    for name in MODEL_FIELDS:
        getattr(model, name)[...] = rest["model"][name]
    for name in DERIVED:
        getattr(data, name)[...] = rest["derived"][name]
    env.rng.bit_generator.state = rest["rng"]
    parts = dict(holders(env))
    changes = copy.deepcopy(dict(rest["attributes"]))
    if unknown := {path for path, _ in changes} - parts.keys():
        raise ValueError(f"the snapshot holds {sorted(unknown)[0]}, which this scene lacks: it is of another episode")
    now = attributes(env)
    wanted = {key: value for key, value in {**start, **changes}.items() if key not in rest["gone"]}
    for path, name in now.keys() - wanted.keys():
        del _fields(parts[path])[name]
    for key, value in wanted.items():
        path, name = key
        if key not in now or not same(now[key], value):
            _fields(parts[path])[name] = value if key in changes else copy.deepcopy(value)


def plain(value: Any, depth: int = 3) -> bool:
    """Whether a value consists of numbers, strings and arrays alone, so that it can be copied and compared."""
    if isinstance(value, _SCALARS):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype != object or all(isinstance(x, _SCALARS) for x in value.ravel())
    if depth and isinstance(value, Mapping):
        return all(isinstance(k, _SCALARS) and plain(v, depth - 1) for k, v in value.items())
    if depth and isinstance(value, (list, tuple, set, deque)):
        return all(plain(v, depth - 1) for v in value)
    return False


def same(a: Any, b: Any) -> bool:
    """Equality to the bit of two plain values; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if a.dtype == object:
            return a.shape == b.shape and same(a.tolist(), b.tolist())
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))
