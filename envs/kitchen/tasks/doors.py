"""Drawers and doors."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import SIDEWAYS_GRIP, Task, beside
from envs.kitchen.world import World


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
        return world.fraction("drawer") >= 0.95


class Door(Task):
    """Close a cabinet's single door: at most 0.05 of its range."""

    start_offset = (-0.40, 0.24, 0.02)
    left_eye = (-0.66, 0.38, 0.32)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_cabinet(scene, [room.wall - 0.34, 0, room.counter_height + 0.52])
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.wall - 0.42, 0.02, layout.counter_height + 0.48])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("cabinet", rng.uniform([-0.02, -0.05, -0.03], [0.01, 0.05, 0.03]))
        world.set_joint("door", rng.uniform(0.40, 0.80) * np.pi / 2)
        scatter(world, rng, world.things, (beside(layout, -0.4, 0.4),))
        return "close the cabinet door"

    def success(self, world: World) -> bool:
        return world.fraction("door") <= 0.05
