"""The sink's faucet: handle and spout."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import Zone, add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import Task
from envs.kitchen.world import World


class Faucet(Task):
    """Turn the sink's faucet on: handle between 0.40 and pi radians."""

    start_offset = (-0.36, 0.05, 0.04)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_sink(scene)
        fixtures.add_faucet(scene, [room.counter_front + 0.52, 0.04, room.counter_height])
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.44, -0.05, layout.counter_height + 0.10])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("faucet", rng.uniform([-0.04, -0.05, 0.0], [0.03, 0.05, 0.0]), yaw=rng.uniform(-0.15, 0.15))
        x, z = (layout.counter_front + 0.25, layout.wall - 0.06), layout.counter_height
        scatter(world, rng, world.things, (Zone(x, (0.27, 0.50), z), Zone(x, (-0.50, -0.27), z)))
        return "turn on the sink faucet"

    def success(self, world: World) -> bool:
        return 0.40 < world.joint("faucet_handle") < np.pi
