"""The whole state of a Meta-World environment, to be copied bit for bit into another one of the same task.

MuJoCo's integration state is not enough. The poses of fixtures and goals are in the model, the start of the episode is
in the environment's attributes, and the first picture of an episode is drawn before MuJoCo has seen its goal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from envs import stability

PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
MODEL_FIELDS = ("body_pos", "site_pos")  # what resets write
# What MuJoCo derives from qpos and the model: pictures are drawn from it, and attributes are views of it.
DERIVED = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)
_NUMBERS = (bool, int, float, type(None), np.generic)


def attributes(raw: Any) -> dict[str, Any]:
    """Attributes that are numbers or arrays of them, copied; views of MuJoCo's arrays as ("view", field, first, shape).

    Some tasks keep such views by mistake, so that their "initial" values move. Rewards and checks are computed from
    them, so the views must be restored as views.
    """
    found: dict[str, Any] = {}
    for name, value in vars(raw).items():
        if isinstance(value, _NUMBERS):
            found[name] = value
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found[name] = _view(raw.data, value) or value.copy()
    return found


def set_attributes(raw: Any, values: Mapping[str, Any]) -> None:
    """Writes them back."""
    for name, value in values.items():
        if isinstance(value, tuple):
            _, field, first, shape = value
            value = getattr(raw.data, field).reshape(-1)[first : first + int(np.prod(shape))].reshape(shape)
        elif isinstance(value, np.ndarray):
            value = value.copy()
        setattr(raw, name, value)


def _view(data: mujoco.MjData, array: np.ndarray) -> tuple[str, str, int, tuple[int, ...]] | None:
    for field in ("qpos", "qvel", "mocap_pos", *DERIVED):
        whole = getattr(data, field)
        if np.may_share_memory(array, whole):
            return "view", field, (array.ctypes.data - whole.ctypes.data) // whole.itemsize, array.shape
    return None


def capture(raw: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """(physics, the rest) of an environment; everything is copied, and picklable."""
    physics = np.empty(mujoco.mj_stateSize(raw.model, PHYSICS))
    mujoco.mj_getState(raw.model, raw.data, physics, PHYSICS)
    return physics, {
        "model": {name: getattr(raw.model, name).copy() for name in MODEL_FIELDS},
        "derived": {name: getattr(raw.data, name).copy() for name in DERIVED},
        "attributes": attributes(raw),
    }


def apply(raw: Any, physics: np.ndarray, rest: Mapping[str, Any]) -> None:
    """Puts an environment of the same task into the captured state.

    Raises:
        ValueError: the state does not fit this model: it is of another task.
    """
    if physics.shape != (mujoco.mj_stateSize(raw.model, PHYSICS),):
        raise ValueError("the snapshot's physics does not fit this scene: it is of another task")
    for name, value in rest["model"].items():
        getattr(raw.model, name)[...] = value
    mujoco.mj_setState(raw.model, raw.data, physics, PHYSICS)
    for name, value in rest["derived"].items():
        getattr(raw.data, name)[...] = value
    set_attributes(raw, rest["attributes"])
    stability.forgive(raw.data)
