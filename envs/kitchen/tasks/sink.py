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
    clear = 0.27  # metres to the right of the basin's middle from where on things may stand

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
        scatter(world, rng, world.things, (Zone(x, (0.27, 0.50), z), Zone(x, (-0.50, -self.clear), z)))
        world.memory["turn"] = 1
        return "turn on the sink faucet"

    def success(self, world: World) -> bool:
        return 0.40 < world.joint("faucet_handle") < np.pi


class FaucetOff(Faucet):
    """Turn the running faucet off: handle outside of what turns it on."""

    start_offset = (-0.34, -0.05, 0.04)
    clear = 0.37  # the hand comes from there

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_sink(scene)
        fixtures.add_faucet(scene, [room.counter_front + 0.52, 0.04, room.counter_height], water=True)
        add_things(scene, self.things_of(scene.objects), movable=False)

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        super().randomise(world, layout, rng)
        world.set_joint("faucet_handle", rng.uniform(0.65, 1.25))
        world.memory["turn"] = -1
        return "turn off the sink faucet"

    def update(self, world: World) -> None:
        world.show("water/jet", super().success(world))

    def success(self, world: World) -> bool:
        return not super().success(world)


class Spout(Faucet):
    """Turn the spout to the left, to the right (beyond pi/6) or to the center (within pi/6)."""

    start_offset = (-0.36, 0.05, 0.10)
    left_eye = (-0.42, 0.32, 0.34)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.42, 0.03, layout.counter_height + 0.16])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        super().randomise(world, layout, rng)
        sides = ("left", "center", "right")
        start, turn = int(rng.integers(3)), int(rng.integers(1, 3))
        goal = (start + turn) % 3
        world.set_joint("faucet_spout", (start - 1) * rng.uniform(0.70, 0.95) + rng.uniform(-0.1, 0.1) * (start == 1))
        world.memory["side"] = goal - 1
        return f"turn the sink spout to the {sides[goal]}"

    def success(self, world: World) -> bool:
        angle = world.joint("faucet_spout")  # positive is to the right
        side = 0 if abs(angle) < np.pi / 6 else int(np.sign(angle))
        return side == world.memory["side"]
