"""Scripted experts: each action is a function of the present simulator state, without timers or phases.

They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

import numpy as np

from envs.kitchen.env import KitchenEnv
from envs.kitchen.experts import carrying, pulling, pushing
from envs.kitchen.experts.base import Strategy
from envs.kitchen.robot import ACTION_DIM, POSITION_SCALE, ROTATION_SCALE, exponential, logarithm, rotation

# family: the strategy, the largest position part of an action, and whether that bounds its norm or each direction by
# itself, so that a small error across the way is made good before a long way is gone.
_STRATEGIES: dict[str, tuple[Strategy, float, bool]] = {
    "faucet": (pushing.faucet, 0.3, False),
    "faucet_off": (pushing.faucet, 0.4, True),
    "spout": (pushing.spout, 0.4, True),
    "door": (pushing.door, 0.4, False),
    "doors": (pushing.door, 0.4, True),
    "close_drawer": (pushing.close_drawer, 0.4, True),
    "stove": (pushing.stove, 0.3, False),
    "stove_off": (pushing.stove, 0.4, True),
    "button": (pushing.button, 0.3, False),
    "stop_button": (pushing.button, 0.4, True),
    "drawer": (pulling.drawer, 0.45, False),
    "open_door": (pulling.open_door, 0.4, True),
    "pick_and_place": (carrying.into_sink, 0.5, False),
    "onto_dish": (carrying.onto_dish, 0.5, True),
    "into": (carrying.into, 0.5, True),
    "out_of": (carrying.out_of, 0.5, True),
}


class Expert:
    """Moves the hand towards the point that its strategy asks for, at the task's nominal hand angles."""

    def __init__(self, env: KitchenEnv):
        self._env = env
        self._strategy, self._speed, self._each = _STRATEGIES[env.info.family]

    def act(self) -> np.ndarray:
        """The clean action float32 [12] for the present state."""
        world = self._env.world
        controller = world.controller
        goal, gripper = self._strategy(world, self._env.task)
        base = world.data.qpos[controller.base_qpos]
        turn = exponential(np.array([0.0, 0.0, -base[2]]))
        offset = turn @ (goal - world.eef) / POSITION_SCALE
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = np.clip(offset, -self._speed, self._speed) if self._each else _limited(offset, self._speed)
        wanted, present = rotation(np.array(self._env.task.angles)), rotation(controller.arm[3:])
        action[3:6] = _limited(logarithm(wanted @ present.T) / ROTATION_SCALE, 0.3)
        action[6], action[11] = gripper, -1.0
        return action


def make_expert(env: KitchenEnv) -> Expert:
    """The expert of the environment's task; it follows `reset` and `restore` by itself."""
    return Expert(env)


def _limited(vector: np.ndarray, largest: float) -> np.ndarray:
    return vector * min(1.0, largest / max(float(np.linalg.norm(vector)), 1e-9))
