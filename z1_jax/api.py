"""What notebooks and scripts use: a trained policy that acts, and environments to act in. See z1_jax.load_policy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from envs.base import Env, EnvObservation
from z1_jax import policy as policies
from z1_jax import sharding, suites
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, FlowConfig, build
from z1_jax.rl.actor import act, make_actor, stack_ids
from z1_jax.rl.rollout import BrokenIteration

_OF_A_RUN = (
    "executed",
    "parallel",
    "workers",
    "timeout_s",
    "python",
)  # keys of env that say nothing of one environment
_FIELDS = tuple(field.name for field in dataclasses.fields(EnvObservation))


class ActingPolicy:
    """A policy on one device. It acts as in evaluations: with the ODE sampler, from noise that numbers decide.

    Attributes:
        policy: the network with its parameters, processor and what it was trained in.
    """

    def __init__(self, policy: policies.Policy):
        """Args: `policy`: its parameters on one device."""
        self.policy = policy
        mesh = sharding.make_mesh(devices=jax.tree.leaves(policy.params)[0].devices())
        graphdef, *params = policy.split("expert")
        self._params = (params[0], params[1])
        self._actor = make_actor(policy, graphdef, FlowConfig(steps=policy.denoising_steps), mesh, 1)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that it wants to see."""
        return tuple(camera for camera in self.policy.processor.cameras if camera)

    @property
    def executed(self) -> int:
        """E, how many control steps it acts for before it wants to look again."""
        return self.policy.executed

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self.policy.processor.env_action_dim

    @property
    def state_dim(self) -> int:
        """Width of a state."""
        return self.policy.processor.stats["state"].dim

    def act(
        self, observation: EnvObservation | Mapping[str, Any], seed: int = 0, chunk: int = 0, noise_seed: int = 0
    ) -> np.ndarray:
        """The next actions float32 [executed, action_dim], in the environment's units.

        The three numbers decide the noise: an episode's seed, how many times the policy has acted in it before, and
        `eval.noise_seed`. With an evaluation's own, the actions are those of that evaluation.

        Args:
            observation: an EnvObservation, or a mapping of its fields: `images` (camera -> uint8 [height, width, 3],
                RGB), `state` (float [state_dim], the environment's units) and `instruction`.

        Raises:
            ValueError: a field or camera is missing, a picture or state is unusable, a number is negative.
            BrokenIteration: the policy drew a number that is not finite.
        """
        if min(seed, chunk, noise_seed) < 0:
            raise ValueError(f"got seed={seed}, chunk={chunk}, noise_seed={noise_seed}: expected 0 or more")
        looks, ids = [_observation(observation)], stack_ids(np.array([[seed]]), chunk, np.array([[0]]))
        with jax.default_matmul_precision("float32"):  # as the commands: accelerators would round factors otherwise
            acted = act(
                self._actor, self._params, self.policy.processor, looks, ids, (noise_seed,), executed=self.executed
            )
        if not np.isfinite(acted.chain.x).all():
            raise BrokenIteration("the policy drew numbers that are not finite", {"x": acted.chain.x})
        return acted.actions[0, 0]


def _observation(given: EnvObservation | Mapping[str, Any]) -> EnvObservation:
    if isinstance(given, EnvObservation):
        return given
    if not isinstance(given, Mapping) or set(given) != set(_FIELDS):
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"got an observation of {got}: expected {', '.join(_FIELDS)}")
    return EnvObservation(given["images"], np.asarray(given["state"], np.float32), given["instruction"])


def load_policy(path: str | pathlib.Path) -> ActingPolicy:
    """The policy of a run directory or checkpoint (PATH@best: see `policy.find_policy`), on the first device.

    Raises:
        UserError: there is none, or it is damaged.
    """
    directory, step = policies.find_policy(path)
    checkpoints = Checkpoints(directory)
    try:
        return ActingPolicy(policies.load_policy(checkpoints, step, sharding.make_mesh(devices=jax.devices()[:1])))
    finally:
        checkpoints.close()


def make_env(
    task: str = "", suite: str = "kitchen", *, evaluation: Mapping[str, Any] | None = None, **settings: Any
) -> Env:
    """One environment, in this process.

    Args:
        task: a name of the suite's; may be left out where it has one task.
        suite: as `env.suite`: kitchen, robocasa, gym:ENV_ID, or package.module:name.
        evaluation: keys of `eval`, for suites that read some, such as RoboCasa's `scenes`.
        settings: other keys of `env`, e.g. `image_size=128`.

    Raises:
        ConfigError: an unknown name or setting; the suite is not there.
    """
    for key in _OF_A_RUN:
        if key in settings:
            raise ConfigError(f"config key env.{key}: has no effect on a single environment; leave it out")
    values = {"algorithm": "eval", "checkpoint": "none", "env": {"suite": suite, **settings}, "eval": evaluation or {}}
    config = build(Config, values | ({"task": task} if task else {}))
    check(config)
    if not task and len(known := suites.resolve(config).tasks) > 1:
        raise ConfigError(f"config key task: got nothing, expected one of {', '.join(known)}")
    config = suites.settled(config)
    return suites.make_env(config, config.task)()
