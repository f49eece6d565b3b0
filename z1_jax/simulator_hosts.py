"""Simulators on other machines, as `rollout.*` asks for them: checked before a run, started when it needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from envs.base import Env
from envs.ray_cluster import RESOURCE, ray_module, refusal
from envs.ray_workers import RayWorkers
from z1_jax import processes
from z1_jax.config.schema import Config, ConfigError
from z1_jax.suites import simulators


def check_ray(config: Config) -> None:
    """Refuses a config whose Ray cluster is not there, before there is any work to lose.

    Raises:
        ConfigError: Ray is not installed, or its cluster cannot be joined or has no simulators.
    """
    if config.rollout.backend != "ray":
        return
    try:
        ray_module()
    except ModuleNotFoundError as error:
        raise ConfigError(f"config key rollout.backend: got ray, but {error}") from None
    address = config.rollout.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        if processes.count() > 1:
            raise ConfigError(
                f"config key rollout.address: got '' with {processes.count()} learners, expected the address of "
                "the cluster that they share"
            )
        return
    told = refusal(address)
    if told.text:
        raise ConfigError(f"config key rollout.address: got {address}: {told.text}")
    if told.units < config.env.workers:
        line = f"the cluster at {address} has {told.units:g} units of the resource {RESOURCE}"
        if not told.units:
            raise ConfigError(f"config key rollout.address: {line}, expected some: see docs/ray.md")
        print(f"{line}, env.workers={config.env.workers} wants as many: start nodes until rollouts begin", flush=True)


def ray_workers(config: Config, factories: Mapping[str, Callable[[], Env]], actors: int) -> RayWorkers:
    """Joins the cluster with so many actors; those of each learner have names of their own there.

    Raises:
        PoolError: it cannot be joined any more.
    """
    learner = f" learner {processes.index()}" if processes.count() > 1 else ""
    return RayWorkers(
        factories,
        simulators(config),
        actors,
        config.rollout.address,
        config.env.start_timeout_s,
        name=f"{config.directory.name}{learner}",
    )
