"""The kitchen's tasks: which fixtures they need, what varies, when they succeed (RoboCasa's thresholds)."""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import Zone, add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.world import World

FORWARD = (0.0, 0.0, 0.0)  # hand angles (pitch, yaw, roll): fingers forward, opening sideways
SIDEWAYS_GRIP = (0.0, 0.0, np.pi / 2)  # fingers forward, opening up and down
DOWN = (np.pi / 2, 0.0, 0.0)  # fingers down, opening sideways


class Task:
    """Base of the tasks. Tasks hold no episode state: choices and latches live in `World.memory`."""

    angles: tuple[float, float, float] = FORWARD  # nominal hand angles
    start_spread: tuple[float, ...] = (0.05, 0.08, 0.06, 0.06, 0.06, 0.06)  # +- of the six arm joints at the start
    start_offset: tuple[float, float, float] = (-0.25, 0.0, 0.05)  # from the focus to the tool point
    left_eye: tuple[float, float, float] = (-0.38, 0.36, 0.26)  # from the focus to the left camera, metres
    things: tuple[str, ...] = ("can", "carton", "lime")

    def build(self, scene: SceneBuilder) -> None:
        """Adds the task's fixtures and objects."""
        raise NotImplementedError

    def focus(self, layout: Layout) -> np.ndarray:
        """The point [3] that the agent cameras look at, world frame."""
        raise NotImplementedError

    def home(self, layout: Layout) -> np.ndarray:
        """The arm's joint values [6] about which starts are drawn."""
        return np.array([*(self.focus(layout) + self.start_offset), *self.angles])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        """Draws the episode's fixtures, objects and choices; returns the instruction."""
        raise NotImplementedError

    def update(self, world: World) -> None:
        """Latches and lamps, after every control step."""

    def success(self, world: World) -> bool:
        """Whether the task is solved now."""
        raise NotImplementedError


class Faucet(Task):
    """Turn the sink's faucet on: handle between 0.40 and pi radians."""

    start_offset = (-0.36, 0.05, 0.04)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_sink(scene)
        fixtures.add_faucet(scene, [room.counter_front + 0.52, 0.04, room.counter_height])
        add_things(scene, self.things, movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.44, -0.05, layout.counter_height + 0.10])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("faucet", rng.uniform([-0.04, -0.05, 0.0], [0.03, 0.05, 0.0]), yaw=rng.uniform(-0.15, 0.15))
        x, z = (layout.counter_front + 0.25, layout.wall - 0.06), layout.counter_height
        scatter(world, rng, self.things, (Zone(x, (0.27, 0.50), z), Zone(x, (-0.50, -0.27), z)))
        return "turn on the sink faucet"

    def success(self, world: World) -> bool:
        return 0.40 < world.joint("faucet_handle") < np.pi


class Drawer(Task):
    """Open a drawer: at least 0.95 of its travel."""

    angles = SIDEWAYS_GRIP
    start_offset = (-0.20, 0.0, 0.04)
    left_eye = (-0.46, 0.34, 0.26)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_drawer(scene, [room.counter_front - 0.002, 0, room.counter_height - 0.16])
        add_things(scene, self.things, movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front - 0.10, 0.0, layout.counter_height - 0.14])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("drawer", rng.uniform([0.0, -0.12, -0.03], [0.0, 0.12, 0.0]))
        scatter(world, rng, self.things, (_beside(layout, -0.4, 0.4),))
        return "open the drawer"

    def success(self, world: World) -> bool:
        return world.fraction("drawer") >= 0.95


class PickAndPlace(Task):
    """Move an object from the counter into the sink; solved when it lies there and the hand is 0.25 m away."""

    angles = DOWN
    start_spread = (0.06, 0.08, 0.05, 0.06, 0.06, 0.06)
    start_offset = (-0.08, 0.0, 0.20)
    left_eye = (-0.52, 0.22, 0.50)
    things = ("can", "carton", "lime", "cup")

    def build(self, scene: SceneBuilder) -> None:
        fixtures.add_sink(scene)
        add_things(scene, self.things)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.24, 0.14, layout.counter_height + 0.02])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        shift = rng.uniform([-0.01, -0.03, 0.0], [0.01, 0.03, 0.0])
        world.move("sink", shift)
        target = self.things[rng.integers(len(self.things))]
        others = tuple(name for name in self.things if name != target)
        front, z = layout.counter_front, layout.counter_height
        near = Zone((front + 0.10, front + 0.36), (0.28, 0.42), z)
        far = Zone((front + 0.10, front + 0.50), (-0.50, -0.29), z)
        scatter(world, rng, (target, *others), (near,), others=(near, far))
        world.memory["target"] = target
        return f"pick the {target} from the counter and place it in the sink"

    def success(self, world: World) -> bool:
        thing = world.position(world.memory["target"])
        return in_sink(world, thing) and bool(np.linalg.norm(thing - world.eef) > 0.25)


def in_sink(world: World, point: np.ndarray) -> bool:
    """Whether a world point lies in the basin, at least 3 cm below its rim."""
    offset = point - world.position("sink")
    return bool((np.abs(offset[:2]) < fixtures.SINK_HALF).all() and -fixtures.SINK_DEPTH - 0.01 < offset[2] < -0.03)


