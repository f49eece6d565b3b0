"""The base of the tasks: fixtures, variation, and the check of success (with RoboCasa's thresholds)."""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.kitchen.objects import Zone
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.world import World

FORWARD = (0.0, 0.0, 0.0)  # hand angles (pitch, yaw, roll): fingers forward, opening sideways
SIDEWAYS_GRIP = (0.0, 0.0, np.pi / 2)  # fingers forward, opening up and down
DOWN = (np.pi / 2, 0.0, 0.0)  # fingers down, opening sideways

# Replaces the task's own choice in scenes of held-out objects. Kinds that no training scene has come first.
HELDOUT_THINGS = ("eggplant", "lemon", "can", "cup")


class Task:
    """Base of the tasks. Tasks hold no episode state: choices and latches live in `World.memory`."""

    angles: tuple[float, float, float] = FORWARD  # nominal hand angles
    start_spread: tuple[float, ...] = (0.05, 0.08, 0.06, 0.06, 0.06, 0.06)  # +- of the six arm joints at the start
    start_offset: tuple[float, float, float] = (-0.25, 0.0, 0.05)  # from the focus to the tool point
    left_eye: tuple[float, float, float] = (-0.38, 0.36, 0.26)  # from the focus to the left camera, metres
    things: tuple[str, ...] = ("can", "carton", "lime")

    def things_of(self, objects: str) -> tuple[str, ...]:
        """The names of the things in a scene of an object split."""
        return self.things if objects == "train" else HELDOUT_THINGS[: len(self.things)]

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


def beside(layout: Layout, low: float, high: float) -> Zone:
    """The stretch of counter between two y, clear of its edges."""
    return Zone((layout.counter_front + 0.15, layout.wall - 0.08), (low, high), layout.counter_height)


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """A task with its name, family (which expert solves it) and horizon in control steps."""

    name: str
    family: str
    horizon: int
    task: Task
