"""LIBERO and the LIBERO-PRO perturbations that are published with it, behind `envs.base.Env`. See docs/libero.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.libero.env import LiberoEnv


def make(task: str, **options: Any) -> LiberoEnv:
    """The environment of a task; `options` are LiberoEnv's. Raises ValueError as it does."""
    from envs.libero.env import LiberoEnv

    return LiberoEnv(task, **options)
