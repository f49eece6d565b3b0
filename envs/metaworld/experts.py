"""The scripted experts of Meta-World's own package. They read poses that a policy has to infer from its pictures."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from envs.metaworld import compat


class Expert:
    """A task's expert in one environment: a function of the present observation alone."""

    def __init__(self, env: Any):
        self._env = env
        self._policy = compat.load()[1][env.spec.task]()

    def act(self) -> np.ndarray:
        """The action [4] for the environment's present state, clipped to [-1, 1], as the environment would."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will be clipped
            action = self._policy.get_action(self._env.observation)
        return np.clip(action.astype(np.float64), -1.0, 1.0)


def make_expert(env: Any) -> Expert:
    """The expert of an environment's task."""
    return Expert(env)
