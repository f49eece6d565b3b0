"""Experts that push with closed fingers: levers, knobs, buttons, doors and drawers to close."""

from __future__ import annotations

import numpy as np

from envs.kitchen.experts.base import CLOSE, Command, X, Z
from envs.kitchen.tasks import Task
from envs.kitchen.world import World


def push(eef: np.ndarray, point: np.ndarray, along: np.ndarray, out: np.ndarray, through: float = 0.05) -> np.ndarray:
    """Where to go to push `point` along the unit vector `along`, coming from the free side `out`.

    The tool point first gets behind the point (against `along`); if it is beside or beyond it, it backs off along
    `out` to get around.
    """
    error = eef - point
    ahead, free = float(error @ along), float(error @ out)
    aside = np.linalg.norm(error - ahead * along - free * out)
    behind = point - 0.045 * along
    if ahead > -0.015 and free > -0.03 and not (ahead < 0.01 and abs(free) < 0.03 and aside < 0.02):
        return behind + 0.07 * out if free < 0.05 or ahead > 0.0 else behind
    if free > 0.02 or aside > 0.02:
        return behind
    return point + through * along


def faucet(world: World, task: Task) -> Command:
    """Push the lever sideways near its tip."""
    tip = world.site("faucet_tip")
    outward = (tip - world.site("faucet_hinge")) * [1, 1, 0]
    outward /= np.linalg.norm(outward)
    return push(world.eef, tip, world.memory["turn"] * np.cross(Z, outward), outward), CLOSE


def spout(world: World, task: Task) -> Command:
    """Push the spout's end sideways."""
    tip = world.site("spout_tip")
    outward = (tip - world.site("spout_hinge")) * [1, 1, 0]
    outward /= np.linalg.norm(outward)
    wanted = world.memory["side"] * np.pi / 4
    turn = 1.0 if wanted > world.joint("faucet_spout") else -1.0
    return push(world.eef, tip, turn * np.cross(Z, outward), outward), CLOSE


def door(world: World, task: Task) -> Command:
    """Push a door's outer face near its free edge; of two doors, one after the other."""
    ajar = [name for name in world.memory["doors"] if world.fraction(name) > 0.04]
    name = (ajar or world.memory["doors"])[0]
    point, hinge = world.site(f"{name}_push"), world.site(f"{name}_hinge")
    outward = (point - hinge) / np.linalg.norm(point - hinge)
    normal = opening(world, name) * np.cross(outward, Z)  # of the outer face
    return push(world.eef, point + 0.010 * normal, -normal, outward), CLOSE


def opening(world: World, name: str) -> float:
    """1 for a door hinged on the left, -1 for one on the right."""
    return -float(np.sign(world.model.joint(name).axis[2]))


def close_drawer(world: World, task: Task) -> Command:
    """Push the drawer's bar straight in."""
    handle = world.site(f"{world.memory['drawer']}_handle")
    aside, above = np.abs(world.eef - handle)[1:]
    astray = max(aside - 0.06, above - 0.03, 0.0)  # beyond the bar, and what of the front is safe to push
    return handle + (0.05 - min(0.12, 5.0 * astray)) * X, CLOSE


def stove(world: World, task: Task) -> Command:
    """Push the upper end of the knob's bar sideways."""
    knob = world.memory["knob"]
    point, hub = world.site(f"knob_push {knob}"), world.site(f"knob_hub {knob}")
    radius = (point - hub) / np.linalg.norm(point - hub)
    if world.memory["turn"] < 0:
        point = point - 0.008 * X  # from below, the fingers' tips would meet the knob's disc
    return push(world.eef, point, world.memory["turn"] * np.cross(-X, radius), -X), CLOSE


def button(world: World, task: Task) -> Command:
    """Press; once that has worked, back off."""
    point = world.site(world.memory["button"])
    if world.memory["on"] == world.memory["wanted"]:
        return point - 0.25 * X, CLOSE
    aside = float(np.linalg.norm((world.eef - point)[1:]))
    return point + (0.04 - min(0.10, 4.0 * max(aside - 0.008, 0.0))) * X, CLOSE
