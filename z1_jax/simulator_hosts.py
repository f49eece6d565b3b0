"""Simulators on other machines, as `rollout.*` asks for them: checked before a run, started when it needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import jax

from envs.base import Env
from envs.ray_cluster import RESOURCE, ray_module, refusal
from envs.ray_workers import RayWorkers
from z1_jax.config.schema import Config, ConfigError
from z1_jax.suites import simulators


def learners() -> int:
    """Processes of the run. Looks at no device where there is only this one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


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
        if learners() > 1:
            raise ConfigError(
                f"config key rollout.address: got '' with {learners()} learners, expected the address of the cluster "
                "that they share"
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


def ray_workers(config: Config, factories: Mapping[str, Callable[[], Env]]) -> RayWorkers:
    """Joins the cluster; the actors of each learner have names of their own there.

    Raises:
        PoolError: it cannot be joined any more.
    """
    learner = f" learner {jax.process_index()}" if learners() > 1 else ""
    return RayWorkers(
        factories,
        simulators(config),
        min(config.env.workers, config.env.parallel),
        config.rollout.address,
        name=f"{config.directory.name}{learner}",
    )
