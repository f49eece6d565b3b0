"""Pick and place with the hand level, through the front of a cabinet, a microwave or a coffee machine."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import Zone, add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import HELDOUT_THINGS
from envs.kitchen.tasks.pick_and_place import TOUCH, PickAndPlace, inside, on_counter, on_dish
from envs.kitchen.world import World


class Shelf(PickAndPlace):
    """Base: a fixture that is open to the front. `place` is a site in it where a thing may stand."""

    fixture: str
    place: str
    mouth = 0.0  # x of its opening in its own frame, metres
    door: str  # its joint, where it has one
    shift: tuple[tuple[float, float, float], tuple[float, float, float]]  # lowest and highest offset of `open`, metres
    start_offset = (-0.20, 0.0, 0.06)

    def spot(self, world: World) -> np.ndarray:
        """A free place [3] to put a thing on; by default in the fixture."""
        return world.site(self.place)

    def open(self, world: World, rng: np.random.Generator) -> np.ndarray:
        """Moves the fixture and opens its door; returns where it is now."""
        world.move(self.fixture, rng.uniform(*self.shift))
        world.set_joint(self.door, rng.uniform(0.94, 1.0) * np.pi / 2)
        world.update()
        return world.position(self.fixture).copy()

    def opening(self, world: World) -> float:
        """World x of the fixture's opening."""
        return float(world.position(self.fixture)[0]) + self.mouth

    def before(self, world: World) -> np.ndarray:
        """A place [3] on the counter before the fixture."""
        return np.array([self.opening(world) - 0.17, world.site(self.place)[1], world.position("counter")[2]])


class _Cabinet(Shelf):
    fixture, place, door = "cabinet", "cabinet_floor", "door"
    shift = ((-0.02, -0.05, -0.02), (0.01, 0.05, 0.03))
    half = (0.21, 0.20)
    left_eye = (-0.62, -0.34, 0.30)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_cabinet(scene, [room.wall - 0.34, 0, room.counter_height + 0.42], half=self.half)
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.wall - 0.40, 0.0, layout.counter_height + 0.16])


class CounterToCabinet(_Cabinet):
    """From the counter into the open cabinet."""

    source, goal = "counter", "in the cabinet"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        self.open(world, rng)
        things = self.choose(world, rng)
        front, z = layout.counter_front, layout.counter_height
        near = Zone((front + 0.08, front + 0.18), (-0.16, 0.10), z)
        back = Zone((front + 0.32, layout.wall - 0.12), (-0.34, 0.34), z)
        scatter(world, rng, things, (near,), others=(back,))
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        (width, height), depth = self.half, 0.33
        low, high = np.array([0.0, 0.02 - width, 0.02 - height]), np.array([depth, width - 0.02, 0.0])
        return inside(world, thing, "cabinet", low, high)


class CabinetToCounter(_Cabinet):
    """From the open cabinet, where another thing stands beside it, onto the counter."""

    source, goal = "cabinet", "on the counter"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        x, y, z = self.open(world, rng)
        things = self.choose(world, rng)
        floor, side = z + 0.02 - self.half[1], 1 if rng.random() < 0.5 else -1
        for thing, middle in zip(things, (0.085 * side, -0.085 * side), strict=False):
            spot = Zone((x + 0.06, x + 0.13), (y + middle - 0.015, y + middle + 0.015), floor)
            scatter(world, rng, (thing,), (spot,))
        back = Zone((layout.counter_front + 0.36, layout.wall - 0.12), (-0.34, 0.34), layout.counter_height)
        scatter(world, rng, things[2:], (back,))
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        return on_counter(world, thing)

    def spot(self, world: World) -> np.ndarray:
        return self.before(world)


class _Microwave(Shelf):
    fixture, place, door = "microwave", "microwave_floor", "microwave_door"
    shift = ((-0.02, -0.04, 0.0), (0.02, 0.04, 0.0))
    left_eye = (-0.62, -0.30, 0.44)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_microwave(scene, [room.counter_front + 0.25, 0.14, room.counter_height])
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.18, 0.02, layout.counter_height + 0.08])


class CounterToMicrowave(_Microwave):
    """From the counter into the open microwave."""

    source, goal = "counter", "in the microwave"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        x, _, z = self.open(world, rng)
        things = self.choose(world, rng)
        front = layout.counter_front
        near = Zone((front + 0.07, x - 0.08), (-0.26, 0.06), z)
        right = Zone((x, layout.wall - 0.10), (-0.50, -0.24), z)
        scatter(world, rng, things, (near,), others=(right,))
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        return inside(world, thing, "microwave", np.array([0.0, -0.12, 0.02]), np.array([0.32, 0.22, 0.26]))