class Door(Task):
    """Close a cabinet's single door: at most 0.05 of its range."""

    start_offset = (-0.40, 0.24, 0.02)
    left_eye = (-0.66, 0.38, 0.32)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_cabinet(scene, [room.wall - 0.34, 0, room.counter_height + 0.52])
        add_things(scene, self.things, movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.wall - 0.42, 0.02, layout.counter_height + 0.48])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("cabinet", rng.uniform([-0.02, -0.05, -0.03], [0.01, 0.05, 0.03]))
        world.set_joint("door", rng.uniform(0.40, 0.80) * np.pi / 2)
        scatter(world, rng, self.things, (_beside(layout, -0.4, 0.4),))
        return "close the cabinet door"

    def success(self, world: World) -> bool:
        return world.fraction("door") <= 0.05


class Stove(Task):
    """Turn on one burner of four: its knob between 0.35 and 2 pi - 0.35 radians."""

    start_offset = (-0.22, 0.0, 0.04)
    left_eye = (-0.52, 0.30, 0.30)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_stove(scene, [room.counter_front, 0, room.counter_height])
        add_things(scene, self.things, movable=False)
        for side in (1, -1):
            scene.box(scene.world, "counter", [room.counter_front + 0.3, side * 0.82, 0.46], [0.3, 0.48, 0.46])

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front - 0.04, -0.03, layout.counter_height - 0.06])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("stove", rng.uniform([-0.02, -0.04, 0.0], [0.02, 0.04, 0.0]))
        knob = int(rng.integers(len(fixtures.BURNERS)))
        world.memory["knob"] = knob
        scatter(world, rng, self.things, (_beside(layout, 0.45, 0.65), _beside(layout, -0.65, -0.45)))
        return f"turn on the {fixtures.BURNERS[knob]} burner of the stove"

    def is_on(self, world: World, knob: int) -> bool:
        """Whether a knob is turned on."""
        return 0.35 <= abs(world.joint(f"knob {knob}")) <= 2 * np.pi - 0.35

    def update(self, world: World) -> None:
        for knob in range(len(fixtures.BURNERS)):
            if self.is_on(world, knob):
                world.tint(f"burner/of knob {knob}", (0.95, 0.25, 0.05))

    def success(self, world: World) -> bool:
        return self.is_on(world, world.memory["knob"])


class Button(Task):
    """Press a button until its machine turns on (a latch), then take the hand 0.15 m away."""

    fixture: str  # the body that varies
    joint: str  # the button's joint and site
    lamp: str  # the geom that lights up
    lit: tuple[float, float, float]
    instruction: str

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.memory.update(on=False, button=self.joint)
        world.move(self.fixture, rng.uniform([-0.03, -0.06, 0.0], [0.02, 0.06, 0.0]), yaw=rng.uniform(-0.1, 0.1))
        scatter(world, rng, self.things, (_beside(layout, 0.36, 0.60), _beside(layout, -0.60, -0.36)))
        return self.instruction

    def update(self, world: World) -> None:
        if world.fraction(self.joint) > 0.5:
            world.memory["on"] = True
        if world.memory["on"]:
            world.tint(self.lamp, self.lit)

    def success(self, world: World) -> bool:
        return world.memory["on"] and bool(np.linalg.norm(world.eef - world.site(self.joint)) > 0.15)


class CoffeeButton(Button):
    """Start the coffee machine."""

    joint, fixture, lamp, lit = "coffee_button", "coffee_machine", "lamp/coffee", (0.2, 1.0, 0.3)
    instruction = "press the button on the coffee machine to serve coffee"

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_coffee_machine(scene, [room.counter_front + 0.40, 0, room.counter_height])
        add_things(scene, self.things, movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.22, 0.0, layout.counter_height + 0.28])


class MicrowaveButton(Button):
    """Start the microwave; its other button stops it."""

    joint, fixture, lamp, lit = "microwave_start", "microwave", "window/glow", (1.0, 0.75, 0.2)
    instruction = "press the start button on the microwave"

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_microwave(scene, [room.counter_front + 0.25, 0.14, room.counter_height])
        add_things(scene, self.things, movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.20, -0.08, layout.counter_height + 0.14])


def _beside(layout: Layout, low: float, high: float) -> Zone:
    """The stretch of counter between two y, clear of its edges."""
    return Zone((layout.counter_front + 0.15, layout.wall - 0.08), (low, high), layout.counter_height)


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """A task with its name, family (which expert solves it) and horizon in control steps."""

    name: str
    family: str
    horizon: int
    task: Task


TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo("TurnOnSinkFaucet", "faucet", 40, Faucet()),
        TaskInfo("OpenDrawer", "drawer", 48, Drawer()),
        TaskInfo("PnPCounterToSink", "pick_and_place", 64, PickAndPlace()),
        TaskInfo("CloseSingleDoor", "door", 56, Door()),
        TaskInfo("TurnOnStove", "stove", 40, Stove()),
        TaskInfo("CoffeePressButton", "button", 48, CoffeeButton()),
        TaskInfo("TurnOnMicrowave", "button", 48, MicrowaveButton()),
    )
}
