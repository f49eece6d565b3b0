"""A small kitchen in MuJoCo: primitives only, RoboCasa's interface, nothing to download."""

from __future__ import annotations

from typing import Any

from envs.kitchen.env import CAMERAS, DEFAULT_CAMERAS, KitchenEnv
from envs.kitchen.objects import OBJECT_SPLITS
from envs.kitchen.scene import LAYOUT_SPLITS, LAYOUTS, STYLE_SPLITS, STYLES
from envs.kitchen.tasks import TASKS

__all__ = [
    "CAMERAS",
    "DEFAULT_CAMERAS",
    "LAYOUTS",
    "LAYOUT_SPLITS",
    "OBJECT_SPLITS",
    "STYLES",
    "STYLE_SPLITS",
    "TASKS",
    "KitchenEnv",
    "make",
]


def make(task: str, **options: Any) -> KitchenEnv:
    """The environment of a task; `options` are KitchenEnv's. Raises ValueError for an unknown name."""
    return KitchenEnv(task, **options)
