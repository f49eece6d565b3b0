"""Meta-World behind `envs.base.Env`, with the experts of its own package. See docs/metaworld.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.metaworld.env import MetaWorldEnv


def make(task: str, **options: Any) -> MetaWorldEnv:
    """The environment of a task; `options` are MetaWorldEnv's. Raises ValueError as it does."""
    from envs.metaworld.env import MetaWorldEnv

    return MetaWorldEnv(task, **options)
