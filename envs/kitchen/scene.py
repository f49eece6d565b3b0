"""Scene building: a thin layer over MjSpec with named materials, layouts (geometry) and styles (colours).

Colours are not compiled into the model: every geom carries a material name, and a style maps it to RGB at reset.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

# Collision bits. A pair collides when one's contype meets the other's conaffinity.
FIXED, ROBOT, OBJECT = 1, 2, 4
_CONTACT_BITS = {
    "fixture": (FIXED, 0),
    "robot": (ROBOT, FIXED),
    "object": (OBJECT, FIXED | ROBOT | OBJECT),
    "none": (0, 0),
}
VISIBLE_GROUPS = (0, 1)  # geom groups that cameras see
HIDDEN_GROUP = 3  # collision-only geoms

GEOM = mujoco.mjtGeom
JOINT = mujoco.mjtJoint


@dataclasses.dataclass(frozen=True)
class Layout:
    """Geometry of the room, metres. The robot's base stands at the origin and looks along +x."""

    counter_height: float = 0.92  # top surface above the floor
    counter_front: float = 0.50  # x of the counter's front edge
    counter_depth: float = 0.65  # front edge to wall
    side_wall: int = 0  # 1: a wall on the left, -1: on the right, 0: none
    tiles: bool = False  # a strip of tiles on the wall over the counter
    window: bool = False  # a window in the wall, on the right

    @property
    def wall(self) -> float:
        """x of the wall's surface."""
        return self.counter_front + self.counter_depth


@dataclasses.dataclass(frozen=True)
class Style:
    """RGB per room material; materials absent here have one colour in every style (`COLOURS`)."""

    wall: tuple[float, float, float]
    floor: tuple[float, float, float]
    counter: tuple[float, float, float]
    cabinet: tuple[float, float, float]
    appliance: tuple[float, float, float]


LAYOUTS: dict[str, Layout] = {
    "straight": Layout(),
    "low": Layout(0.86, 0.48, 0.62, tiles=True),
    "corner": Layout(0.94, 0.52, 0.68, side_wall=1),
    "deep": Layout(0.90, 0.54, 0.72, side_wall=-1, tiles=True),
    "high": Layout(0.97, 0.47, 0.61, window=True),
}
LAYOUT_SPLITS = {"train": ("straight", "low", "corner"), "heldout": ("deep", "high")}

STYLES: dict[str, Style] = {
    "oak": Style((0.80, 0.78, 0.72), (0.55, 0.50, 0.45), (0.62, 0.60, 0.58), (0.66, 0.47, 0.30), (0.30, 0.30, 0.33)),
    "white": Style((0.62, 0.70, 0.74), (0.45, 0.42, 0.40), (0.40, 0.38, 0.37), (0.88, 0.87, 0.84), (0.22, 0.22, 0.24)),
    "slate": Style((0.84, 0.80, 0.76), (0.60, 0.58, 0.55), (0.80, 0.76, 0.68), (0.32, 0.38, 0.44), (0.60, 0.60, 0.62)),
    "mint": Style((0.86, 0.82, 0.70), (0.38, 0.40, 0.44), (0.30, 0.32, 0.34), (0.55, 0.72, 0.62), (0.82, 0.82, 0.80)),
    "brick": Style((0.70, 0.48, 0.40), (0.68, 0.62, 0.52), (0.86, 0.84, 0.80), (0.45, 0.30, 0.22), (0.40, 0.42, 0.46)),
}
STYLE_SPLITS = {"train": ("oak", "white", "slate"), "heldout": ("mint", "brick")}

COLOURS: dict[str, tuple[float, float, float]] = {
    "metal": (0.72, 0.74, 0.77),
    "basin": (0.52, 0.55, 0.58),
    "handle": (0.92, 0.72, 0.10),
    "knob": (0.93, 0.93, 0.93),
    "burner": (0.10, 0.10, 0.11),
    "inside": (0.20, 0.16, 0.14),
    "window": (0.08, 0.10, 0.13),
    "hand": (0.20, 0.22, 0.26),
    "finger": (0.10, 0.35, 0.85),
    "arm": (0.90, 0.90, 0.92),
    "start": (0.10, 0.75, 0.20),
    "stop": (0.80, 0.10, 0.10),
    "lamp": (0.05, 0.08, 0.05),
    "water": (0.45, 0.70, 0.95),
    "red": (0.82, 0.12, 0.12),
    "green": (0.25, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.80),
    "cream": (0.95, 0.92, 0.80),
    "violet": (0.50, 0.20, 0.55),
    "lemon": (0.95, 0.85, 0.15),
    "orange": (0.95, 0.50, 0.10),
    "teal": (0.10, 0.55, 0.55),
    "olive": (0.45, 0.50, 0.15),
    "pink": (0.90, 0.50, 0.60),
    "brown": (0.40, 0.25, 0.15),
    "china": (0.93, 0.93, 0.96),
    "pan": (0.16, 0.16, 0.18),
    "tile": (0.78, 0.84, 0.86),
    "glass": (0.62, 0.80, 0.95),
}


def material_rgb(material: str, style: Style) -> tuple[float, float, float]:
    """The colour of a material in a style."""
    return getattr(style, material, None) or COLOURS[material]


Point = Sequence[float] | np.ndarray  # [3], metres


