"""Fixtures of the kitchen as functions that add bodies, geoms, joints and sites to a scene.

Each fixture is one body at `pos` (so that randomisation moves it as a whole) in which x points into the wall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from envs.kitchen.scene import HIDDEN_GROUP, SceneBuilder

DRAWER_TRAVEL = 0.25  # metres
SINK_HALF = (0.17, 0.21)  # half extents of the basin's opening, x and y, metres
SINK_DEPTH = 0.15
PLATE_RADIUS, PLATE_TOP = 0.095, 0.012
PAN_RADIUS, PAN_TOP = 0.105, 0.008
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


def add_faucet(scene: SceneBuilder, pos: Sequence[float], water: bool = False) -> None:
    """A faucet: joints `faucet_spout` and `faucet_handle` (0 is off, positive swings the lever outwards, to -y).

    With `water`, a geom `water/jet` below the spout's end, to be shown and hidden.
    """
    body = scene.body("faucet", pos)
    scene.cylinder(body, "metal", [0, 0, 0.015], 0.026, 0.015)
    scene.capsule(body, "metal", [0, 0, 0.03], [0, 0, 0.24], 0.013)
    spout = scene.body("faucet_spout", [0, 0, 0.24], body)
    scene.hinge(spout, "faucet_spout", [0, 0, 1], [-1.0, 1.0], damping=0.3, frictionloss=0.1, armature=0.002)
    scene.capsule(spout, "metal", [0, 0, 0], [-0.15, 0, 0.0], 0.012, mass=0.2)
    scene.capsule(spout, "metal", [-0.15, 0, 0], [-0.15, 0, -0.04], 0.012, mass=0.05)
    spout.add_site(name="spout_hinge", pos=[0, 0, -0.02])
    spout.add_site(name="spout_tip", pos=[-0.15, 0, -0.02])
    scene.cylinder(body, "metal", [0, -0.11, 0.045], 0.017, 0.045)
    handle = scene.body("faucet_handle", [0, -0.11, 0.10], body)
    scene.hinge(handle, "faucet_handle", [0, 0, 1], [0.0, 1.5], damping=0.15, frictionloss=0.08, armature=0.002)
    scene.cylinder(handle, "handle", [0, 0, 0], 0.018, 0.012, mass=0.05)
    scene.capsule(handle, "handle", [-0.01, 0, 0], [-0.13, 0, 0.01], 0.011, mass=0.1)
    handle.add_site(name="faucet_hinge", pos=[0, 0, 0])
    handle.add_site(name="faucet_tip", pos=[-0.11, 0, 0.005])
    if water:
        # A body of its own: mj_multiRay looks for a body's geoms only where those are that can collide.
        jet = scene.body("jet", [-0.15, 0, -0.20], spout)
        scene.cylinder(jet, "water", [0, 0, 0], 0.008, 0.15, contact="none", mass=0, name="water/jet")


def add_drawer(
    scene: SceneBuilder, pos: Sequence[float], half: Sequence[float] = (0.22, 0.09), name: str = "drawer"
) -> None:
    """A drawer whose front's outer surface is at `pos`; `half` is the front's half width and height.

    Body and joint `name`, site `<name>_handle`.
    """
    width, height = half
    body = scene.body(name, pos)
    scene.box(body, "inside", [0.001, 0, 0], [0.002, width + 0.01, height + 0.01])
    drawer = scene.body(f"{name}_box", [-0.02, 0, 0], body)
    scene.slide(drawer, name, [-1, 0, 0], [0.0, DRAWER_TRAVEL], damping=15.0, frictionloss=2.0)
    scene.box(drawer, "cabinet", [0, 0, 0], [0.018, width, height], mass=1.0)
    for side in (1, -1):
        scene.box(drawer, "inside", [0.15, side * (width - 0.02), -0.02], [0.14, 0.006, 0.05], mass=0.3)
        scene.capsule(drawer, "handle", [-0.018, side * 0.06, 0], [-0.058, side * 0.06, 0], 0.007, mass=0.02)
    scene.box(drawer, "inside", [0.15, 0, -0.065], [0.14, width - 0.02, 0.005], mass=0.3)
    scene.capsule(drawer, "handle", [-0.058, -0.06, 0], [-0.058, 0.06, 0], 0.010, mass=0.05)
    drawer.add_site(name=f"{name}_handle", pos=[-0.058, 0, 0])


def add_cabinet(
    scene: SceneBuilder,
    pos: Sequence[float],
    half: Sequence[float] = (0.19, 0.22),
    depth: float = 0.33,
    doors: Sequence[str] = ("door",),
    bar: tuple[float, float] = (0.875, 0.045),
) -> None:
    """A wall cabinet; its front is at `pos`, `half` its half width and height; body `cabinet`.

    One door is hinged on the left; of two, the first on the left and the second on the right. Each name in `doors` is a
    joint (0 is shut, pi/2 is fully open) with sites `<name>_hinge` and `<name>_push` on the door's outer face and
    `<name>_handle` in the middle of its bar. `bar` says where that is: the part of the door's width from its hinge, and
    the metres before the door's middle. Site `cabinet_floor` is a place for a thing on the lowest board.
    """
    width, height = half
    body = scene.body("cabinet", pos)
    for side in (1, -1):
        scene.box(body, "cabinet", [depth / 2, side * (width - 0.01), 0], [depth / 2, 0.01, height])
        scene.box(body, "cabinet", [depth / 2, 0, side * (height - 0.01)], [depth / 2, width - 0.02, 0.01])
    scene.box(body, "inside", [depth / 2, 0, 0], [depth / 2 - 0.01, width - 0.02, 0.008])
    scene.box(body, "inside", [depth - 0.005, 0, 0], [0.005, width - 0.02, height - 0.02])
    body.add_site(name="cabinet_floor", pos=[0.11, -0.02, -height + 0.02])
    span = 2 * width / len(doors)
    for side, name in zip((1, -1), doors, strict=False):
        _add_door(scene, body, name, [-0.012, side * width, 0], (-side * span, height), bar)


def _add_door(
    scene: SceneBuilder,
    cabinet: object,
    name: str,
    hinge: Sequence[float],
    size: tuple[float, float],
    bar: tuple[float, float],
) -> None:
    """A door of `size`: metres along y from its hinge to its free edge, and half its height."""
    (span, height), (part, standoff) = size, bar
    door = scene.body(name, hinge, cabinet)
    inwards = 1.0 if span > 0 else -1.0
    scene.hinge(door, name, [0, 0, inwards], [0.0, 1.5708], damping=0.8, frictionloss=0.15, armature=0.01)
    scene.box(door, "cabinet", [0, span / 2, 0], [0.010, abs(span) / 2 - 0.002, height - 0.002], mass=1.5)
    edge = part * span
    for end in (-0.14, -0.02):
        scene.capsule(door, "handle", [-0.01, edge, end], [-standoff, edge, end], 0.006, mass=0.02)
    scene.capsule(door, "handle", [-standoff, edge, -0.14], [-standoff, edge, -0.02], 0.009, mass=0.04)
    door.add_site(name=f"{name}_hinge", pos=[-0.010, 0, 0.06])
    door.add_site(name=f"{name}_push", pos=[-0.010, edge, 0.06])
    door.add_site(name=f"{name}_handle", pos=[-standoff, edge, -0.08])


def add_stove(scene: SceneBuilder, pos: Sequence[float], turning: bool = True) -> None:
    """A stove with four burners and a front panel of four knobs; body `stove`, its origin at the top's front edge.

    Joints `knob 0` to `knob 3`, numbered as BURNERS and standing from left to right in the order of KNOB_ORDER;
    0 is off, positive turns the bar's top to the left. Sites `knob_push i` and `knob_hub i`. Without `turning`, the
    knobs have no joints.
    """
    body = scene.body("stove", pos)
    scene.box(body, "appliance", [0.30, 0, -0.43], [0.30, 0.32, 0.43])
    scene.box(body, "appliance", [-0.01, 0, -0.06], [0.01, 0.32, 0.06])
    for i, name in enumerate(BURNERS):
        x = 0.16 if "front" in name else 0.42
        y = 0.15 if "left" in name else -0.15
        scene.cylinder(body, "burner", [x, y, 0.004], 0.085, 0.006, contact="none", name=f"burner/of knob {i}")
    for place, i in enumerate(KNOB_ORDER):
        _add_knob(scene, body, i, [-0.02, 0.21 - 0.14 * place, -0.06], turning)


def add_stove_sides(scene: SceneBuilder) -> None:
    """Counters on both sides of a stove."""
    room = scene.layout
    half = room.counter_height / 2
    for side in (1, -1):
        scene.box(scene.world, "counter", [room.counter_front + 0.3, side * 0.82, half], [0.3, 0.48, half])


KNOB_ORDER = (0, 2, 3, 1)  # indices into BURNERS, knobs from left to right


def _add_knob(scene: SceneBuilder, stove: object, i: int, pos: Sequence[float], turning: bool) -> None:
    knob = scene.body(f"knob {i}", pos, stove)
    if turning:
        scene.hinge(knob, f"knob {i}", [-1, 0, 0], [0.0, 2.8], damping=0.02, frictionloss=0.03, armature=0.0005)
    scene.cylinder(knob, "burner", [-0.006, 0, 0], 0.026, 0.006, mass=0.02, quat=_TURN_TO_X)
    scene.box(knob, "knob", [-0.026, 0, 0], [0.014, 0.007, 0.036], mass=0.02)
    knob.add_site(name=f"knob_hub {i}", pos=[-0.020, 0, 0])
    knob.add_site(name=f"knob_push {i}", pos=[-0.020, 0, 0.027])


def _add_button(scene: SceneBuilder, parent: object, name: str, material: str, pos: Sequence[float]) -> None:
    """A spring-loaded button that is pressed along x; joint and site `name`."""
    button = scene.body(name, pos, parent)
    scene.slide(button, name, [1, 0, 0], [0.0, 0.012], stiffness=150.0, damping=4.0, armature=0.02)
    scene.cylinder(button, material, [0, 0, 0], 0.021, 0.014, mass=0.02, quat=_TURN_TO_X)
    button.add_site(name=name, pos=[-0.014, 0, 0])


def add_coffee_machine(scene: SceneBuilder, pos: Sequence[float], cup: bool = True) -> None:
    """A coffee machine; its origin is the middle of its foot; without `cup`, nothing stands under its dispenser.

    Joint and site `coffee_button`, geom `lamp/coffee`, site `coffee_place` on the foot under the dispenser.
    """
    body = scene.body("coffee_machine", pos)
    scene.box(body, "appliance", [0, 0, 0.015], [0.14, 0.11, 0.015])
    scene.box(body, "appliance", [0.09, 0, 0.17], [0.05, 0.11, 0.14])
    scene.box(body, "appliance", [0, 0, 0.32], [0.14, 0.11, 0.06])
    scene.cylinder(body, "metal", [-0.06, 0, 0.245], 0.02, 0.018)
    if cup:
        scene.cylinder(body, "cream", [-0.06, 0, 0.07], 0.035, 0.04, contact="none")
    body.add_site(name="coffee_place", pos=[-0.06, 0, 0.03])
    scene.box(body, "lamp", [-0.142, 0, 0.362], [0.003, 0.10, 0.012], contact="none", name="lamp/coffee")
    _add_button(scene, body, "coffee_button", "stop", [-0.15, 0, 0.31])


def add_microwave(scene: SceneBuilder, pos: Sequence[float]) -> None:
    """A microwave on the counter; its origin is the middle of its front's lower edge.

    Joints `microwave_door` (0 shut, hinged on the left), `microwave_start` and `microwave_stop`; geom `window/glow`.
    Site `microwave_floor` is a place for a thing inside.
    """
    body = scene.body("microwave", pos)
    body.add_site(name="microwave_floor", pos=[0.12, 0.05, 0.02])
    depth, width, height = 0.17, 0.24, 0.14
    for z in (0.01, 2 * height - 0.01):
        scene.box(body, "appliance", [depth, 0, z], [depth, width, 0.01])
    scene.box(body, "appliance", [depth, width - 0.01, height], [depth, 0.01, height - 0.02])
    scene.box(body, "appliance", [depth, -width + 0.06, height], [depth, 0.06, height - 0.02])
    scene.box(body, "appliance", [2 * depth - 0.01, 0.05, height], [0.01, 0.18, height - 0.02])
    door = scene.body("microwave_door", [-0.012, width, height], body)
    scene.hinge(door, "microwave_door", [0, 0, -1], [0.0, 1.5708], damping=0.6, frictionloss=0.3, armature=0.01)
    scene.box(door, "appliance", [0, -0.18, 0], [0.010, 0.178, height - 0.002], mass=1.0)
    scene.box(door, "window", [-0.011, -0.17, 0], [0.002, 0.13, 0.09], contact="none", mass=0, name="window/glow")
    scene.capsule(door, "metal", [-0.035, -0.335, -0.08], [-0.035, -0.335, 0.08], 0.008, mass=0.05)
    scene.box(body, "lamp", [-0.002, -width + 0.06, 2 * height - 0.045], [0.003, 0.045, 0.018], contact="none")
    _add_button(scene, body, "microwave_start", "start", [-0.008, -width + 0.06, 0.165])
    _add_button(scene, body, "microwave_stop", "stop", [-0.008, -width + 0.06, 0.085])


def add_plate(scene: SceneBuilder, pos: Sequence[float]) -> None:
    """A plate that stands fast at `pos`; body `plate`, PLATE_TOP above which things stand."""
    body = scene.body("plate", pos)
    scene.box(body, "china", [0, 0, PLATE_TOP / 2], [0.075, 0.075, PLATE_TOP / 2], group=HIDDEN_GROUP)
    scene.cylinder(body, "china", [0, 0, 0.003], 0.060, 0.003, contact="none")
    scene.cylinder(body, "china", [0, 0, PLATE_TOP / 2 + 0.003], PLATE_RADIUS, PLATE_TOP / 2 - 0.003, contact="none")
    scene.cylinder(body, "blue", [0, 0, PLATE_TOP], 0.072, 0.0005, contact="none")
    scene.cylinder(body, "china", [0, 0, PLATE_TOP], 0.066, 0.001, contact="none")


def add_pan(scene: SceneBuilder, pos: Sequence[float], parent: object = None) -> None:
    """A pan that stands fast at `pos`; body `pan`, PAN_TOP above which things lie, within a rim."""
    body = scene.body("pan", pos, parent)
    scene.box(body, "pan", [0, 0, PAN_TOP / 2], [0.085, 0.085, PAN_TOP / 2], group=HIDDEN_GROUP)
    scene.cylinder(body, "pan", [0, 0, PAN_TOP / 2], PAN_RADIUS, PAN_TOP / 2, contact="none")
    for i in range(8):
        turn = i * math.pi / 4
        place = [PAN_RADIUS * math.cos(turn), PAN_RADIUS * math.sin(turn), 0.020]
        quat = [math.cos(turn / 2), 0, 0, math.sin(turn / 2)]
        scene.box(body, "metal", place, [0.003, 0.0435, 0.020], quat=quat)
    scene.capsule(body, "pan", [-0.07, -0.08, 0.03], [-0.17, -0.19, 0.045], 0.010)
