"""Fixtures of the kitchen as functions that add bodies, geoms, joints and sites to a scene.

Each fixture is one body at `pos` (so that randomisation moves it as a whole) in which x points into the wall.
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.kitchen.scene import SceneBuilder

DRAWER_TRAVEL = 0.25  # metres
SINK_HALF = (0.17, 0.21)  # half extents of the basin's opening, x and y, metres
SINK_DEPTH = 0.15
BURNERS = ("front left", "front right", "rear left", "rear right")
_TURN_TO_X = [0.70710678, 0, 0.70710678, 0]  # quaternion that lays a cylinder's axis along x


def add_counter(scene: SceneBuilder, name: str = "counter") -> None:
    """A plain counter along the wall over closed cupboards; body `name`."""
    room = scene.layout
    depth = room.counter_depth / 2
    body = scene.body(name, [room.counter_front + depth, 0, room.counter_height])
    scene.box(body, "counter", [0, 0, -0.02], [depth, 1.2, 0.02])
    scene.box(body, "cabinet", [0.02, 0, -0.04 - 0.42], [depth - 0.02, 1.2, 0.42])


def add_sink(scene: SceneBuilder) -> None:
    """A counter with a basin; body `sink`, its origin in the middle of the opening at the counter's height."""
    room = scene.layout
    (hx, hy), depth = SINK_HALF, SINK_DEPTH
    center = room.counter_front + 0.08 + hx
    front, back = room.counter_front - center, room.wall - center
    body = scene.body("sink", [center, 0, room.counter_height])
    for side in (1, -1):
        scene.box(body, "counter", [(front + back) / 2, side * (hy + 0.5), -0.02], [(back - front) / 2, 0.5, 0.02])
        scene.box(body, "basin", [0, side * (hy + 0.005), -depth / 2 - 0.01], [hx, 0.005, depth / 2 - 0.01])
    for low, high in ((front, -hx), (hx, back)):
        scene.box(body, "counter", [(low + high) / 2, 0, -0.02], [(high - low) / 2, hy, 0.02])
        wall = high - 0.005 if high < 0 else low + 0.005
        scene.box(body, "basin", [wall, 0, -depth / 2 - 0.02], [0.005, hy, depth / 2 - 0.02])
    scene.box(body, "basin", [0, 0, -depth - 0.01], [hx, hy, 0.01])
    scene.box(body, "cabinet", [(front + back) / 2 + 0.02, 0, -0.56], [(back - front) / 2 - 0.02, 1.2, 0.36])


def add_faucet(scene: SceneBuilder, pos: Sequence[float]) -> None:
    """A faucet: joints `faucet_spout` and `faucet_handle` (0 is off, positive swings the lever outwards, to -y)."""
    body = scene.body("faucet", pos)
    scene.cylinder(body, "metal", [0, 0, 0.015], 0.026, 0.015)
    scene.capsule(body, "metal", [0, 0, 0.03], [0, 0, 0.24], 0.013)
    spout = scene.body("faucet_spout", [0, 0, 0.24], body)
    scene.hinge(spout, "faucet_spout", [0, 0, 1], [-1.0, 1.0], damping=0.3, frictionloss=0.1, armature=0.002)
    scene.capsule(spout, "metal", [0, 0, 0], [-0.15, 0, 0.0], 0.012, mass=0.2)
    scene.capsule(spout, "metal", [-0.15, 0, 0], [-0.15, 0, -0.04], 0.012, mass=0.05)
    scene.cylinder(body, "metal", [0, -0.11, 0.045], 0.017, 0.045)
    handle = scene.body("faucet_handle", [0, -0.11, 0.10], body)
    scene.hinge(handle, "faucet_handle", [0, 0, 1], [0.0, 1.5], damping=0.15, frictionloss=0.08, armature=0.002)
    scene.cylinder(handle, "handle", [0, 0, 0], 0.018, 0.012, mass=0.05)
    scene.capsule(handle, "handle", [-0.01, 0, 0], [-0.13, 0, 0.01], 0.011, mass=0.1)
    handle.add_site(name="faucet_hinge", pos=[0, 0, 0])
    handle.add_site(name="faucet_tip", pos=[-0.11, 0, 0.005])


def add_drawer(scene: SceneBuilder, pos: Sequence[float], half: Sequence[float] = (0.22, 0.09)) -> None:
    """A drawer whose front's outer surface is at `pos`; `half` is the front's half width and height. Joint `drawer`."""
    width, height = half
    body = scene.body("drawer", pos)
    scene.box(body, "inside", [0.001, 0, 0], [0.002, width + 0.01, height + 0.01])
    drawer = scene.body("drawer_box", [-0.02, 0, 0], body)
    scene.slide(drawer, "drawer", [-1, 0, 0], [0.0, DRAWER_TRAVEL], damping=15.0, frictionloss=2.0)
    scene.box(drawer, "cabinet", [0, 0, 0], [0.018, width, height], mass=1.0)
    for side in (1, -1):
        scene.box(drawer, "inside", [0.15, side * (width - 0.02), -0.02], [0.14, 0.006, 0.05], mass=0.3)
        scene.capsule(drawer, "handle", [-0.018, side * 0.06, 0], [-0.058, side * 0.06, 0], 0.007, mass=0.02)
    scene.box(drawer, "inside", [0.15, 0, -0.065], [0.14, width - 0.02, 0.005], mass=0.3)
    scene.capsule(drawer, "handle", [-0.058, -0.06, 0], [-0.058, 0.06, 0], 0.010, mass=0.05)
    drawer.add_site(name="drawer_handle", pos=[-0.058, 0, 0])