def look_at(eye: Point, target: Point) -> np.ndarray:
    """Quaternion wxyz [4] of a MuJoCo camera (looks along -z, y up) at `eye` that sees `target` in the centre."""
    back = np.asarray(eye, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quat


class SceneBuilder:
    """Collects bodies, geoms, joints and cameras; `compile` gives the MjModel.

    Geom names are "material/number", so that a compiled model still knows each geom's material. `objects` is the split
    of the objects' catalogue that the scene's things are taken from.
    """

    def __init__(self, layout: Layout, objects: str = "train"):
        self.layout = layout
        self.objects = objects
        self.spec = mujoco.MjSpec()
        self.spec.compiler.degree = False
        option = self.spec.option
        option.timestep = 0.005
        option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        option.iterations = 20
        option.ls_iterations = 10
        self.world = self.spec.worldbody
        self._geoms = 0

    def body(self, name: str, pos: Sequence[float], parent: Any = None, yaw: float = 0.0) -> Any:
        """A body at `pos` in its parent (default: the world), turned by `yaw` about z."""
        quat = [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]
        return (parent or self.world).add_body(name=name, pos=list(pos), quat=quat)

    def geom(
        self, body: Any, kind: Any, material: str, size: Sequence[float], contact: str = "fixture", **options: Any
    ) -> str:
        """Adds a geom; `contact` is one of fixture, robot, object, none. Returns its name."""
        contype, conaffinity = _CONTACT_BITS[contact]
        options.setdefault("group", 1 if contact == "none" else 0)
        name = options.pop("name", None) or f"{material}/{self._geoms}"
        self._geoms += 1
        size = list(size) + [0.0] * (3 - len(size))
        body.add_geom(
            name=name,
            type=kind,
            size=size,
            contype=contype,
            conaffinity=conaffinity,
            rgba=[0.5, 0.5, 0.5, 1],
            **options,
        )
        return name

    def box(self, body: Any, material: str, pos: Sequence[float], half: Sequence[float], **options: Any) -> str:
        """A box with half sizes `half` centred at `pos`."""
        return self.geom(body, GEOM.mjGEOM_BOX, material, half, pos=list(pos), **options)

    def cylinder(
        self, body: Any, material: str, pos: Sequence[float], radius: float, half: float, **options: Any
    ) -> str:
        """A cylinder about z (turn it with `quat`)."""
        return self.geom(body, GEOM.mjGEOM_CYLINDER, material, [radius, half], pos=list(pos), **options)

    def capsule(
        self, body: Any, material: str, start: Sequence[float], end: Sequence[float], radius: float, **options: Any
    ) -> str:
        """A capsule between two points."""
        return self.geom(body, GEOM.mjGEOM_CAPSULE, material, [radius], fromto=[*start, *end], **options)

    def hinge(self, body: Any, name: str, axis: Sequence[float], limits: Sequence[float], **options: Any) -> None:
        """A limited hinge, radians."""
        self._joint(body, JOINT.mjJNT_HINGE, name, axis, limits, options)

    def slide(self, body: Any, name: str, axis: Sequence[float], limits: Sequence[float], **options: Any) -> None:
        """A limited slide, metres."""
        self._joint(body, JOINT.mjJNT_SLIDE, name, axis, limits, options)

    def _joint(
        self, body: Any, kind: Any, name: str, axis: Sequence[float], limits: Sequence[float], options: dict
    ) -> None:
        body.add_joint(name=name, type=kind, axis=list(axis), range=list(limits), limited=1, **options)

    def servo(self, joint: str, kp: float, kv: float, force: float, limits: Sequence[float]) -> None:
        """A position servo on a joint, named after it, with a force limit (N or N·m)."""
        self.spec.add_actuator(
            name=joint,
            target=joint,
            trntype=mujoco.mjtTrn.mjTRN_JOINT,
            gaintype=mujoco.mjtGain.mjGAIN_FIXED,
            biastype=mujoco.mjtBias.mjBIAS_AFFINE,
            gainprm=[kp] + [0] * 9,
            biasprm=[0, -kp, -kv] + [0] * 7,
            forcerange=[-force, force],
            forcelimited=1,
            ctrlrange=list(limits),
            ctrllimited=1,
        )

    def camera(self, body: Any, name: str, eye: Point, target: Point, fov: float) -> None:
        """A camera at `eye` looking at `target`, both in the body's frame; vertical field of view in degrees."""
        body.add_camera(name=name, pos=list(eye), quat=look_at(eye, target).tolist(), fovy=fov)

    def room(self) -> None:
        """Floor and walls."""
        layout = self.layout
        self.geom(self.world, GEOM.mjGEOM_PLANE, "floor", [3, 3, 0.1])
        self.box(self.world, "wall", [layout.wall + 0.05, 0, 1.25], [0.05, 2.5, 1.25])
        if layout.side_wall:
            self.box(self.world, "wall", [layout.wall - 1.0, 1.25 * layout.side_wall, 1.25], [1.0, 0.05, 1.25])
        if layout.tiles:
            place = [layout.wall, 0, layout.counter_height + 0.14]
            self.box(self.world, "tile", place, [0.006, 1.2, 0.14], contact="none")
        if layout.window:
            place = [layout.wall, -0.55, layout.counter_height + 0.45]
            self.box(self.world, "glass", place, [0.006, 0.25, 0.20], contact="none")

    def compile(self) -> mujoco.MjModel:
        """The compiled model."""
        return self.spec.compile()
