"""The few kinds of MJCF text that stand-ins are made of: solids that collide, are drawn and have a colour of their own.

RoboCasa reads group 0 as what collides and weighs, group 1 as what is drawn, and geoms named reg_* as regions.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence

Vector = Sequence[float]
# A solid's shape: "box", with three half sizes, or "cylinder", with radius and half height.
Solid = tuple[str, Vector, Vector]  # shape, centre, size; metres


def numbers(values: Vector) -> str:
    """Values as MJCF writes them."""
    return " ".join(f"{value:.5g}" for value in values)


def colour(name: str, variant: str = "", saturation: float = 0.45) -> str:
    """A colour (rgba as text) that belongs to a name; variants of it differ in lightness alone."""
    hue = zlib.crc32(name.encode()) % 360 / 360
    light = 0.5 + zlib.crc32(variant.encode()) % 5 / 25 if variant else 0.58
    return numbers((*colorsys.hls_to_rgb(hue, light, saturation), 1))


def geom(solid: Solid, rgba: str = "", name: str | None = None, more: str = "", looks: str = "") -> str:
    """A solid twice: what collides, and what is drawn.

    Args:
        solid: shape, centre and size.
        rgba: colour of what is drawn, as text; or `looks`, other attributes for it, e.g. a material.
        name: of what collides; RoboCasa looks for contacts by it.
        more: further attributes of what collides, as text.
    """
    shape, pos, size = solid
    common = f'type="{shape}" pos="{numbers(pos)}" size="{numbers(size)}"'
    label = f' name="{name}"' if name else ""
    return f'<geom{label} group="0" {common} rgba="0.5 0 0 0.5" {more}/>' + drawn(solid, rgba, looks)


def drawn(solid: Solid, rgba: str = "", looks: str = "") -> str:
    """A solid that can be seen and touches nothing."""
    shape, pos, size = solid
    return (
        f'<geom group="1" contype="0" conaffinity="0" mass="0" type="{shape}" pos="{numbers(pos)}" '
        f'size="{numbers(size)}" {looks or f"""rgba="{rgba}" """}/>'
    )


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> Solid:
    """A box by where it begins and ends on each axis."""
    ends = (x, y, z)
    return "box", [(low + high) / 2 for low, high in ends], [(high - low) / 2 for low, high in ends]


_STAYS = 'damping="0.2" frictionloss="0.1" armature="0.01"'


def joint(name: str, kind: str, axis: Vector, pos: Vector, span: tuple[float, float], more: str = _STAYS) -> str:
    """A hinge or slide joint with two stops (radians or metres); unless `more` says otherwise it stays where it is."""
    return (
        f'<joint name="{name}" type="{kind}" axis="{numbers(axis)}" pos="{numbers(pos)}" limited="true" '
        f'range="{numbers(span)}" {more}/>'
    )


def part(name: str, joints: str, content: str) -> str:
    """A body that moves; weightless, since a joint's friction alone shall hold it."""
    return f'<body name="{name}" gravcomp="1">{joints}{content}</body>'


def region(name: str, pos: Vector, half: Vector) -> str:
    """A box that RoboCasa measures by: reg_main, reg_bbox, reg_int, …; it neither collides nor shows."""
    return (
        f'<geom name="reg_{name}" group="1" contype="0" conaffinity="0" mass="0" type="box" '
        f'pos="{numbers(pos)}" size="{numbers(half)}" rgba="0 1 0 0"/>'
    )


def site(name: str, pos: Vector, size: Vector = (0.005,), shape: str = "sphere", rgba: str = "0 0 0 0") -> str:
    """A named place."""
    return f'<site name="{name}" type="{shape}" pos="{numbers(pos)}" size="{numbers(size)}" rgba="{rgba}"/>'


def open_box(half: Vector, wall: float, floor: float) -> list[Solid]:
    """Five boxes, a floor and four walls, that hold what is put in from above; their hull has the half sizes given."""
    x, y, z = half
    return [
        ("box", (0, 0, floor / 2 - z), (x, y, floor / 2)),
        ("box", (wall / 2 - x, 0, floor / 2), (wall / 2, y, z - floor / 2)),
        ("box", (x - wall / 2, 0, floor / 2), (wall / 2, y, z - floor / 2)),
        ("box", (0, wall / 2 - y, floor / 2), (x - wall, wall / 2, z - floor / 2)),
        ("box", (0, y - wall / 2, floor / 2), (x - wall, wall / 2, z - floor / 2)),
    ]


def shaped(shape: str, half: Vector, wall: float, floor: float) -> list[Solid]:
    """The solids of a thing with these half sizes: a "box", an upright "cylinder", or "open" to hold things.

    Args:
        wall, floor: thicknesses of what is open.
    """
    if shape == "open":
        return open_box(half, wall, floor)
    return [("cylinder", (0, 0, 0), (half[0], half[2]))] if shape == "cylinder" else [("box", (0, 0, 0), half)]


def model(name: str, body: str, sites: str = "", assets: str = "") -> str:
    """A model file: RoboCasa wants an outer body without a name that holds the body `object`, and an asset element."""
    return (
        f'<mujoco model="{name}"><compiler angle="radian"/><asset>{assets}</asset><worldbody><body>'
        f'<body name="object">{body}</body>{sites}</body></worldbody></mujoco>\n'
    )
