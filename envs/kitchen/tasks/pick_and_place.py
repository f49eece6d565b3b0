"""Picking a thing and placing it elsewhere."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import Zone, add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import DOWN, Task
from envs.kitchen.world import World


class PickAndPlace(Task):
    """Move an object from the counter into the sink; solved when it lies there and the hand is 0.25 m away."""

    angles = DOWN
    start_spread = (0.06, 0.08, 0.05, 0.06, 0.06, 0.06)
    start_offset = (-0.08, 0.0, 0.20)
    left_eye = (-0.52, 0.22, 0.50)
    things = ("can", "carton", "lime", "cup")

    def build(self, scene: SceneBuilder) -> None:
        fixtures.add_sink(scene)
        add_things(scene, self.things_of(scene.objects))

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.24, 0.14, layout.counter_height + 0.02])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        shift = rng.uniform([-0.01, -0.03, 0.0], [0.01, 0.03, 0.0])
        world.move("sink", shift)
        target = world.things[rng.integers(len(world.things))]
        others = tuple(name for name in world.things if name != target)
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
