"""For notebooks and scripts: a policy that acts, and environments to act in. `z1_jax` shows both by these names."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from envs.base import Env, EnvObservation
from z1_jax import policy as policies
from z1_jax import sharding, suites
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, EnvConfig, FlowConfig, build
from z1_jax.evaluation import make_actor
from z1_jax.process import start_jax
from z1_jax.rl.rollout import BrokenIteration

_OF_A_RUN = ("executed", "parallel", "workers", "timeout_s")  # keys of env that say nothing of one environment


class ActingPolicy:
    """A policy on the devices that JAX has, which decides as evaluation does; compiled at its first decision.

    Attributes:
        cameras: that an observation must have.
        executed: E, steps of a decision before the policy should look again.
        instructions: what it was told in training, where that is known.
    """

    def __init__(self, policy: policies.Policy, mesh: jax.sharding.Mesh):
        graphdef, *self._params = policy.split("expert")
        flow = FlowConfig(steps=policy.denoising_steps)
        self._actor, self._mesh, self._processor = make_actor(policy, graphdef, flow, mesh, 1), mesh, policy.processor
        self.cameras = tuple(camera for camera in policy.processor.cameras if camera)
        self.executed = policy.executed
        self.instructions = tuple(policy.world.get("instructions", ()))

    def act(self, observation: EnvObservation, seed: int | Sequence[int] = 0) -> np.ndarray:
        """Actions float32 [executed, action_dim] in raw units, by the ODE sampler.

        Args:
            seed: of the noise that it starts from, one number or more, none negative. Equal ones with equal
                observations give equal actions. Evaluation takes (eval.noise_seed, the episode's seed, decisions
                before this one, 0).

        Raises:
            ValueError: a camera is missing, or an image or the state is not as the policy knows it; a negative seed.
            BrokenIteration: the policy drew a number that is not finite.
        """
        key = np.atleast_1d(np.asarray(seed))
        if key.dtype.kind not in "iu" or key.ndim != 1 or not key.size or (key < 0).any():
            raise ValueError(f"seed is {seed!r}, expected a whole number from 0 on, or several")
        params = self._params[0], self._params[1]
        with jax.set_mesh(self._mesh):
            cache, _ = self._actor.encode(params, self._processor.observation([observation]))
            chain = self._actor.sample(params, cache, key[None, None], (), stochastic=False)
        drawn = np.asarray(chain.x)
        if not np.isfinite(drawn).all():
            raise BrokenIteration("the policy drew numbers that are not finite", {"x": drawn})
        return self._processor.env_actions(drawn[0, 0, -1, : self.executed])


def load_policy(path: str | pathlib.Path) -> ActingPolicy:
    """The newest policy of a run directory, of a directory of checkpoints, or one checkpoint; RUN_DIR@best: its best.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    start_jax()
    directory, step = policies.find_policy(path)
    mesh = sharding.make_mesh(-1, 1, 1)
    checkpoints = Checkpoints(directory)
    try:
        return ActingPolicy(policies.load_policy(checkpoints, step, mesh), mesh)
    finally:
        checkpoints.close()


def make_env(task: str = "", **env_keys: Any) -> Env:
    """One environment in this process.

    Args:
        task: a name of the suite's; empty: the only one that it has.
        env_keys: the config's section `env` without a run's own keys, e.g. suite="package.module:name",
            image_size=128, cameras=("robot0_agentview_left",). Tuples may be lists.

    Raises:
        ConfigError: the suite has no such task, an unknown key, or a value that cannot be used.
    """
    for key in _OF_A_RUN:
        if key in env_keys:
            raise ConfigError(f"config key env.{key}: has no effect on a single environment; leave it out")
    env = build(EnvConfig, env_keys, "env.")
    config = Config(algorithm="eval", checkpoint="-", task=task or Config.task, env=env)
    check(config)
    if not task and len(suites.resolve(config).tasks) > 1:
        known = ", ".join(suites.resolve(config).tasks)
        raise ConfigError(f"config key task: got nothing, expected one of {known}")
    config = suites.settled(config)
    return suites.make_env(config, config.task)()
