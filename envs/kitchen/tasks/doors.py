"""Drawers and doors."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import SIDEWAYS_GRIP, Task, beside
from envs.kitchen.world import World

OPEN, SHUT = 0.95, 0.05  # of a drawer's travel; a door's range is open from 0.90 on
OPEN_DOOR = 0.90


class Drawer(Task):
    """Open a drawer: at least 0.95 of its travel."""

    angles = SIDEWAYS_GRIP
    start_offset = (-0.20, 0.0, 0.04)
    left_eye = (-0.46, 0.34, 0.26)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_drawer(scene, [room.counter_front - 0.002, 0, room.counter_height - 0.16])
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front - 0.10, 0.0, layout.counter_height - 0.14])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("drawer", rng.uniform([0.0, -0.12, -0.03], [0.0, 0.12, 0.0]))
        scatter(world, rng, world.things, (beside(layout, -0.4, 0.4),))
        return "open the drawer"

    def success(self, world: World) -> bool:
        return world.fraction("drawer") >= OPEN


class CloseDrawer(Task):
    """Close the left or the right of two drawers that stand open: at most 0.05 of its travel."""

    start_offset = (-0.24, 0.0, 0.06)
    left_eye = (-0.58, 0.36, 0.42)
    sides = ("left", "right")

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        for side, y in zip(self.sides, (0.16, -0.16), strict=True):
            place = [room.counter_front - 0.002, y, room.counter_height - 0.16]
            fixtures.add_drawer(scene, place, half=(0.14, 0.09), name=f"{side}_drawer")
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front - 0.10, 0.0, layout.counter_height - 0.14])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        shift = rng.uniform([0.0, -0.08, -0.03], [0.0, 0.08, 0.0])
        for side in self.sides:
            world.move(f"{side}_drawer", shift)
            world.set_joint(f"{side}_drawer", rng.uniform(0.35, 0.75) * fixtures.DRAWER_TRAVEL)
        side = self.sides[rng.integers(2)]
        world.memory["drawer"] = f"{side}_drawer"
        scatter(world, rng, world.things, (beside(layout, -0.4, 0.4),))
        return f"close the {side} drawer"

    def success(self, world: World) -> bool:
        return world.fraction(world.memory["drawer"]) <= SHUT


class _Doors(Task):
    """A wall cabinet with one or two doors."""

    doors: tuple[str, ...] = ("door",)
    half = (0.19, 0.22)  # of the cabinet: width and height
    bar = (0.875, 0.045)  # where a door's bar is: part of its width, metres before its middle
    start: tuple[float, float] | None  # lowest and highest fraction of its range that a door stands open at first
    instruction: str

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        place = [room.wall - 0.34, 0, room.counter_height + 0.52]
        fixtures.add_cabinet(scene, place, half=self.half, doors=self.doors, bar=self.bar)
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.wall - 0.42, 0.02, layout.counter_height + 0.48])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("cabinet", rng.uniform([-0.02, -0.05, -0.03], [0.01, 0.05, 0.03]))
        if self.start:
            for door in self.doors:
                world.set_joint(door, rng.uniform(*self.start) * np.pi / 2)
        world.memory["doors"] = self.doors
        scatter(world, rng, world.things, (beside(layout, -0.4, 0.4),))
        return self.instruction


class _CloseDoors(_Doors):
    start = (0.40, 0.80)

    def success(self, world: World) -> bool:
        return all(world.fraction(door) <= SHUT for door in self.doors)


class _OpenDoors(_Doors):
    start = None
    bar = (0.875, 0.065)  # room for a finger behind the bar at every angle

    def success(self, world: World) -> bool:
        return all(world.fraction(door) >= OPEN_DOOR for door in self.doors)


class CloseSingleDoor(_CloseDoors):
    """Close a cabinet's single door: at most 0.05 of its range."""

    start_offset = (-0.40, 0.24, 0.02)
    left_eye = (-0.66, 0.38, 0.32)
    instruction = "close the cabinet door"


class CloseDoubleDoor(_CloseDoors):
    """Close both doors of a cabinet: each at most 0.05 of its range."""

    doors = ("left_door", "right_door")
    half = (0.22, 0.22)
    start_offset = (-0.36, 0.22, 0.02)
    left_eye = (-0.72, 0.34, 0.36)
    instruction = "close the cabinet doors"


class OpenSingleDoor(_OpenDoors):
    """Open a cabinet's single door: at least 0.90 of its range."""

    start_offset = (-0.20, -0.12, -0.06)
    left_eye = (-0.62, 0.40, 0.30)
    instruction = "open the cabinet door"


class OpenDoubleDoor(_OpenDoors):
    """Open both doors of a cabinet: each at least 0.90 of its range."""

    doors = ("left_door", "right_door")
    half = (0.22, 0.22)
    bar = (0.70, 0.065)  # and room for the open hand between the bars
    start_offset = (-0.20, 0.0, -0.06)
    left_eye = (-0.72, 0.30, 0.36)
    instruction = "open the cabinet doors"
