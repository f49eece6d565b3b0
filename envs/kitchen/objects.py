"""Loose objects: primitives, each with one hidden collision box and a free joint; and fixed plates and pans.

All have nearly the same footprint, so that each can be the one to grasp or a distractor. A thing's name is its name in
instructions. Each split of the catalogue has its own things.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.kitchen.scene import GEOM, HIDDEN_GROUP, SceneBuilder
from envs.kitchen.world import World


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a catalogue; sizes are half extents in metres."""

    name: str
    half: tuple[float, float, float]  # collision box
    shape: str  # box, cylinder, ellipsoid or mug
    material: str


def _catalogue(*things: Thing) -> dict[str, Thing]:
    return {thing.name: thing for thing in things}


CATALOGUE: dict[str, dict[str, Thing]] = {
    "train": _catalogue(
        Thing("can", (0.024, 0.024, 0.045), "cylinder", "red"),
        Thing("carton", (0.025, 0.025, 0.055), "box", "cream"),
        Thing("lime", (0.025, 0.025, 0.025), "ellipsoid", "green"),
        Thing("cup", (0.026, 0.026, 0.035), "cylinder", "blue"),
        Thing("mug", (0.030, 0.030, 0.042), "mug", "china"),
    ),
    "heldout": _catalogue(
        Thing("can", (0.027, 0.027, 0.036), "cylinder", "teal"),
        Thing("eggplant", (0.026, 0.026, 0.045), "ellipsoid", "violet"),
        Thing("cup", (0.024, 0.024, 0.042), "cylinder", "pink"),
        Thing("lemon", (0.026, 0.026, 0.025), "ellipsoid", "lemon"),
        Thing("mug", (0.028, 0.028, 0.048), "mug", "brown"),
    ),
}
OBJECT_SPLITS = tuple(CATALOGUE)


def add_things(scene: SceneBuilder, names: tuple[str, ...], movable: bool = True) -> None:
    """Adds objects as bodies named after them; without `movable` they are fixed to where `scatter` puts them."""
    for name in names:
        thing = CATALOGUE[scene.objects][name]
        body = scene.body(name, [0, 0, -1.0])
        if movable:
            body.add_freejoint(name=name)
        scene.box(
            body, thing.material, [0, 0, 0], thing.half, contact="object" if movable else "fixture",
            group=HIDDEN_GROUP, mass=0.12, friction=[1.2, 0.02, 0.001],
        )  # fmt: skip
        x, _, z = thing.half
        if thing.shape in ("cylinder", "mug"):
            scene.cylinder(body, thing.material, [0, 0, 0], x, z, contact="none", mass=0)
            if thing.shape == "mug":
                _add_handle(scene, body, thing)
        else:
            kind = GEOM.mjGEOM_BOX if thing.shape == "box" else GEOM.mjGEOM_ELLIPSOID
            scene.geom(body, kind, thing.material, thing.half, contact="none", mass=0)


def _add_handle(scene: SceneBuilder, body: object, mug: Thing) -> None:
    """The handle on a mug's far side: to be seen, not to be held."""
    x, _, z = mug.half
    # A body of its own, or mj_multiRay would lose what juts out of the mug; turned to be clear of the fingers.
    body = scene.body(f"{mug.name}_handle", [0, 0, 0], body, yaw=-0.8)
    corners = [[x, 0, 0.6 * z], [x + 0.022, 0, 0.5 * z], [x + 0.022, 0, -0.4 * z], [x, 0, -0.5 * z]]
    for start, end in zip(corners, corners[1:], strict=False):
        scene.capsule(body, mug.material, start, end, 0.006, contact="none", mass=0)
    scene.cylinder(body, "inside", [0, 0, z], 0.8 * x, 0.001, contact="none", mass=0)


@dataclasses.dataclass(frozen=True)
class Zone:
    """A rectangle on a surface where objects may stand, world metres."""

    x: tuple[float, float]
    y: tuple[float, float]
    z: float


def scatter(
    world: World,
    rng: np.random.Generator,
    names: tuple[str, ...],
    zones: tuple[Zone, ...],
    others: tuple[Zone, ...] = (),
    gap: float = 0.11,
) -> None:
    """Puts objects at random places, at least `gap` metres apart (as far as 50 tries find such places).

    The first object stands in one of `zones`, the rest in `others` or, without these, in `zones` too.
    """
    taken: list[np.ndarray] = []
    for i, name in enumerate(names):
        choice = others if i and others else zones
        for _ in range(50):
            zone = choice[rng.integers(len(choice))]
            place = np.array([rng.uniform(*zone.x), rng.uniform(*zone.y)])
            if all(np.linalg.norm(place - other) >= gap for other in taken):
                break
        taken.append(place)
        height = zone.z + world.half(name)[2] + 0.0005
        world.place(name, np.array([*place, height]), yaw=rng.uniform(-0.3, 0.3))
