"""Tells whether a MuJoCo simulation has broken down. Every suite that steps MuJoCo asks after each control step.

If a position, velocity or acceleration is huge or not a number, MuJoCo counts a warning, puts the scene back to its
compiled pose and steps on; for such a control it steps on without controls. A check of success would then judge a scene
that no action led to, so the episode must end there as a failure. The same holds for speeds that time steps cannot
resolve. They need not cause a warning: MuJoCo calls a value huge from 10^10 in SI units on.
"""

from __future__ import annotations

import functools
import logging
import math

import mujoco
import numpy as np

_NAMES = ("BADQPOS", "BADQVEL", "BADQACC", "BADCTRL")
_WARNINGS = {name: int(getattr(mujoco.mjtWarning, f"mjWARN_{name}")) for name in _NAMES}
_log = logging.getLogger(__name__)


def breakdown(model: mujoco.MjModel, data: mujoco.MjData) -> str:
    """What broke since the data were last reset or forgiven, e.g. "BADQACC at arm_yaw"; empty if nothing did.

    A joint that turns or slides by more than π (radians, metres) in one time step is broken too.
    """
    counts = data.warning.number
    if counts.any() and (found := [name for name, index in _WARNINGS.items() if counts[index]]):
        return ", ".join(f"{name} at {_place(model, name, data.warning.lastinfo[_WARNINGS[name]])}" for name in found)
    speeds = np.abs(data.qvel)
    if not speeds.max(initial=0.0) <= math.pi / model.opt.timestep:  # so that NaN is broken
        return f"speed {speeds.max():.3g} at {_place(model, 'speed', int(speeds.argmax()))}"
    return ""


def forgive(data: mujoco.MjData) -> None:
    """Clears the warnings. MuJoCo's states do not hold them, so after a restore they would be another episode's."""
    data.warning.number[:] = 0


@functools.cache
def keep_no_log() -> None:
    """MuJoCo's warnings go to Python's logging, not to MUJOCO_LOG.TXT in the working directory.

    Breakdowns are told to the caller anyway, and logged at level DEBUG. A handler that is there already stays.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_relay)


def _relay(text: str) -> None:
    _log.log(logging.DEBUG if "simulation is unstable" in text else logging.WARNING, "MuJoCo: %s", text)


def _place(model: mujoco.MjModel, name: str, index: int) -> str:
    """The joint or actuator that an index of qpos, of the degrees of freedom, or of the controls belongs to."""
    if name == "BADCTRL":
        return model.actuator(index).name or str(index)
    joint = np.searchsorted(model.jnt_qposadr, index, "right") - 1 if name == "BADQPOS" else model.dof_jntid[index]
    return model.joint(int(joint)).name or str(index)
