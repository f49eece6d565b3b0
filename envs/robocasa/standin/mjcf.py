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


def colour(name: str, variant: str = "") -> str:
    """A colour (rgba as text) that belongs to a name; a variant changes its lightness alone."""
    hue = zlib.crc32(name.encode()) % 360 / 360
    light = 0.5 + zlib.crc32(variant.encode()) % 5 / 25 if variant else 0.58
    return numbers((*colorsys.hls_to_rgb(hue, light, 0.45), 1))


def geom(solid: Solid, rgba: str, name: str | None = None, more: str = "") -> str:
    """A solid twice: what collides, and what is drawn. Only the first has the name and `more`, attributes as text."""
    shape, pos, size = solid
    common = f'type="{shape}" pos="{numbers(pos)}" size="{numbers(size)}"'
    label = f' name="{name}"' if name else ""
    drawn = f' name="{name}_visual"' if name else ""
    return (
        f'<geom{label} group="0" {common} rgba="0.5 0 0 0.5" {more}/>'
        f'<geom{drawn} group="1" contype="0" conaffinity="0" mass="0" {common} rgba="{rgba}"/>'
    )


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


def model(name: str, body: str, sites: str = "") -> str:
    """A model file: RoboCasa wants an outer body without a name that holds the body `object`, and an asset element."""
    return (
        f'<mujoco model="{name}"><compiler angle="radian"/><asset/><worldbody><body>'
        f'<body name="object">{body}</body>{sites}</body></worldbody></mujoco>\n'
    )
