"""Scripted experts: each action is a function of the present simulator state, without timers or phases.

They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.kitchen.env import KitchenEnv
from envs.kitchen.fixtures import SINK_HALF
from envs.kitchen.robot import ACTION_DIM, POSITION_SCALE, ROTATION_SCALE, exponential, logarithm, rotation
from envs.kitchen.world import World

OPEN, CLOSE = -1.0, 1.0
SPEED = {"pick_and_place": 0.5, "drawer": 0.45, "door": 0.4}  # largest norm of an action's position part
DEFAULT_SPEED = 0.3
X, Y, Z = np.eye(3)

# A strategy gives the wanted world position of the tool point and the gripper's command.
Strategy = Callable[[World], tuple[np.ndarray, float]]


class Expert:
    """Moves the hand towards what its strategy wants, keeping the task's nominal hand angles."""

    def __init__(self, env: KitchenEnv):
        self._env = env
        self._strategy = _STRATEGIES[env.info.family]
        self._speed = SPEED.get(env.info.family, DEFAULT_SPEED)

    def act(self) -> np.ndarray:
        """The clean action float32 [12] for the present state."""
        world = self._env.world
        controller = world.controller
        goal, gripper = self._strategy(world)
        base = world.data.qpos[controller.base_qpos]
        turn = exponential(np.array([0.0, 0.0, -base[2]]))
        offset = turn @ (goal - world.eef)
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = _limited(offset / POSITION_SCALE, self._speed)
        wanted, present = rotation(np.array(self._env.task.angles)), rotation(controller.arm[3:])
        action[3:6] = _limited(logarithm(wanted @ present.T) / ROTATION_SCALE, 0.3)
        action[6], action[11] = gripper, -1.0
        return action


def make_expert(env: KitchenEnv) -> Expert:
    """The expert of the environment's task; it follows `reset` and `restore` by itself."""
    return Expert(env)


def _limited(vector: np.ndarray, largest: float) -> np.ndarray:
    return vector * min(1.0, largest / max(float(np.linalg.norm(vector)), 1e-9))


def _push(eef: np.ndarray, point: np.ndarray, along: np.ndarray, out: np.ndarray, through: float = 0.05) -> np.ndarray:
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


def _faucet(world: World) -> tuple[np.ndarray, float]:
    tip = world.site("faucet_tip")
    outward = (tip - world.site("faucet_hinge")) * [1, 1, 0]
    outward /= np.linalg.norm(outward)
    return _push(world.eef, tip, np.cross(Z, outward), outward), CLOSE


def _drawer(world: World) -> tuple[np.ndarray, float]:
    """Take the bar between the fingers, close, pull."""
    handle = world.site("drawer_handle") + 0.008 * X  # a little behind the bar, for a firm grip
    depth, along, across = np.abs(world.eef - handle)
    if 0.010 < _gap(world) < 0.034 and depth < 0.026 and along < 0.06 and across < 0.045:
        return handle - 0.06 * X, CLOSE  # held
    if depth < 0.022 and along < 0.05 and across < 0.024:
        return handle, CLOSE
    astray = max(along - 0.03, across - 0.012, 0.0)
    return handle - min(0.06, 3.0 * astray) * X, OPEN


def _gap(world: World) -> float:
    """Metres between the fingers."""
    return float(world.data.qpos[world.controller.finger_qpos].sum())


def _pick_and_place(world: World) -> tuple[np.ndarray, float]:
    """Above the object, down, close, up, across, down over the basin, open, up."""
    eef, thing, sink = world.eef, world.position(world.memory["target"]), world.position("sink")
    half = world.half(world.memory["target"])
    grip = thing + max(0.0, half[2] - 0.045) * Z
    aside, above = float(np.linalg.norm((eef - grip)[:2])), float(eef[2] - grip[2])
    held = aside < 0.03 and abs(above) < 0.03 and _gap(world) < 2 * half[0] + 0.012
    drop = sink + np.array([0.0, 0.06, 0.02])
    if (np.abs(thing - sink)[:2] < np.array(SINK_HALF) - 0.05).all():
        if not held:
            return eef * [1, 1, 0] + (sink[2] + 0.35) * Z, OPEN
        return (eef, OPEN) if eef[2] < drop[2] + 0.06 else (drop, CLOSE)
    if not held:
        if aside < 0.022 and abs(above) < 0.015:
            return grip, CLOSE
        return grip + min(0.12, 4.0 * max(aside - 0.012, 0.0)) * Z, OPEN
    # Held: rise first; how far it may move sideways grows with the height.
    carry = sink[2] + 0.15
    goal = eef + np.clip((eef[2] - (carry - 0.06)) / 0.04, 0.0, 1.0) * (drop - eef)
    return np.array([goal[0], goal[1], carry]), CLOSE


def _door(world: World) -> tuple[np.ndarray, float]:
    """Push the door's outer face near its free edge."""
    point, hinge = world.site("door_push"), world.site("door_hinge")
    outward = (point - hinge) / np.linalg.norm(point - hinge)
    normal = np.cross(outward, Z)  # of the outer face
    return _push(world.eef, point + 0.010 * normal, -normal, outward), CLOSE


def _stove(world: World) -> tuple[np.ndarray, float]:
    """Push the upper end of the knob's bar sideways."""
    knob = world.memory["knob"]
    point, hub = world.site(f"knob_push {knob}"), world.site(f"knob_hub {knob}")
    radius = (point - hub) / np.linalg.norm(point - hub)
    return _push(world.eef, point, np.cross(-X, radius), -X), CLOSE


def _button(world: World) -> tuple[np.ndarray, float]:
    """Press; once the lamp is lit, back off."""
    point = world.site(world.memory["button"])
    if world.memory["on"]:
        return point - 0.25 * X, CLOSE
    aside = float(np.linalg.norm((world.eef - point)[1:]))
    return point + (0.04 - min(0.10, 4.0 * max(aside - 0.008, 0.0))) * X, CLOSE


_STRATEGIES: dict[str, Strategy] = {
    "faucet": _faucet,
    "drawer": _drawer,
    "pick_and_place": _pick_and_place,
    "door": _door,
    "stove": _stove,
    "button": _button,
}
