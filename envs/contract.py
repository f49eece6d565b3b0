"""Checks an environment's outputs against its spec: in the worker, on every output, in microseconds."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.base import ChunkResult, EnvObservation, EnvSpec, Snapshot

_FLAGS = [field.name for field in dataclasses.fields(ChunkResult) if field.type == "bool"]


class ContractError(ValueError):
    """An output that breaks the interface of `envs.base`. One line: the field, what was got, what was expected.

    The fault is the environment's own code, so building it anew and trying again would not help.
    """


def check_spec(spec: Any) -> EnvSpec:
    """Returns the spec if it is valid, or raises ContractError."""
    if not isinstance(spec, EnvSpec):
        raise _broken("spec", _named(spec), "an EnvSpec")
    for name in ("task", "version", "label"):
        if not isinstance(getattr(spec, name), str):
            raise _broken(f"spec.{name}", _named(getattr(spec, name)), "a string")
    cameras = spec.cameras
    if not isinstance(cameras, tuple) or not cameras or not all(isinstance(name, str) and name for name in cameras):
        raise _broken("spec.cameras", _named(cameras), "a tuple of one or more names")
    if len(set(cameras)) < len(cameras):
        raise _broken("spec.cameras", _named(cameras), "each name once")
    for name in ("image_size", "action_dim", "state_dim", "horizon"):
        value = getattr(spec, name)
        if not _whole(value) or value < 1:
            raise _broken(f"spec.{name}", _named(value), "an integer of at least 1")
    if not _number(spec.control_hz) or not 0 < spec.control_hz < math.inf:
        raise _broken("spec.control_hz", _named(spec.control_hz), "a number above 0")
    return spec


def different_spec(spec: EnvSpec, first: EnvSpec, but: Sequence[str] = ()) -> str:
    """How an environment differs from the first one of its pool, in one line; empty where it does not.

    Args:
        but: fields that may differ.
    """
    for field in dataclasses.fields(EnvSpec):
        one, other = getattr(spec, field.name), getattr(first, field.name)
        if one != other and field.name not in but:
            expected = f"{_named(other)} as in the pool's first environment"
            return str(_broken(f"spec.{field.name}", _named(one), expected))
    return ""


def check_observation(observation: Any, spec: EnvSpec) -> EnvObservation:
    """Returns the observation if it fits the spec, or raises ContractError."""
    if not isinstance(observation, EnvObservation):
        raise _broken("the observation", _named(observation), "an EnvObservation")
    images, state = observation.images, observation.state
    if not isinstance(images, dict) or images.keys() != set(spec.cameras):
        got = ", ".join(map(str, images)) or "none" if isinstance(images, dict) else _named(images)
        raise _broken("the cameras of images", got, ", ".join(spec.cameras))
    for camera in spec.cameras:
        check_frame(images[camera], spec.image_size, f"images[{camera!r}]")
    _check_array("state", state, np.dtype(np.float32), (spec.state_dim,))
    if not np.isfinite(state).all():
        at = int(np.argmin(np.isfinite(state)))
        raise _broken("state", f"{state[at]} in dimension {at}", "finite numbers")
    if not isinstance(observation.instruction, str):
        raise _broken("instruction", _named(observation.instruction), "a string")
    return observation


def check_frame(image: Any, size: int, field: str = "the frame") -> np.ndarray:
    """Returns the image if it is RGB of that size, or raises ContractError."""
    _check_array(field, image, np.dtype(np.uint8), (size, size, 3))
    return image


def check_result(result: Any, given: int, left: int | None) -> ChunkResult:
    """Returns the result of a chunk of `given` actions if it is possible, or raises ContractError.

    Args:
        left: control steps from the chunk's beginning to the horizon; None where that is not known.
    """
    if not isinstance(result, ChunkResult):
        raise _broken("the result of a chunk", _named(result), "a ChunkResult")
    for name in _FLAGS:
        if not isinstance(getattr(result, name), bool | np.bool_):
            raise _broken(name, _named(getattr(result, name)), "True or False")
    steps = result.steps
    if not _whole(steps) or not 0 <= steps <= given:
        raise _broken("steps", _named(steps), f"an integer from 0 to {given}, the actions given")
    if left is not None and steps > left:
        raise _broken("steps", f"{steps}", f"at most {left}: the episode has no more to its horizon")
    if not result.done:
        if result.success:
            raise _broken("done", "False with success True", "True: success ends an episode")
        if steps < given:
            raise _broken("steps", f"{steps} of {given} and done False", f"{given}, or done True")
        if steps == left:
            raise _broken("done", "False at the horizon", "True")
    if not _number(result.simulate_s) or not 0 <= result.simulate_s < math.inf:
        raise _broken("simulate_s", _named(result.simulate_s), "seconds, 0 or more")
    return result


def check_snapshot(snapshot: Any) -> Snapshot:
    """Returns the snapshot if it is one, or raises ContractError."""
    if not isinstance(snapshot, Snapshot):
        raise _broken("the snapshot", _named(snapshot), "a Snapshot")
    return snapshot


def _check_array(field: str, array: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise _broken(field, _named(array), f"{dtype} {list(shape)}")


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _named(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{value.dtype} {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str | tuple | np.generic):
        return str(value)[:80] if isinstance(value, np.generic) else repr(value)[:80]
    return f"{type(value).__name__}"


def _broken(field: str, got: str, expected: str) -> ContractError:
    return ContractError(f"the environment's {field.removeprefix('the ')}: got {got}, expected {expected}")
