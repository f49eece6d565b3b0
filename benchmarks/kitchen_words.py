"""Which of the kitchen's tasks need their words: how often a guess without the instruction is right.

`python benchmarks/kitchen_words.py` prints the table of docs/kitchen-tasks.md. The guess sees where everything stands,
turns and burns at an episode's start, but not what the things are called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from figures import result_line

from envs.base import Episode
from envs.kitchen import KitchenEnv
from envs.kitchen.world import World

Rule = Callable[[World], list[Any]]  # what it leaves to guess among


def extreme(axis: int, sign: int) -> Rule:
    """The thing that is farthest along an axis of the world (x away from the robot, y to its left)."""
    return lambda world: [max(world.things, key=lambda thing: sign * world.position(thing)[axis])]


def nearest(body: str) -> Rule:
    """The thing that is nearest to the middle of a fixture or dish, seen from above."""
    return lambda world: [min(world.things, key=lambda thing: aside(world, thing, body))]


def aside(world: World, thing: str, body: str) -> float:
    """Metres between two bodies, seen from above."""
    return float(np.linalg.norm((world.position(thing) - world.position(body))[:2]))


def in_fixture(fixture: str) -> Rule:
    """The things on a fixture's floor."""

    def rule(world: World) -> list[Any]:
        floor = world.site(f"{fixture}_floor")
        offsets = {thing: np.abs(world.position(thing) - floor) for thing in world.things}
        return [thing for thing, (x, y, z) in offsets.items() if x < 0.10 and y < 0.16 and z < 0.08]

    return rule


def burning(world: World) -> list[Any]:
    """The burners that are on."""
    return [knob for knob in range(4) if 0.35 <= world.joint(f"knob {knob}")]


def other_sides(world: World) -> list[Any]:
    """Where the spout is not: -1 left, 0 center, 1 right."""
    angle = world.joint("faucet_spout")
    start = 0 if abs(angle) < np.pi / 6 else int(np.sign(angle))
    return [side for side in (-1, 0, 1) if side != start]


# task -> what its memory calls the target, the guess in words, the rule
RULES: dict[str, tuple[str, str, Rule]] = {
    "PnPCounterToSink": ("target", "the thing that is left-most", extreme(1, 1)),
    "PnPCounterToStove": ("target", "the thing on the plate", nearest("plate")),
    "PnPStoveToCounter": ("target", "the thing in the pan", nearest("pan")),
    "PnPCounterToCab": ("target", "the thing that is front-most", extreme(0, -1)),
    "PnPCounterToMicrowave": ("target", "the thing that is front-most", extreme(0, -1)),
    "PnPSinkToCounter": ("target", "of the two things in the basin, the one nearer to its middle", nearest("sink")),
    "PnPCabToCounter": ("target", "one of the two things in the cabinet", in_fixture("cabinet")),
    "PnPMicrowaveToCounter": ("target", "one of the two things in the microwave", in_fixture("microwave")),
    "CloseDrawer": ("drawer", "one of the two drawers", lambda world: ["left_drawer", "right_drawer"]),
    "TurnOnStove": ("knob", "one of the four burners", lambda world: [0, 1, 2, 3]),
    "TurnOffStove": ("knob", "one of the burners that are on", burning),
    "TurnSinkSpout": ("side", "one of the two sides where the spout is not", other_sides),
}


def share(task: str, first: int, count: int) -> float:
    """How often a guess among what the task's rule leaves is the target."""
    name, _, rule = RULES[task]
    env, right = KitchenEnv(task, image_size=4), 0.0
    for seed in range(first, first + count):
        env.reset(Episode(seed))
        left = rule(env.world)
        right += (env.world.memory[name] in left) / len(left)
    return right / count


def main() -> None:
    """Prints the page's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=700_000_000, help="first seed")
    parser.add_argument("--count", type=int, default=2000, help="seeds")
    arguments = parser.parse_args()
    shares = {task: share(task, arguments.first, arguments.count) for task in RULES}
    print("| task | are words needed? | a guess without them | right in |\n|---|---|---|---|")
    for task, value in shares.items():
        print(f"| {task} | {'no' if value == 1 else 'yes'} | {RULES[task][1]} | {100 * value:.0f} % |")
    for task, value in shares.items():
        print(result_line(f"kitchen_words/{task}", value, "share", goal=None, met=None, n=arguments.count))


if __name__ == "__main__":
    main()
