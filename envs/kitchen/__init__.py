"""A small kitchen in MuJoCo: primitives only, RoboCasa's interface, nothing to download."""

from __future__ import annotations

from typing import Any

from envs.kitchen.env import CAMERAS, DEFAULT_CAMERAS, KitchenEnv
from envs.kitchen.scene import LAYOUTS, STYLES
from envs.kitchen.tasks import TASKS

__all__ = ["CAMERAS", "DEFAULT_CAMERAS", "LAYOUTS", "STYLES", "TASKS", "KitchenEnv", "make"]


def make(task: str, **options: Any) -> KitchenEnv:
    """The environment of a task; `options` are KitchenEnv's. Raises ValueError for an unknown name."""
    return KitchenEnv(task, **options)
