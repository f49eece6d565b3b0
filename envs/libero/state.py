"""The whole state of a LIBERO simulation, to be copied bit for bit into another one of the same task.

MuJoCo's integration state is not enough. The controller also keeps its last orientation, the gripper its last command,
and observables the time when they last sampled; and the poses of fixtures are in the model, where a reset writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from envs import stability

PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION

# Fields of the model that resets and steps write: where fixtures stand, and which sites show (a burner that glows).
MODEL_FIELDS = ("body_pos", "body_quat", "site_rgba")

# What a picture is drawn from. MuJoCo derives it from qpos at the start of a substep.
DERIVED = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)
_SCALARS = (bool, int, float, str, type(None), np.generic)
_TIMES = ("timestep", "cur_time", "done")
_SAMPLING = ("_time_since_last_sample", "_current_delay", "_current_observed_value", "_sampled")


class Look:
    """The scene as it was when the observables last sampled, so that pictures and state show the same moment.

    That moment is a few substeps before the end of the control step: robosuite counts its own resets as substeps.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, sim: Any) -> None:
        """Copies what pictures are drawn from."""
        data, model = sim.data._data, sim.model._model
        self.arrays = {name: getattr(data, name).copy() for name in DERIVED}
        self.arrays["site_rgba"] = model.site_rgba.copy()

    def put(self, sim: Any) -> None:
        """Writes it back into a simulation."""
        data, model = sim.data._data, sim.model._model
        for name in DERIVED:
            getattr(data, name)[...] = self.arrays[name]
        model.site_rgba[...] = self.arrays["site_rgba"]


def capture(raw: Any, look: Look) -> tuple[np.ndarray, dict[str, Any]]:
    """(physics, the rest) of a robosuite environment; everything is copied, and picklable."""
    model, data, robot = raw.sim.model._model, raw.sim.data._data, raw.robots[0]
    physics = np.empty(mujoco.mj_stateSize(model, PHYSICS))
    mujoco.mj_getState(model, data, physics, PHYSICS)
    return physics, {
        "model": {name: getattr(model, name).copy() for name in MODEL_FIELDS},
        "look": {name: value.copy() for name, value in look.arrays.items()},
        "controller": _plain(robot.controller),
        "gripper": np.array(robot.gripper.current_action),
        "observables": {
            name: {key: copy.copy(getattr(one, key)) for key in _SAMPLING}
            for name, one in raw._observables.items()
            if one.is_enabled()
        },
        "times": {name: getattr(raw, name) for name in _TIMES},
    }


def apply(raw: Any, look: Look, physics: np.ndarray, rest: Mapping[str, Any]) -> None:
    """Puts a simulation of the same task into the captured state.

    Raises:
        ValueError: the state does not fit this model: it is of another task.
    """
    model, data, robot = raw.sim.model._model, raw.sim.data._data, raw.robots[0]
    if physics.shape != (mujoco.mj_stateSize(model, PHYSICS),):
        raise ValueError("the snapshot's physics does not fit this scene: it is of another task")
    look.arrays = {name: value.copy() for name, value in rest["look"].items()}
    look.put(raw.sim)
    for name, value in rest["model"].items():
        getattr(model, name)[...] = value
    mujoco.mj_setState(model, data, physics, PHYSICS)
    stability.forgive(data)
    vars(robot.controller).update(copy.deepcopy(rest["controller"]))
    robot.gripper.current_action = rest["gripper"].copy()
    for name, values in rest["observables"].items():
        vars(raw._observables[name]).update(copy.deepcopy(values))
    vars(raw).update(rest["times"])


def _plain(holder: Any) -> dict[str, Any]:
    """The attributes that are numbers or arrays of them, copied."""
    return {
        name: copy.copy(value)
        for name, value in vars(holder).items()
        if isinstance(value, _SCALARS) or (isinstance(value, np.ndarray) and value.dtype != object)
    }
