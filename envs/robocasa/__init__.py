"""RoboCasa, versions 0.2 and 1.0.1, behind `envs.base.Env`. Needs packages of its own: see docs/robocasa.md."""

from __future__ import annotations

from typing import Any


def make(task: str, **options: Any) -> Any:
    """The environment of a task; `options` are RoboCasaEnv's. Raises ValueError as it does."""
    from envs.robocasa.env import RoboCasaEnv

    return RoboCasaEnv(task, **options)
