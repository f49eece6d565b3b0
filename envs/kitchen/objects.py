"""Things that stand on the counter: primitives, each with one hidden collision box and a free joint.

All have nearly the same footprint, so that any of them may be the one to grasp or a distractor.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.kitchen.scene import GEOM, HIDDEN_GROUP, SceneBuilder
from envs.kitchen.world import World


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of the catalogue; sizes are half extents in metres."""

    name: str
    half: tuple[float, float, float]  # collision box
    shape: str  # box, cylinder or ellipsoid
    material: str


CATALOGUE: dict[str, Thing] = {
    thing.name: thing
    for thing in (
        Thing("can", (0.024, 0.024, 0.045), "cylinder", "red"),
        Thing("carton", (0.025, 0.025, 0.055), "box", "cream"),
        Thing("lime", (0.025, 0.025, 0.025), "ellipsoid", "green"),
        Thing("eggplant", (0.024, 0.024, 0.040), "ellipsoid", "violet"),
        Thing("cup", (0.026, 0.026, 0.035), "cylinder", "blue"),
        Thing("lemon", (0.024, 0.024, 0.028), "ellipsoid", "lemon"),
    )
}


def add_things(scene: SceneBuilder, names: tuple[str, ...], movable: bool = True) -> None:
    """Adds objects as bodies named after them; without `movable` they are fixed to where `scatter` puts them."""
    for name in names:
        thing = CATALOGUE[name]
        body = scene.body(name, [0, 0, -1.0])
        if movable:
            body.add_freejoint(name=name)
        scene.box(
            body, thing.material, [0, 0, 0], thing.half, contact="object" if movable else "fixture",
            group=HIDDEN_GROUP, mass=0.12, friction=[1.2, 0.02, 0.001],
        )  # fmt: skip
        x, _, z = thing.half
        if thing.shape == "cylinder":
            scene.cylinder(body, thing.material, [0, 0, 0], x, z, contact="none", mass=0)
        else:
            kind = GEOM.mjGEOM_BOX if thing.shape == "box" else GEOM.mjGEOM_ELLIPSOID
            scene.geom(body, kind, thing.material, thing.half, contact="none", mass=0)


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
        height = zone.z + CATALOGUE[name].half[2] + 0.0005
        world.place(name, np.array([*place, height]), yaw=rng.uniform(-0.3, 0.3))
