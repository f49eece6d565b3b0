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

    start_offset: tuple[float, float, float] = (-0.25, 0.0, 0.05)  # from the focus to the tool point

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


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """A task with its name, family (which expert solves it) and horizon in control steps."""

    name: str
    family: str
    horizon: int
    task: Task


TASKS: dict[str, TaskInfo] = {info.name: info for info in (TaskInfo("TurnOnSinkFaucet", "faucet", 64, Faucet()),)}
