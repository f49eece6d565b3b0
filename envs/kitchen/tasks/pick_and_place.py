"""Picking a thing and placing it elsewhere; every task ends with the hand 0.25 m away from it."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import Zone, add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import DOWN, Task
from envs.kitchen.world import World

FAR = 0.25  # metres between hand and thing
TOUCH = 0.01  # metres that a thing's lowest point may be from the surface it stands on
DISHES = {  # radius and height of the surface that things stand on, metres
    "plate": (fixtures.PLATE_RADIUS, fixtures.PLATE_TOP),
    "pan": (fixtures.PAN_RADIUS, fixtures.PAN_TOP),
}


class PickAndPlace(Task):
    """Base: move one thing from its place to a goal."""

    start_spread = (0.06, 0.08, 0.05, 0.06, 0.06, 0.06)
    source: str  # as the instruction says it
    goal: str

    def placed(self, world: World, thing: str) -> bool:
        """Whether a thing is where it should be."""
        raise NotImplementedError

    def success(self, world: World) -> bool:
        target = world.memory["target"]
        return self.placed(world, target) and bool(np.linalg.norm(world.position(target) - world.eef) > FAR)

    def choose(self, world: World, rng: np.random.Generator) -> tuple[str, ...]:
        """Draws the thing to move; returns all things, that one first."""
        target = world.things[rng.integers(len(world.things))]
        world.memory["target"] = target
        return (target, *(name for name in world.things if name != target))

    def instruction(self, world: World) -> str:
        """The task in words."""
        return f"pick the {world.memory['target']} from the {self.source} and place it {self.goal}"


class CounterToSink(PickAndPlace):
    """From the counter into the basin."""

    angles = DOWN
    start_offset = (-0.08, 0.0, 0.20)
    left_eye = (-0.52, 0.22, 0.50)
    things = ("can", "carton", "lime", "cup")
    source, goal = "counter", "in the sink"

    def build(self, scene: SceneBuilder) -> None:
        fixtures.add_sink(scene)
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.24, 0.14, layout.counter_height + 0.02])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("sink", rng.uniform([-0.01, -0.03, 0.0], [0.01, 0.03, 0.0]))
        things = self.choose(world, rng)
        front, z = layout.counter_front, layout.counter_height
        near = Zone((front + 0.10, front + 0.36), (0.28, 0.42), z)
        far = Zone((front + 0.10, front + 0.50), (-0.50, -0.29), z)
        scatter(world, rng, things, (near,), others=(far,))  # RoboCasa too sets the distractors apart
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        return in_sink(world, world.position(thing))


def in_sink(world: World, point: np.ndarray) -> bool:
    """Whether a world point lies in the basin, at least 3 cm below its rim."""
    offset = point - world.position("sink")
    return bool((np.abs(offset[:2]) < fixtures.SINK_HALF).all() and -fixtures.SINK_DEPTH - 0.01 < offset[2] < -0.03)


def on_dish(world: World, thing: str, dish: str) -> bool:
    """Whether a thing stands on a plate or pan, within 0.7 of its radius."""
    place, (radius, top) = world.position(dish), DISHES[dish]
    aside = np.linalg.norm((world.position(thing) - place)[:2])
    return bool(aside < 0.7 * radius and abs(world.bottom(thing) - place[2] - top) < TOUCH)


def on_counter(world: World, thing: str) -> bool:
    """Whether a thing stands on the counter: not over its edges, nor on anything that stands there."""
    counter = world.model.body("counter").id
    half = world.model.geom_size[world.model.body_geomadr[counter]]
    offset = world.position(thing) - world.position("counter")
    over = abs(world.bottom(thing) - world.position("counter")[2]) < TOUCH
    return bool(over and (np.abs(offset[:2]) < half[:2]).all())


def inside(world: World, thing: str, fixture: str, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether a thing's middle lies in a box of a fixture's frame and the thing stands on the box's floor."""
    offset = world.local(fixture, world.position(thing))
    floor = world.position(fixture)[2] + low[2]
    return bool((low < offset).all() and (offset < high).all() and abs(world.bottom(thing) - floor) < TOUCH)


