"""The stove's knobs."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import Task, beside
from envs.kitchen.world import World

GLOWING = (0.95, 0.25, 0.05)


class Stove(Task):
    """Turn on one burner of four: its knob between 0.35 and 2 pi - 0.35 radians."""

    turn = 1  # which way the knob is to go
    start_offset = (-0.22, 0.0, 0.04)
    left_eye = (-0.52, 0.30, 0.30)

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_stove(scene, [room.counter_front, 0, room.counter_height])
        add_things(scene, self.things_of(scene.objects), movable=False)
        fixtures.add_stove_sides(scene)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front - 0.04, -0.03, layout.counter_height - 0.06])

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.move("stove", rng.uniform([-0.02, -0.04, 0.0], [0.02, 0.04, 0.0]))
        knob = int(rng.integers(len(fixtures.BURNERS)))
        world.memory.update(knob=knob, turn=self.turn)
        scatter(world, rng, world.things, (beside(layout, 0.45, 0.65), beside(layout, -0.65, -0.45)))
        return f"turn on the {fixtures.BURNERS[knob]} burner of the stove"

    def is_on(self, world: World, knob: int) -> bool:
        """Whether a knob is turned on."""
        return 0.35 <= abs(world.joint(f"knob {knob}")) <= 2 * np.pi - 0.35

    def update(self, world: World) -> None:
        for knob in range(len(fixtures.BURNERS)):
            if self.is_on(world, knob):
                world.tint(f"burner/of knob {knob}", GLOWING)

    def success(self, world: World) -> bool:
        return self.is_on(world, world.memory["knob"])


class StoveOff(Stove):
    """Turn off one burner of four: its knob at most 0.35 radians; others may be on too."""

    turn = -1
    start_offset = (-0.22, 0.03, 0.02)

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        instruction = super().randomise(world, layout, rng)
        target, knobs = world.memory["knob"], range(len(fixtures.BURNERS))
        turned = [rng.uniform(0.7, 1.7) for _ in knobs]
        lit = [rng.random() < 0.5 for _ in knobs]
        for knob in knobs:
            if knob == target or lit[knob]:
                world.set_joint(f"knob {knob}", turned[knob])
        world.memory["cold"] = [world.colour(f"burner/of knob {knob}") for knob in knobs]
        return instruction.replace("turn on", "turn off")

    def update(self, world: World) -> None:
        for knob, cold in enumerate(world.memory["cold"]):
            world.tint(f"burner/of knob {knob}", GLOWING if self.is_on(world, knob) else cold)

    def success(self, world: World) -> bool:
        return not super().success(world)
