"""The kitchen's demonstrators (see envs.demos)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from envs import demos
from envs.base import episodes
from envs.demos import Demonstration, Demonstrator
from envs.kitchen.env import KitchenEnv
from envs.kitchen.experts import make_expert

# Full noise on the position; less where a unit is half a radian or a finger's grip; none on the base.
NOISE_PROFILE = (1.0,) * 3 + (0.3,) * 4 + (0.0,) * 5


def demonstrator(task: str, **options: Any) -> Demonstrator:
    """The expert of a task in KitchenEnv with these options."""
    return Demonstrator(functools.partial(KitchenEnv, task, **options), make_expert, NOISE_PROFILE)


def run_episode(env: KitchenEnv, seed: int, *args: Any, **kwargs: Any) -> Demonstration:
    """`envs.demos.run_episode` in an existing kitchen."""
    (episode,) = episodes([seed])
    return demos.run_episode(demonstrator(env.spec.task), env, episode, *args, **kwargs)


def collect(
    task: str, seeds: Iterable[int], options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Iterator[Demonstration]:
    """`envs.demos.collect` for seeds of a kitchen's task; `options` are KitchenEnv's further arguments."""
    return demos.collect(demonstrator(task, **(options or {})), map(lambda seed: episodes([seed])[0], seeds), **kwargs)


def disturb(seed: int, noise: float) -> tuple[float, Iterator[np.ndarray]]:
    """`envs.demos.disturb` of the kitchen's actions."""
    return demos.disturb(seed, noise, NOISE_PROFILE)