class _OntoDish(PickAndPlace):
    """Base: from above onto a plate or into a pan; `dish` is its body."""

    angles = DOWN
    start_offset = (-0.08, 0.0, 0.20)
    left_eye = (-0.50, 0.26, 0.54)
    dish = "plate"

    def spot(self, world: World) -> np.ndarray:
        """The point [3] that a thing should stand on."""
        return world.position(self.dish) + [0, 0, DISHES[self.dish][1]]

    def placed(self, world: World, thing: str) -> bool:
        return on_dish(world, thing, self.dish)


class SinkToCounter(_OntoDish):
    """From the basin onto the plate; another thing lies in the basin too."""

    start_offset = (-0.08, -0.06, 0.20)
    source, goal = "sink", "on the plate on the counter"

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_sink(scene)
        fixtures.add_plate(scene, [room.counter_front + 0.22, 0.37, room.counter_height])
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.24, 0.16, layout.counter_height])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        shift = rng.uniform([-0.01, -0.03, 0.0], [0.01, 0.03, 0.0])
        world.move("sink", shift)
        world.move("plate", rng.uniform([-0.06, -0.01, 0.0], [0.10, 0.05, 0.0]))
        target, near, far = self.choose(world, rng)
        front, height = layout.counter_front, layout.counter_height
        x, y = front + 0.25 + shift[0], shift[1]
        basin = Zone((x - 0.08, x + 0.08), (y - 0.11, y + 0.11), height - fixtures.SINK_DEPTH)
        counter = Zone((front + 0.10, front + 0.50), (-0.45, -0.29), height)
        scatter(world, rng, (target, near), (basin,))
        scatter(world, rng, (far,), (counter,))
        return self.instruction(world)


class CounterToStove(_OntoDish):
    """From the plate into the pan, which stands on a left burner."""

    source, goal, dish = "plate", "in the pan", "pan"

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_stove(scene, [room.counter_front, 0, room.counter_height], turning=False)
        fixtures.add_stove_sides(scene)
        fixtures.add_pan(scene, [room.counter_front + 0.16, 0.15, room.counter_height + 0.010])
        fixtures.add_plate(scene, [room.counter_front + 0.22, 0.46, room.counter_height])
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.26, 0.30, layout.counter_height + 0.02])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        shift = rng.uniform([-0.01, -0.01, 0.0], [0.01, 0.01, 0.0])
        world.move("stove", shift)
        burner = 0.26 * rng.integers(2)  # front or rear
        world.move("pan", shift + [burner, 0, 0] + rng.uniform([-0.015, -0.015, 0.0], [0.015, 0.015, 0.0]))
        world.move("plate", rng.uniform([-0.06, -0.01, 0.0], [0.10, 0.05, 0.0]))
        world.update()  # where the dishes stand now
        things = self.choose(world, rng)
        self.arrange(world, layout, rng, things)
        return self.instruction(world)

    def arrange(self, world: World, layout: Layout, rng: np.random.Generator, things: tuple[str, ...]) -> None:
        """Puts the target on the dish that it starts from and the others on the counter."""
        front, height = layout.counter_front, layout.counter_height
        x, y, z = world.position(self.source) + [0, 0, DISHES[self.source][1]]
        scatter(world, rng, things[:1], (Zone((x - 0.02, x + 0.02), (y - 0.02, y + 0.02), z),))
        left = Zone((front + 0.47, front + 0.55), (0.42, 0.62), height)
        right = Zone((front + 0.10, front + 0.50), (-0.60, -0.40), height)
        scatter(world, rng, things[1:], (left, right))


class StoveToCounter(CounterToStove):
    """From the pan on the stove onto the plate."""

    source, goal, dish = "pan", "on the plate", "plate"