class MicrowaveToCounter(_Microwave):
    """From the open microwave, where another thing stands beside it, onto the plate."""

    source, goal = "microwave", "on the plate on the counter"

    def build(self, scene: SceneBuilder) -> None:
        super().build(scene)
        room = scene.layout
        fixtures.add_plate(scene, [room.counter_front + 0.16, -0.25, room.counter_height])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        x, y, z = self.open(world, rng)
        things = self.choose(world, rng)
        world.move("plate", rng.uniform([-0.04, -0.06, 0.0], [0.04, 0.06, 0.0]))
        side = 1 if rng.random() < 0.5 else -1
        for thing, middle in zip(things, (0.05 + 0.075 * side, 0.05 - 0.075 * side), strict=False):
            spot = Zone((x + 0.07, x + 0.13), (y + middle - 0.012, y + middle + 0.012), z + 0.02)
            scatter(world, rng, (thing,), (spot,))
        right = Zone((x + 0.12, layout.wall - 0.08), (-0.50, -0.24), z)
        scatter(world, rng, things[2:], (right,))
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        return on_dish(world, thing, "plate")

    def spot(self, world: World) -> np.ndarray:
        return world.position("plate") + [0, 0, fixtures.PLATE_TOP]


class _Coffee(Shelf):
    fixture, place, mouth = "coffee_machine", "coffee_place", -0.14
    left_eye = (-0.52, -0.36, 0.34)
    others = ("can", "lime")  # on the counter, fixed

    def things_of(self, objects: str) -> tuple[str, ...]:
        return ("mug", *(self.others if objects == "train" else HELDOUT_THINGS[: len(self.others)]))

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        mug, *others = self.things_of(scene.objects)
        fixtures.add_counter(scene)
        fixtures.add_coffee_machine(scene, [room.counter_front + 0.40, 0, room.counter_height], cup=False)
        add_things(scene, (mug,))
        add_things(scene, tuple(others), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.24, 0.0, layout.counter_height + 0.10])

    def choose(self, world: World, rng: np.random.Generator) -> tuple[str, ...]:
        world.memory["target"] = world.things[0]
        return world.things

    def move_machine(self, world: World, rng: np.random.Generator) -> None:
        """Moves the machine."""
        shift = rng.uniform([-0.02, -0.05, 0.0], [0.02, 0.05, 0.0])
        world.move("coffee_machine", shift, yaw=rng.uniform(-0.08, 0.08))
        world.update()


class SetupMug(_Coffee):
    """The mug from the counter to the coffee machine: within 4 cm of where the coffee falls."""

    source, goal = "counter", "under the coffee machine dispenser"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        self.move_machine(world, rng)
        mug, *others = self.choose(world, rng)
        front, z = layout.counter_front, layout.counter_height
        x = (front + 0.08, front + 0.20)
        left, right = Zone(x, (0.14, 0.28), z), Zone(x, (-0.28, -0.14), z)
        scatter(world, rng, (mug,), (left, right))
        x = (front + 0.34, layout.wall - 0.10)
        scatter(world, rng, tuple(others), (Zone(x, (0.26, 0.50), z), Zone(x, (-0.50, -0.26), z)))
        return self.instruction(world)

    def placed(self, world: World, thing: str) -> bool:
        aside = world.position(thing) - world.site("coffee_place")
        stands = abs(world.bottom(thing) - world.site("coffee_place")[2]) < TOUCH
        return bool(stands and np.linalg.norm(aside[:2]) < 0.04)


class ServeMug(_Coffee):
    """The mug from the coffee machine onto the counter."""

    source, goal = "under", "on the counter"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        self.move_machine(world, rng)
        mug, *others = self.choose(world, rng)
        x, y, z = world.site("coffee_place")
        scatter(world, rng, (mug,), (Zone((x - 0.02, x + 0.01), (y - 0.02, y + 0.02), z),))
        x, z = (layout.counter_front + 0.34, layout.wall - 0.10), layout.counter_height
        scatter(world, rng, tuple(others), (Zone(x, (0.26, 0.50), z), Zone(x, (-0.50, -0.26), z)))
        return "pick the mug from under the coffee machine dispenser and place it on the counter"

    def placed(self, world: World, thing: str) -> bool:
        return on_counter(world, thing)

    def spot(self, world: World) -> np.ndarray:
        return self.before(world)
