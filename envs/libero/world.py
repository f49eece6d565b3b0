"""Privileged poses of a LIBERO simulation, for experts: a function of the joint positions alone."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np


class World:
    """Where the hand and the things are, metres in the world's frame."""

    def __init__(self, raw: Any):
        self._raw, self._model = raw, raw.sim.model._model
        self._data = mujoco.MjData(self._model)
        self._shapes: dict[str, np.ndarray] = {}

    def update(self) -> None:
        """Computes poses from the present positions. Those in MuJoCo's own data may be a substep old."""
        self._data.qpos[:] = self._raw.sim.data._data.qpos
        mujoco.mj_kinematics(self._model, self._data)

    @property
    def eef(self) -> np.ndarray:
        """The point between the finger tips [3]."""
        return self._data.site_xpos[self._raw.robots[0].eef_site_id].copy()

    @property
    def hand(self) -> np.ndarray:
        """The hand's rotation [3, 3]: columns are along the palm, along the fingers' opening, and where they point."""
        name = self._raw.robots[0].robot_model.eef_name
        return self._data.xmat[self._model.body(name).id].reshape(3, 3).copy()

    @property
    def gap(self) -> float:
        """Metres between the fingers."""
        one, other = self._raw.robots[0]._ref_gripper_joint_pos_indexes
        return float(self._data.qpos[one] - self._data.qpos[other])

    @property
    def table(self) -> float:
        """Height of the table's top."""
        return float(self._raw.workspace_offset[2])

    def joint(self, region: str) -> float:
        """Position of the joint that moves a fixture's part: a drawer, a door, a knob."""
        return float(self._data.qpos[self._model.joint(self._joint(region)).qposadr[0]])

    def joint_axis(self, region: str) -> tuple[np.ndarray, np.ndarray]:
        """(a point of the joint's axis, its direction) in the world."""
        joint = self._model.joint(self._joint(region))
        body = joint.bodyid[0]
        turn = self._data.xmat[body].reshape(3, 3)
        return self._data.xpos[body] + turn @ joint.pos, turn @ joint.axis

    def _joint(self, region: str) -> str:
        sites, things = self._raw.object_sites_dict, self._raw.fixtures_dict
        joints = sites[region].joints if region in sites else things[region].joints
        return next(iter(joints))

    def position(self, name: str) -> np.ndarray:
        """Of a thing's origin, or of a region's middle [3]."""
        if name in self._raw.obj_body_id:
            return self._data.xpos[self._raw.obj_body_id[name]].copy()
        return self._data.site_xpos[self._model.site(name).id].copy()

    def box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest coordinates [3] of what can be touched of a thing."""
        points = self._placed(name, self._shape(name))
        return points.min(0), points.max(0)

    def rim(self, name: str) -> np.ndarray:
        """Points of a dish's upper edge [P, 3]."""
        shape = self._shape(name)
        return self._placed(name, shape[shape[:, 2] > shape[:, 2].max() - 0.006])

    def free_x(self, name: str, point: np.ndarray, reach: float) -> float:
        """The x nearest to a point's, within `reach` of it, at which the open hand meets no other thing.

        The hand points down with its fingers along y. If there is no such x, the point's own is returned.
        """
        blocked = []
        for other in self._raw.objects_dict:
            start, end = self.box(other)
            for (low_x, high_x), half_y, height in _HAND:
                if other != name and end[2] > point[2] + height and _outside(start[1], end[1], point[1]) < half_y:
                    blocked.append((start[0] - high_x, end[0] - low_x))
        options = [float(point[0]), *(x for low, high in blocked for x in (low - 1e-3, high + 1e-3))]
        free = [x for x in options if abs(x - point[0]) <= reach and not any(low < x < high for low, high in blocked)]
        return min(free, key=lambda x: abs(x - point[0]), default=options[0])

    def tops_below(self, name: str, around: float) -> float:
        """Height of the highest fixture below a thing or within `around` metres of it; minus infinity for none."""
        low, high = self.box(name)
        tops = [-np.inf]
        for fixture in self._raw.fixtures_dict:
            if fixture not in self._raw.obj_body_id:  # the table itself
                continue
            start, end = self.box(fixture)
            if ((low - around < end) & (start < high + around))[:2].all():
                tops.append(end[2])
        return float(max(tops))

    def handle(self, region: str) -> tuple[np.ndarray, np.ndarray]:
        """As `box`, of the part that a hand moves a fixture by: a drawer's bar, a knob's fin."""
        body = self._model.joint(self._joint(region)).bodyid[0]
        shapes = []
        for geom, points in self._geoms(body):
            world = self._data.geom_xpos[geom] + points @ self._data.geom_xmat[geom].reshape(3, 3).T
            shapes.append((world.min(0), world.max(0)))
        # A drawer's bar stands out furthest, towards +y; a knob's fin is the highest.
        return max(shapes, key=lambda box: box[1][1] if region in self._raw.object_sites_dict else box[1][2])

    def _shape(self, name: str) -> np.ndarray:
        """Corners of a thing's collision shapes [P, 3], in its own frame, with drawers and doors as they were built."""
        if name not in self._shapes:
            body, model = self._raw.obj_body_id[name], self._model
            rest = mujoco.MjData(model)
            mujoco.mj_kinematics(model, rest)
            at, turn = rest.xpos[body], rest.xmat[body].reshape(3, 3)
            found = []
            for geom, points in self._geoms(body):
                world = rest.geom_xpos[geom] + points @ rest.geom_xmat[geom].reshape(3, 3).T
                found.append((world - at) @ turn)
            self._shapes[name] = np.concatenate(found)
        return self._shapes[name]

    def _placed(self, name: str, points: np.ndarray) -> np.ndarray:
        body = self._raw.obj_body_id[name]
        return points @ self._data.xmat[body].reshape(3, 3).T + self._data.xpos[body]

    def _geoms(self, body: int) -> list[tuple[int, np.ndarray]]:
        model = self._model
        inside = {body}
        for child in range(body + 1, model.nbody):  # parents come before their children
            if model.body_parentid[child] in inside:
                inside.add(child)
        touchable = (model.geom_contype | model.geom_conaffinity) != 0
        return [
            (geom, _corners(model, geom))
            for geom in range(model.ngeom)
            if model.geom_bodyid[geom] in inside and touchable[geom]
        ]


# What the open hand fills around the point between its finger tips: x, half of y, and from which height on; metres.
_HAND = (((-0.030, 0.041), 0.106, 0.030), ((-0.013, 0.017), 0.069, -0.010))


def _outside(low: float, high: float, value: float) -> float:
    """How far a value is outside of an interval."""
    return max(low - value, value - high, 0.0)


_UNIT = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def _corners(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Points around a shape [P, 3], in its own frame: the vertices of a mesh, else the corners of a box around it."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        return model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(float)
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return _UNIT * size[0]
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        cap = size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0
        return _UNIT * [size[0], size[0], size[1] + cap]
    return _UNIT * size
