"""Scripted experts: each action is a function of the present simulator state, without timers or phases.

They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

import numpy as np

from envs.kitchen.env import KitchenEnv
from envs.kitchen.experts import carrying, pulling, pushing
from envs.kitchen.experts.base import Strategy
from envs.kitchen.robot import ACTION_DIM, POSITION_SCALE, ROTATION_SCALE, exponential, logarithm, rotation

# family: the strategy, and the largest norm of an action's position part
_STRATEGIES: dict[str, tuple[Strategy, float]] = {
    "faucet": (pushing.faucet, 0.3),
    "spout": (pushing.spout, 0.3),
    "door": (pushing.door, 0.4),
    "close_drawer": (pushing.close_drawer, 0.4),
    "stove": (pushing.stove, 0.3),
    "button": (pushing.button, 0.3),
    "drawer": (pulling.drawer, 0.45),
    "open_door": (pulling.open_door, 0.5),
    "pick_and_place": (carrying.into_sink, 0.5),
    "onto_dish": (carrying.onto_dish, 0.5),
    "into": (carrying.into, 0.5),
    "out_of": (carrying.out_of, 0.5),
}


class Expert:
    """Moves the hand towards what its strategy wants, keeping the task's nominal hand angles."""

    def __init__(self, env: KitchenEnv):
        self._env = env
        self._strategy, self._speed = _STRATEGIES[env.info.family]

    def act(self) -> np.ndarray:
        """The clean action float32 [12] for the present state."""
        world = self._env.world
        controller = world.controller
        goal, gripper = self._strategy(world, self._env.task)
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
