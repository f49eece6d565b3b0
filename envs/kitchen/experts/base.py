"""Helpers that the experts' strategies share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from envs.kitchen.world import World

OPEN, CLOSE = -1.0, 1.0
X, Y, Z = np.eye(3)

Command = tuple[np.ndarray, float]  # the wanted world position [3] of the tool point, and the gripper's command
Strategy = Callable[[World, Any], Command]  # of a world and the task of the family that it solves


def gap(world: World) -> float:
    """Metres between the fingers."""
    return float(world.data.qpos[world.controller.finger_qpos].sum())
