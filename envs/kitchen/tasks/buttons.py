"""Buttons of the coffee machine and the microwave."""

from __future__ import annotations

import numpy as np

from envs.kitchen import fixtures
from envs.kitchen.objects import add_things, scatter
from envs.kitchen.scene import Layout, SceneBuilder
from envs.kitchen.tasks.base import Task, beside
from envs.kitchen.world import World


class Button(Task):
    """Press a button until its machine is on, or off, as wanted (a latch), then take the hand 0.15 m away."""

    fixture: str  # the body that varies
    joint: str  # the button's joint and site
    lamp: str  # the geom that lights up
    lit: tuple[float, float, float]
    instruction: str

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        world.memory.update(on=False, wanted=True, button=self.joint)
        world.move(self.fixture, rng.uniform([-0.03, -0.06, 0.0], [0.02, 0.06, 0.0]), yaw=rng.uniform(-0.1, 0.1))
        scatter(world, rng, world.things, (beside(layout, 0.36, 0.60), beside(layout, -0.60, -0.36)))
        return self.instruction

    def update(self, world: World) -> None:
        if world.fraction(self.joint) > 0.5:
            world.memory["on"] = True
        if world.memory["on"]:
            world.tint(self.lamp, self.lit)

    def success(self, world: World) -> bool:
        pressed = world.memory["on"] == world.memory["wanted"]
        return pressed and bool(np.linalg.norm(world.eef - world.site(self.joint)) > 0.15)


class CoffeeButton(Button):
    """Start the coffee machine."""

    joint, fixture, lamp, lit = "coffee_button", "coffee_machine", "lamp/coffee", (0.2, 1.0, 0.3)
    instruction = "press the button on the coffee machine to serve coffee"

    def build(self, scene: SceneBuilder) -> None:
        room = scene.layout
        fixtures.add_counter(scene)
        fixtures.add_coffee_machine(scene, [room.counter_front + 0.40, 0, room.counter_height])
        add_things(scene, self.things_of(scene.objects), movable=False)

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
        add_things(scene, self.things_of(scene.objects), movable=False)

    def focus(self, layout: Layout) -> np.ndarray:
        return np.array([layout.counter_front + 0.20, -0.08, layout.counter_height + 0.14])


class MicrowaveStop(MicrowaveButton):
    """Stop the running microwave; its other button starts it again."""

    joint = "microwave_stop"
    instruction = "press the stop button on the microwave"

    def randomise(self, world: World, layout: Layout, rng: np.random.Generator) -> str:
        instruction = super().randomise(world, layout, rng)
        world.memory.update(on=True, wanted=False, dark=world.colour(self.lamp))
        return instruction

    def update(self, world: World) -> None:
        if world.fraction("microwave_start") > 0.5:
            world.memory["on"] = True
        if world.fraction(self.joint) > 0.5:
            world.memory["on"] = False
        world.tint(self.lamp, self.lit if world.memory["on"] else world.memory["dark"])
