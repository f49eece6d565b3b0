"""Scripted experts: each action is a function of the present simulator state, without timers or phases.

They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.kitchen.env import KitchenEnv
from envs.kitchen.robot import ACTION_DIM, POSITION_SCALE, ROTATION_SCALE, exponential, logarithm, rotation
from envs.kitchen.world import World

OPEN, CLOSE = -1.0, 1.0
SPEED = 0.4  # largest norm of the position part of an action
X, Y, Z = np.eye(3)

# A strategy gives the wanted world position of the tool point and the gripper's command.
Strategy = Callable[[World], tuple[np.ndarray, float]]


class Expert:
    """Moves the hand towards what its strategy wants, keeping the task's nominal hand angles."""

    def __init__(self, env: KitchenEnv, strategy: Strategy):
        self._env = env
        self._strategy = strategy

    def act(self) -> np.ndarray:
        """The clean action float32 [12] for the present state."""
        world = self._env.world
        controller = world.controller
        goal, gripper = self._strategy(world)
        base = world.data.qpos[controller.base_qpos]
        turn = exponential(np.array([0.0, 0.0, -base[2]]))
        offset = turn @ (goal - world.eef)
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = _limited(offset / POSITION_SCALE, SPEED)
        wanted, present = rotation(np.array(self._env.task.angles)), rotation(controller.arm[3:])
        action[3:6] = _limited(logarithm(wanted @ present.T) / ROTATION_SCALE, 0.3)
        action[6], action[11] = gripper, -1.0
        return action


def make_expert(env: KitchenEnv) -> Expert:
    """The expert of the environment's task; it follows `reset` and `restore` by itself."""
    return Expert(env, _STRATEGIES[env.info.family])


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


_STRATEGIES: dict[str, Strategy] = {"faucet": _faucet}
