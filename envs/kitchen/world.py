"""One compiled scene with its data, controller and episode memory. Tasks and experts read and write it.

Randomisation writes into fields of the model (`MODEL_FIELDS`), which a snapshot carries; nothing is recompiled.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from envs.kitchen.robot import Controller
from envs.kitchen.scene import Style, material_rgb

MODEL_FIELDS = ("body_pos", "body_quat", "geom_rgba", "cam_pos", "cam_quat")


class World:
    """A scene in motion. `memory` holds the episode's choices and latches (plain Python values).

    `things` are the names of the scene's objects.
    """

    def __init__(self, model: mujoco.MjModel, things: tuple[str, ...] = ()):
        self.model = model
        self.things = things
        self.data = mujoco.MjData(model)
        self.controller = Controller(model, self.data)
        self.memory: dict[str, Any] = {}
        self.materials = [model.geom(i).name.split("/")[0] for i in range(model.ngeom)]
        self._nominal = {field: getattr(model, field).copy() for field in MODEL_FIELDS}
        self._eef = model.site("eef").id
        self._qpos = {model.joint(i).name: int(model.jnt_qposadr[i]) for i in range(model.njnt)}
        self._free = {model.joint(i).name for i in range(model.njnt) if model.jnt_type[i] == mujoco.mjtJoint.mjJNT_FREE}

    def clear(self) -> None:
        """Back to the compiled scene: data, model fields, memory."""
        mujoco.mj_resetData(self.model, self.data)
        self.set_fields(self._nominal)
        self.memory = {}

    def paint(self, style: Style, rng: np.random.Generator) -> None:
        """Colours every geom by its material, each varied by +-10 % per channel."""
        rgb = np.array([material_rgb(material, style) for material in self.materials])
        self.model.geom_rgba[:, :3] = np.clip(rgb * rng.uniform(0.9, 1.1, rgb.shape), 0.0, 1.0)

    def fields(self) -> dict[str, np.ndarray]:
        """Copies of the model fields that randomisation writes."""
        return {field: getattr(self.model, field).copy() for field in MODEL_FIELDS}

    def set_fields(self, fields: dict[str, np.ndarray]) -> None:
        """Inverse of `fields`."""
        for field in MODEL_FIELDS:
            getattr(self.model, field)[:] = fields[field]

    def update(self) -> None:
        """Brings body, geom and site poses up to date with qpos (a step leaves them one substep behind)."""
        mujoco.mj_kinematics(self.model, self.data)

    @property
    def eef(self) -> np.ndarray:
        """World position [3] of the tool point."""
        return self.data.site_xpos[self._eef]

    def site(self, name: str) -> np.ndarray:
        """World position [3] of a site."""
        return self.data.site(name).xpos

    def position(self, body: str) -> np.ndarray:
        """World position [3] of a body."""
        return self.data.body(body).xpos

    def local(self, body: str, point: np.ndarray) -> np.ndarray:
        """A world point [3] in a body's frame."""
        frame = self.data.body(body)
        return (point - frame.xpos) @ frame.xmat.reshape(3, 3)

    def half(self, thing: str) -> np.ndarray:
        """Half extents [3] of an object's collision box, which is its first geom."""
        return self.model.geom_size[self.model.body(thing).geomadr[0]]

    def bottom(self, thing: str) -> float:
        """Height of the lowest point of an object's collision box, however it lies."""
        frame = self.data.body(thing)
        return float(frame.xpos[2] - np.abs(frame.xmat[6:]) @ self.half(thing))

    def joint(self, name: str) -> float:
        """Value of a one-dimensional joint."""
        return float(self.data.qpos[self._qpos[name]])

    def set_joint(self, name: str, value: float) -> None:
        """Writes the value of a one-dimensional joint; call `update` before reading poses."""
        self.data.qpos[self._qpos[name]] = value

    def fraction(self, joint: str) -> float:
        """A joint's value as a fraction of its range."""
        low, high = self.model.joint(joint).range
        return float((self.joint(joint) - low) / (high - low))

    def move(self, body: str, offset: np.ndarray, yaw: float = 0.0) -> None:
        """Moves a fixture from where the scene was compiled, by `offset` [3] metres and `yaw` radians."""
        index = self.model.body(body).id
        self.model.body_pos[index] = self._nominal["body_pos"][index] + offset
        turned = np.empty(4)
        turn = np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])
        mujoco.mju_mulQuat(turned, turn, self._nominal["body_quat"][index])
        self.model.body_quat[index] = turned

    def place(self, thing: str, position: np.ndarray, yaw: float) -> None:
        """Puts an object (a free body, or a fixed one) at a world position [3]."""
        quat = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        if thing in self._free:
            address = self._qpos[thing]
            self.data.qpos[address : address + 7] = [*position, *quat]
        else:
            index = self.model.body(thing).id
            self.model.body_pos[index], self.model.body_quat[index] = position, quat

    def tint(self, geom: str, rgb: tuple[float, float, float]) -> None:
        """Recolours one geom, e.g. a lamp."""
        self.model.geom(geom).rgba[:3] = rgb

    def colour(self, geom: str) -> tuple[float, float, float]:
        """The present RGB of one geom."""
        red, green, blue = self.model.geom(geom).rgba[:3].tolist()
        return red, green, blue

    def show(self, geom: str, visible: bool) -> None:
        """Shows or hides a geom."""
        self.model.geom(geom).rgba[3] = float(visible)

    def jitter_cameras(self, rng: np.random.Generator, distance: float) -> None:
        """Shifts every camera by up to `distance` metres an axis; the wrist camera by a fifth of it."""
        for i in range(self.model.ncam):
            scale = distance / 5 if "hand" in self.model.camera(i).name else distance
            self.model.cam_pos[i] = self._nominal["cam_pos"][i] + rng.uniform(-scale, scale, 3)
