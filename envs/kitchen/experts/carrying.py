"""Experts that pick a thing up and put it down."""

from __future__ import annotations

import numpy as np

from envs.kitchen.experts.base import CLOSE, OPEN, Command, X, Z, gap
from envs.kitchen.fixtures import SINK_HALF
from envs.kitchen.tasks.pick_and_place import PickAndPlace, _OntoDish
from envs.kitchen.tasks.shelves import Shelf
from envs.kitchen.world import World


def into_sink(world: World, task: PickAndPlace) -> Command:
    """Above the object, down, close, up, across, down over the basin, open, up."""
    eef, thing, sink = world.eef, world.position(world.memory["target"]), world.position("sink")
    half = world.half(world.memory["target"])
    grip, aside, above = _top_grip(world)
    held = aside < 0.03 and abs(above) < 0.03 and gap(world) < 2 * half[0] + 0.012
    drop = sink + np.array([0.0, 0.06, 0.02])
    if (np.abs(thing - sink)[:2] < np.array(SINK_HALF) - 0.05).all():
        if not held:
            return eef * [1, 1, 0] + (sink[2] + 0.35) * Z, OPEN
        return (eef, OPEN) if eef[2] < drop[2] + 0.06 else (drop, CLOSE)
    if not held:
        return _down_on(grip, aside, above)
    # Held: rise first; how far it may move sideways grows with the height.
    carry = sink[2] + 0.15
    goal = eef + np.clip((eef[2] - (carry - 0.06)) / 0.04, 0.0, 1.0) * (drop - eef)
    return np.array([goal[0], goal[1], carry]), CLOSE


def onto_dish(world: World, task: _OntoDish) -> Command:
    """From above: down on the thing, close, up, across, down on the dish, open, up."""
    eef, name = world.eef, world.memory["target"]
    thing, half, spot = world.position(name), world.half(name), task.spot(world)
    grip, aside, above = _top_grip(world)
    held = aside < 0.03 and abs(above) < 0.05 and _gripped(world, half[0])
    if task.placed(world, name):
        return (eef, OPEN) if held else (eef * [1, 1, 0] + (thing[2] + 0.32) * Z, OPEN)
    if not held:
        return _down_on(grip, aside, above)
    offset = (spot - thing) * [1, 1, 0]
    far, counter = float(np.linalg.norm(offset)), float(world.position("plate")[2])
    low = spot[2] + half[2] - 0.003
    if far < 0.05:  # over the dish: down, the lower the better it is centred
        return eef + offset + (low + min(0.06, 4.0 * max(far - 0.012, 0.0)) - thing[2]) * Z, CLOSE
    # Rise first; how far it may move sideways grows with the height.
    free = np.clip((world.bottom(name) - counter - 0.02) / 0.03, 0.0, 1.0)
    return eef + free * offset + (counter + 0.065 + half[2] - thing[2]) * Z, CLOSE


def _top_grip(world: World) -> tuple[np.ndarray, float, float]:
    """Where to take the target from above [3], and how far the tool point is beside and above that, metres."""
    name, eef = world.memory["target"], world.eef
    grip = world.position(name) + max(0.0, world.half(name)[2] - 0.045) * Z
    return grip, float(np.linalg.norm((eef - grip)[:2])), float(eef[2] - grip[2])


def _down_on(grip: np.ndarray, aside: float, above: float) -> Command:
    """Down to a grip (see `_top_grip`), the lower the better the hand is centred, and close.

    The funnel is about as wide as the open fingers allow, so that demonstrations do not wait above the thing.
    """
    if aside < 0.024 and abs(above) < 0.015:
        return grip, CLOSE
    return grip + min(0.12, 2.0 * max(aside - 0.018, 0.0)) * Z, OPEN


def _gripped(world: World, half: float) -> bool:
    """Whether the fingers are as far apart as a thing between them is wide. It may slip down a little when lifted."""
    return -0.008 < gap(world) - 2 * half < 0.014


def _level_grip(world: World, reach: float) -> Command | None:
    """Takes the target from the front, coming from `reach` metres before it; None once it is held."""
    name, eef = world.memory["target"], world.eef
    half = world.half(name)
    grip = world.position(name) + max(0.0, 0.026 - half[2]) * Z  # no lower, for the counter's sake
    depth, aside, above = np.abs(eef - grip)
    if depth < 0.03 and aside < 0.03 and above < 0.05 and _gripped(world, half[1]):
        return None
    if depth < 0.015 and aside < 0.018 and above < 0.012:
        return grip, CLOSE
    astray = max(aside - 0.010, above - 0.008, 0.0)
    return grip - min(reach, 6.0 * astray) * X, OPEN


def _take_or_leave(world: World, task: PickAndPlace, reach: float) -> Command | None:
    """Where to go before and after carrying: to take the target (`_level_grip`), to let go and back off. Else None."""
    name = world.memory["target"]
    approach = _level_grip(world, reach)
    if not task.placed(world, name):
        return approach
    if approach is None:  # still held
        return world.eef, OPEN
    return world.eef * [0, 1, 1] + (world.position(name)[0] - 0.32) * X, OPEN


def into(world: World, task: Shelf) -> Command:
    """From the counter through a fixture's front: take, lift, before the opening, in, down, open, back."""
    name = world.memory["target"]
    if (command := _take_or_leave(world, task, 0.14)) is not None:
        return command
    thing, half, spot, mouth = world.position(name), world.half(name), task.spot(world), task.opening(world)
    counter = float(world.position("counter")[2])
    offset = spot + half[2] * Z - thing
    high = offset[2] + 0.02
    if thing[0] > mouth - 0.04:  # inside
        down = -0.003 if abs(offset[0]) < 0.02 else 0.02
        return world.eef + offset * [1, 1, 0] + (offset[2] + down) * Z, CLOSE
    error = float(np.hypot(offset[1], high))
    ready = np.clip((0.035 - error) / 0.015, 0.0, 1.0)
    ahead = ready * offset[0] + (1.0 - ready) * (mouth - 0.09 - thing[0])
    free = np.clip((world.bottom(name) - counter - 0.004) / 0.015, 0.0, 1.0)
    return world.eef + free * np.array([ahead, offset[1], 0.0]) + high * Z, CLOSE


def out_of(world: World, task: Shelf) -> Command:
    """Out of a fixture's front to the counter: in, take, lift, out, across, down, open, back."""
    name = world.memory["target"]
    if (command := _take_or_leave(world, task, 0.25)) is not None:
        return command
    thing, half, spot, mouth = world.position(name), world.half(name), task.spot(world), task.opening(world)
    floor = float(world.site(task.place)[2])
    if thing[0] > mouth - 0.05:  # inside
        lift = floor + half[2] + 0.02 - thing[2]
        free = np.clip((world.bottom(name) - floor - 0.004) / 0.010, 0.0, 1.0)
        return world.eef + free * (mouth - 0.10 - thing[0]) * X + lift * Z, CLOSE
    offset = spot + half[2] * Z - thing
    far = float(np.linalg.norm(offset[:2]))
    high = max(floor + 0.03, spot[2] + 0.05) - spot[2]
    return world.eef + offset + (min(high, 4.0 * max(far - 0.015, 0.0)) - 0.003) * Z, CLOSE
