"""Converts between ALOHA's joints and grippers and those of π0's pretraining: openpi's `adapt_to_pi=True`.

Joints 1 and 2 of each arm change sign. ALOHA's state has the opening of a gripper, the pretraining its angle. The
numbers are those of openpi's src/openpi/policies/aloha_policy.py. NumPy in and out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_SIGNS = np.array([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0] * 2)  # joints 0 to 5 and the gripper, left then right
_GRIPPERS = [6, 13]
_OPENING = (0.01844, 0.05800)  # metres: 0 and 1 of a gripper's state
_ARM, _HORN = 0.036, 0.022  # metres: the crank that moves a gripper's fingers
_ANGLE = (0.5476, 1.6296)  # radians: 0 and 1 of a gripper in pretraining
_COMMAND = (-0.6213, 1.4910)  # radians: 0 and 1 of a gripper's command


def policy_state(state: Float[np.ndarray, "14"]) -> np.ndarray:
    """ALOHA's state as the policy knows it."""
    out = _SIGNS * state
    opening = _OPENING[0] + out[_GRIPPERS] * (_OPENING[1] - _OPENING[0])
    angle = np.arcsin(np.clip((_HORN**2 + opening**2 - _ARM**2) / (2 * _HORN * opening), -1.0, 1.0))
    out[_GRIPPERS] = (angle - _ANGLE[0]) / (_ANGLE[1] - _ANGLE[0])
    return out


def client_actions(actions: Float[np.ndarray, "H 14"]) -> np.ndarray:
    """The policy's actions as ALOHA takes them; a gripper's is an angle above the closed one."""
    out = _SIGNS * actions
    out[:, _GRIPPERS] = (out[:, _GRIPPERS] + _ANGLE[0] - _COMMAND[0]) / (_COMMAND[1] - _COMMAND[0])
    return out.astype(np.float32)


def policy_actions(actions: Float[np.ndarray, "L 14"]) -> np.ndarray:
    """The inverse of `client_actions`."""
    out = _SIGNS * actions
    out[:, _GRIPPERS] = _COMMAND[0] + out[:, _GRIPPERS] * (_COMMAND[1] - _COMMAND[0]) - _ANGLE[0]
    return out
