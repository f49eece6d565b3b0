"""Experts that hold a bar between the fingers and pull."""

from __future__ import annotations

import numpy as np

from envs.kitchen.experts.base import CLOSE, OPEN, Command, X, Z, gap
from envs.kitchen.experts.pushing import opening
from envs.kitchen.tasks import Task
from envs.kitchen.world import World


def drawer(world: World, task: Task) -> Command:
    """Take the bar between the fingers, close, pull."""
    handle = world.site("drawer_handle") + 0.008 * X  # a little behind the bar, for a firm grip
    depth, along, across = np.abs(world.eef - handle)
    if 0.010 < gap(world) < 0.034 and depth < 0.026 and along < 0.06 and across < 0.045:
        return handle - 0.06 * X, CLOSE  # held
    if depth < 0.022 and along < 0.05 and across < 0.024:
        return handle, CLOSE
    astray = max(along - 0.03, across - 0.012, 0.0)
    return handle - min(0.06, 3.0 * astray) * X, OPEN


def open_door(world: World, task: Task) -> Command:
    """Take the bar from the front, close, pull along the arc; of two doors, one after the other.

    A door that is ajar and not held is pushed open from inside.
    """
    done = [name for name in world.memory["doors"] if world.fraction(name) >= 0.91]
    for name in done:
        if np.linalg.norm(world.eef - world.site(f"{name}_handle")) < 0.07:
            return world.eef - 0.10 * X, OPEN  # let go of it first
    name = next((name for name in world.memory["doors"] if name not in done), done[-1] if done else "")
    handle = world.site(f"{name}_handle")
    outward = (handle - world.site(f"{name}_hinge")) * [1, 1, 0]
    outward /= np.linalg.norm(outward)
    along = opening(world, name) * np.cross(outward, Z)  # the way in which it opens
    deep = handle + 0.020 * X  # the bar well between the fingers
    depth, aside, above = np.abs(world.eef - deep)
    if 0.006 < gap(world) < 0.030 and depth < 0.035 and aside < 0.022 and above < 0.06:
        return deep + 0.032 * along, CLOSE  # held
    if world.fraction(name) > 0.3:
        return _push_from_inside(world, name, along, outward), CLOSE
    if depth < 0.014 and aside < 0.020 and above < 0.04:
        return deep, CLOSE
    astray = max(aside - 0.010, above - 0.025, 0.0)
    return deep - min(0.30 if done else 0.08, 4.0 * astray) * X, OPEN


def _push_from_inside(world: World, name: str, along: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """Where to go to push a door's inner face: outwards around its edge first, where the hand is before the door."""
    face = world.site(f"{name}_push") - 0.02 * along
    face = np.array([*face[:2], np.clip(world.eef[2], face[2] - 0.2, face[2] + 0.1)])
    error = world.eef - face
    ahead, free = float(error @ along), float(error @ outward)
    if ahead > 0.008:
        return world.eef + (0.11 - free) * outward if free < 0.09 else face - 0.05 * along + 0.11 * outward
    if free > 0.03:
        return face - 0.05 * along
    return face + 0.05 * along
