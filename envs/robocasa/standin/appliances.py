"""RoboCasa 1.0.1's appliances made of boxes, with the joints, sites, regions and names that its code asks for.

Each function returns the half sizes of the whole (x to the right, y to the back, z up; metres) and the content of the
body `object`. RoboCasa scales the result to what a scene asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from envs.robocasa.standin.mjcf import Solid, box, drawn, geom, joint, part, region, site

Model = tuple[tuple[float, float, float], str]
_BODY, _DOOR, _INSIDE = ".70 .71 .73 1", ".58 .60 .63 1", ".35 .36 .38 1"
_DARK, _GREEN, _RED = ".15 .15 .17 1", ".15 .65 .25 1", ".75 .18 .15 1"
_LIGHT = 'density="100"'
_QUARTER = 1.57


def _solid(solids: Sequence[Solid], rgba: str) -> str:
    return "".join(geom(solid, rgba, more=_LIGHT) for solid in solids)


def _named(name: str, solid: Solid, rgba: str) -> str:
    return geom(solid, rgba, name, _LIGHT)


def _housing(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], wall: float) -> list[Solid]:
    """Five boxes around a room that is open to the front; the numbers are the outside."""
    return [
        box(x, (y[1] - wall, y[1]), z),
        box(x, (y[0], y[1] - wall), (z[0], z[0] + wall)),
        box(x, (y[0], y[1] - wall), (z[1] - wall, z[1])),
        box((x[0], x[0] + wall), (y[0], y[1] - wall), (z[0] + wall, z[1] - wall)),
        box((x[1] - wall, x[1]), (y[0], y[1] - wall), (z[0] + wall, z[1] - wall)),
    ]


def _room(name: str, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> str:
    return region(name, *box(x, y, z)[1:])


def _grip(x: float, y: float, z: float, half: float, upright: bool) -> str:
    """A bar in front of a door, and what holds it."""
    along = (0, 0, 1) if upright else (1, 0, 0)
    thick = (0.008, 0.008, half) if upright else (half, 0.008, 0.008)
    posts: list[Solid] = [
        ("box", (x + sign * half * 0.9 * along[0], y + 0.018, z + sign * half * 0.9 * along[2]), (0.006, 0.018, 0.006))
        for sign in (-1, 1)
    ]
    return _named("door_handle_main", ("box", (x, y, z), thick), _DARK) + _solid(posts, _DARK)


def _hinged(
    name: str, hinge: str, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], at: str
) -> str:
    """A door whose hinge is at its "left", "right" or lower edge ("bottom"); RoboCasa takes 0 for closed."""
    middle = (y[0] + y[1]) / 2
    panel = geom(box(x, y, z), _DOOR, more=_LIGHT)
    centre = ((x[0] + x[1]) / 2, (z[0] + z[1]) / 2)
    if at == "bottom":
        turn = joint(hinge, "hinge", (1, 0, 0), (0, middle, z[0]), (0, _QUARTER))
        return part(name, turn, panel + _grip(centre[0], y[0] - 0.03, z[1] - 0.05, (x[1] - x[0]) * 0.35, upright=False))
    edge, free, span = (x[0], x[1] - 0.03, (-_QUARTER, 0)) if at == "left" else (x[1], x[0] + 0.03, (0, _QUARTER))
    turn = joint(hinge, "hinge", (0, 0, 1), (edge, middle, 0), span)
    return part(name, turn, panel + _grip(free, y[0] - 0.03, centre[1], (z[1] - z[0]) * 0.35, upright=True))


def _sliding(name: str, x: tuple[float, float], y: tuple[float, float], z: float, out: float, height: float) -> str:
    """A rack that slides to the front, with the region above it in which things lie."""
    slide = joint(f"{name}_joint", "slide", (0, -1, 0), (0, 0, 0), (0, out))
    return part(name, slide, geom(box(x, y, (z - 0.006, z)), _INSIDE, more=_LIGHT) + _room(name, x, y, (z, z + height)))


def _knob(name: str, pos: tuple[float, float, float], axis: tuple[float, float, float]) -> str:
    """A knob with a ridge that shows where it points."""
    flat = [0.02 - 0.01 * abs(component) for component in axis]  # 2 mm off what it stands on
    ridge = [0.004 + 0.007 * abs(component) for component in axis]
    ridge[0 if axis[2] else 2] = 0.019
    content = geom(("box", pos, flat), _DARK, f"{name}_main", _LIGHT) + drawn(("box", pos, ridge), ".9 .9 .9 1")
    return part(name, joint(f"{name}_joint", "hinge", axis, pos, (0, 2.6)), content)


def microwave() -> Model:
    half = (0.25, 0.19, 0.15)
    room, front = (-0.25, 0.13), -0.165
    body = _solid(_housing(room, (front, 0.19), (-0.15, 0.15), 0.015), _BODY)
    body += _solid([box((0.13, 0.25), (-0.19, 0.19), (-0.15, 0.15))], _BODY)
    body += _named("tray", box((-0.2, 0.1), (-0.13, 0.14), (-0.135, -0.127)), _INSIDE)
    body += _named("start_button", box((0.20, 0.24), (-0.199, -0.187), (-0.11, -0.08)), _GREEN)
    body += _named("stop_button", box((0.14, 0.18), (-0.199, -0.187), (-0.11, -0.08)), _RED)
    body += _hinged("door", "microjoint", (-0.25, 0.127), (-0.19, -0.168), (-0.148, 0.148), "left")
    body += _room("main", *((-size, size) for size in half))
    return half, body + _room("tray", (-0.225, 0.12), (-0.15, 0.165), (-0.127, 0.13))


def coffee_machine() -> Model:
    half = (0.12, 0.17, 0.18)
    body = _solid(
        [
            box((-0.12, 0.12), (-0.17, 0.17), (-0.18, -0.15)),
            box((-0.12, 0.12), (0.04, 0.17), (-0.15, 0.03)),
            box((-0.12, 0.12), (-0.15, 0.17), (0.03, 0.18)),
        ],
        _BODY,
    )
    body += _named("start_button", box((0.03, 0.08), (-0.162, -0.145), (0.09, 0.13)), _GREEN)
    body += site("receptacle_place_site", (0, -0.06, -0.15))
    body += site("coffee_liquid", (0, -0.06, -0.06), (0.004, 0.08), "cylinder", ".35 .2 .1 0")
    return half, body + _room("main", *((-size, size) for size in half))


def sink() -> Model:
    half = (0.38, 0.24, 0.11)
    back, tip = 0.20, 0.02
    walls = [
        box((-0.345, 0.345), (-0.215, 0.165), (-0.11, -0.095)),
        box((-0.345, -0.33), (-0.2, 0.15), (-0.095, 0.1)),
        box((0.33, 0.345), (-0.2, 0.15), (-0.095, 0.1)),
        box((-0.345, 0.345), (-0.215, -0.2), (-0.095, 0.1)),
        box((-0.345, 0.345), (0.15, 0.165), (-0.095, 0.1)),
        box((-0.38, 0.38), (0.15, 0.24), (0.1, 0.11)),
        box((-0.38, 0.38), (-0.24, -0.2), (0.1, 0.11)),
        box((-0.38, -0.33), (-0.2, 0.15), (0.1, 0.11)),
        box((0.33, 0.38), (-0.2, 0.15), (0.1, 0.11)),
        box((-0.04, 0.13), (0.175, 0.225), (0.11, 0.13)),
    ]
    spout = _solid(
        [
            ("cylinder", (0, back, 0.22), (0.014, 0.088)),
            box((-0.012, 0.012), (tip - 0.012, back + 0.01), (0.308, 0.328)),
            ("cylinder", (0, tip, 0.29), (0.012, 0.018)),
        ],
        _DOOR,
    ) + site("water", (0, tip, 0.09), (0.008, 0.18), "cylinder", ".5 .75 1 0")
    lever = _named("handle_main", box((0.08, 0.1), (0.09, 0.21), (0.158, 0.172)), _DARK)
    lever += _solid([("cylinder", (0.09, back, 0.15), (0.014, 0.016))], _DARK)
    lift = joint("handle_joint", "hinge", (-1, 0, 0), (0.09, back, 0.16), (0, 0.52))
    turn = joint("handle_temp_joint", "hinge", (0, 0, 1), (0.09, back, 0.16), (-0.79, 0.79))
    swing = joint("spout_joint", "hinge", (0, 0, 1), (0, back, 0), (-_QUARTER, _QUARTER))
    body = _solid(walls, _BODY) + part("spout", swing, spout) + part("handle", lift + turn, lever)
    body += _room("main", *((-size, size) for size in half))
    return half, body + _room("basin", (-0.32, 0.32), (-0.19, 0.14), (-0.095, 0.11))


def _burners(half: tuple[float, float, float], columns: dict[str, float], front: float) -> tuple[str, list[str]]:
    content, places = "", []
    for row, y in {"rear": half[1] * 0.48, "front": front}.items():
        for column, x in columns.items():
            place = f"{row}_{column}"
            content += site(f"burner_on_{place}", (x, y, half[2]), (0.075, 0.003), "cylinder", "1 .35 .05 0")
            content += site(f"burner_{place}_place_site", (x, y, half[2]))
            content += drawn(("cylinder", (x, y, half[2]), (0.085, 0.0015)), _DARK)
            places.append(place)
    return content + _room("main", *((-size, size) for size in half)), places


def stove(wide: bool = False) -> Model:
    half = (0.455, 0.35, 0.4575) if wide else (0.38, 0.33, 0.4575)
    reach = half[0] * (0.62 if wide else 0.5)
    columns = {"left": -reach, "right": reach} | ({"center": 0.0} if wide else {})
    body = _solid([box((-half[0], half[0]), (-half[1] + 0.02, half[1]), (-half[2], half[2]))], _BODY)
    content, places = _burners(half, columns, -half[1] * 0.45)
    for index, place in enumerate(places):
        x = half[0] * (-0.75 + 1.5 * index / (len(places) - 1))
        content += _knob(f"knob_{place}", (x, -half[1] + 0.008, half[2] - 0.06), (0, -1, 0))
    return half, body + content


def stove_wide() -> Model:
    return stove(wide=True)


def stovetop() -> Model:
    half = (0.38, 0.265, 0.03)
    body = _solid([box((-half[0], half[0]), (-half[1], half[1]), (-half[2], half[2]))], _INSIDE)
    content, places = _burners(half, {"left": -0.2, "right": 0.2}, -0.08)
    for index, place in enumerate(places):
        content += _knob(f"knob_{place}", (-0.15 + 0.1 * index, -half[1] + 0.035, half[2] + 0.012), (0, 0, 1))
    return half, body + content


def _fridge(split: str) -> Model:
    """`split`: "french" (two doors above a freezer drawer), "bottom" (one above it), "side" (freezer at the left)."""
    half, wall = (0.425, 0.40, 0.88), 0.04
    front = -half[1] + 0.07
    doors_y, low = (-half[1], front - 0.004), -half[2]
    bars = (-0.32, -0.32 + wall) if split != "side" else (-0.02, 0.02)
    body = _solid(_housing((-half[0], half[0]), (front, half[1]), (-half[2], half[2]), wall), _BODY)
    body += _room("main", *((-size, size) for size in half))
    inner_y, inner_x = (front + 0.02, half[1] - wall), (-half[0] + wall, half[0] - wall)
    if split == "side":
        body += _solid([box(bars, (front, half[1] - wall), (low + wall, half[2] - wall))], _BODY)
        rooms = {"freezer": (inner_x[0], bars[0], low + wall), "fridge": (bars[1], inner_x[1], low + wall)}
        edges: tuple[tuple[str, str, float, float], ...]
        edges = ("freezer_door", "left", -half[0], -0.002), ("fridge_door", "right", 0.002, half[0])
        doors_z = (low, half[2])
    else:
        body += _solid([box(inner_x, (front, half[1] - wall), bars)], _BODY)
        rooms = {"fridge": (*inner_x, bars[1])}
        edges = (("fridge_door", "right", -half[0], half[0]),)
        if split == "french":
            edges = ("fridge_left_door", "left", -half[0], -0.002), ("fridge_right_door", "right", 0.002, half[0])
        doors_z = (bars[0] + 0.002, half[2])
        panel = geom(box((-half[0], half[0]), doors_y, (low, bars[0] - 0.002)), _DOOR, more=_LIGHT)
        panel += _grip(0, doors_y[0] - 0.03, bars[0] - 0.06, 0.3, upright=False).replace("door_handle", "drawer_handle")
        floor = geom(box((-0.36, 0.36), (front + 0.02, 0.33), (low + 0.06, low + 0.07)), _INSIDE, more=_LIGHT)
        floor += _room("freezer_drawer0", (-0.35, 0.35), (front + 0.03, 0.32), (low + 0.07, bars[0] - 0.05))
        slide = joint("freezer_drawer0_joint", "slide", (0, -1, 0), (0, 0, 0), (0, 0.45))
        body += part("freezer_drawer0", slide, panel + floor)
    for room, (left, right, bottom) in rooms.items():
        step = (half[2] - wall - bottom) / 4
        for shelf in range(4):
            z = bottom + shelf * step
            if shelf:
                body += _solid([box((left, right), inner_y, (z - 0.01, z))], _INSIDE)
            if room == "fridge" and shelf == 0 and split != "side":
                body += _sliding(
                    "fridge_drawer0",
                    (left + 0.02, right - 0.02),
                    (inner_y[0], inner_y[1] - 0.01),
                    z + 0.02,
                    0.35,
                    step * 0.7,
                )
            else:
                body += _room(f"{room}{shelf}", (left, right), inner_y, (z, z + step - 0.02))
    for name, hinge, left, right in edges:
        door = _hinged(name, f"{name}_joint", (left, right), doors_y, doors_z, hinge)
        body += door.replace("door_handle_main", f"{name}_handle_main")
    return half, body


def fridge_french_door() -> Model:
    return _fridge("french")


def fridge_bottom_freezer() -> Model:
    return _fridge("bottom")


def fridge_side_by_side() -> Model:
    return _fridge("side")


def _baker(half: tuple[float, float, float], knobs: Sequence[str], racks: Sequence[str]) -> Model:
    """A housing behind a door that folds down, with racks; knobs stand in a strip above the door, if there are any."""
    wall, top = 0.02, half[2] - (0.10 * half[2] / 0.3 + 0.02 if knobs else 0)
    front = -half[1] + 0.035
    body = _solid(_housing((-half[0], half[0]), (front, half[1]), (-half[2], top), wall), _BODY)
    if knobs:
        body += _solid([box((-half[0], half[0]), (front - 0.02, half[1]), (top, half[2]))], _BODY)
    for index, name in enumerate(knobs):
        x = half[0] * (-0.7 + 1.4 * index / max(1, len(knobs) - 1))
        body += _knob(name, (x, front - 0.032, (top + half[2]) / 2), (0, -1, 0))
    y = (-half[1], front - 0.004)
    body += _hinged("door", "door_joint", (-half[0], half[0]), y, (-half[2], top - 0.002), "bottom")
    inside = (-half[0] + wall + 0.005, half[0] - wall - 0.005), (front + 0.01, half[1] - wall - 0.005)
    step = (top + half[2] - 2 * wall) / len(racks)
    for index, name in enumerate(racks):
        body += _sliding(name, *inside, -half[2] + wall + 0.02 + index * step, half[1] * 0.9, step - 0.03)
    return half, body + _room("main", *((-size, size) for size in half))


def oven() -> Model:
    return _baker((0.38, 0.30, 0.30), ("knob_time", "knob_temp"), ("rack0", "rack1"))


def dishwasher() -> Model:
    return _baker((0.30, 0.29, 0.41), (), ("rack0", "rack1"))


def toaster_oven() -> Model:
    return _baker((0.23, 0.18, 0.14), ("knob_doneness", "knob_function", "knob_temp", "knob_time"), ("rack0",))


def toaster() -> Model:
    half = (0.09, 0.15, 0.10)
    body = _solid(
        [box(x, (-0.13, 0.15), (-0.1, 0.1)) for x in ((-0.09, -0.06), (-0.015, 0.015), (0.06, 0.09))]
        + [box((-0.09, 0.09), y, (-0.1, 0.1)) for y in ((-0.13, -0.1), (0.12, 0.15))],
        _BODY,
    )
    for name, x in {"slotL": (-0.06, -0.015), "slotR": (0.015, 0.06)}.items():
        body += _named(f"{name}_floor", box(x, (-0.1, 0.12), (-0.1, -0.05)), _INSIDE)
        body += _room(name, x, (-0.1, 0.12), (-0.05, 0.1))
    lever = _named("lever_main", box((-0.02, 0.02), (-0.15, -0.134), (0.04, 0.055)), _DARK)
    body += part("lever", joint("lever_joint", "slide", (0, 0, -1), (0, 0, 0), (0, 0.09)), lever)
    body += _knob("knob_doneness", (0.055, -0.145, -0.03), (0, -1, 0))
    body += _push("button_cancel", box((-0.065, -0.045), (-0.15, -0.138), (-0.04, -0.02)), (0, 1, 0))
    return half, body + _room("main", *((-size, size) for size in half))


def _push(name: str, solid: Solid, axis: tuple[float, float, float]) -> str:
    """A button that springs back."""
    slide = joint(f"{name}_joint", "slide", axis, (0, 0, 0), (0, 0.006), 'stiffness="60" damping="2" armature="0.01"')
    return part(name, slide, _named(f"{name}_main", solid, _RED))


def electric_kettle() -> Model:
    half = (0.08, 0.11, 0.125)
    body = _solid(
        [("cylinder", (0, -0.03, -0.015), (0.075, 0.11)), box((-0.012, 0.012), (0.07, 0.11), (-0.09, 0.09))], _BODY
    )
    body += _solid([box((-0.012, 0.012), (0.03, 0.09), (0.075, 0.095))], _BODY)
    lid = geom(("cylinder", (0, -0.035, 0.107), (0.06, 0.007)), _DOOR, more=_LIGHT)
    body += part("lid", joint("lid_joint", "hinge", (-1, 0, 0), (0, 0.025, 0.107), (0, 1.4)), lid)
    switch = _named("switch_main", box((-0.01, 0.01), (0.113, 0.125), (-0.1, -0.08)), _GREEN)
    body += part("switch", joint("switch_joint", "hinge", (-1, 0, 0), (0, 0.113, -0.1), (0, 0.4)), switch)
    body += _push("button_lid", box((-0.008, 0.008), (0.093, 0.108), (0.099, 0.108)), (0, 0, -1))
    return half, body + _room("main", *((-size, size) for size in half))


def blender() -> Model:
    half = (0.09, 0.10, 0.19)
    body = _solid([box((-0.09, 0.09), (-0.09, 0.1), (-0.19, -0.07))], _BODY)
    body += _solid([box((-0.07, 0.07), (-0.06, 0.08), (-0.07, -0.055))], _DOOR)
    body += _solid([box(x, (-0.06, 0.08), (-0.055, 0.18)) for x in ((-0.07, -0.062), (0.062, 0.07))], _DOOR)
    body += _solid([box((-0.062, 0.062), y, (-0.055, 0.18)) for y in ((-0.06, -0.052), (0.072, 0.08))], _DOOR)
    body += _named("power_button_main", box((-0.02, 0.02), (-0.1, -0.088), (-0.15, -0.12)), _GREEN)
    return half, body + _room("main", *((-size, size) for size in half))


def stand_mixer() -> Model:
    half = (0.11, 0.18, 0.17)
    body = _solid(
        [
            box((-0.1, 0.1), (-0.18, 0.18), (-0.17, -0.14)),
            box((-0.06, 0.06), (0.08, 0.18), (-0.14, 0.055)),
        ],
        _BODY,
    )
    head = geom(box((-0.055, 0.055), (-0.16, 0.15), (0.068, 0.165)), _DOOR, more=_LIGHT)
    body += part("head", joint("head_joint", "hinge", (-1, 0, 0), (0, 0.15, 0.068), (0, 0.8)), head)
    bowl = _solid([("box", (0, -0.05, -0.128), (0.09, 0.09, 0.008))], _INSIDE)
    bowl += _solid([box(x, (-0.14, 0.04), (-0.12, 0.02)) for x in ((-0.09, -0.082), (0.082, 0.09))], _INSIDE)
    bowl += _solid([box((-0.082, 0.082), y, (-0.12, 0.02)) for y in ((-0.14, -0.132), (0.032, 0.04))], _INSIDE)
    body += part("bowl", joint("bowl_joint", "hinge", (0, 0, 1), (0, -0.05, 0), (0, 0.3)), bowl)
    body += _knob("knob_speed", (0.073, 0.12, 0.0), (1, 0, 0))
    body += _push("button_head_lock", box((-0.08, -0.068), (0.11, 0.13), (-0.01, 0.01)), (1, 0, 0))
    body += _room("bowl", (-0.08, 0.08), (-0.13, 0.03), (-0.12, 0.05))
    return half, body + _room("main", *((-size, size) for size in half))


APPLIANCES: dict[str, Callable[[], Model]] = {
    builder.__name__: builder
    for builder in (
        blender,
        coffee_machine,
        dishwasher,
        electric_kettle,
        fridge_bottom_freezer,
        fridge_french_door,
        fridge_side_by_side,
        microwave,
        oven,
        sink,
        stand_mixer,
        stove,
        stove_wide,
        stovetop,
        toaster,
        toaster_oven,
    )
}
