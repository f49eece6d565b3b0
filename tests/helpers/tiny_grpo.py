"""A GRPO run of a few seconds with the tiny policy: shared by the tests of the trainer and of the loop."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np
import tiny_policy as tiny
from seeds import fresh_seed

from z1_jax.config.schema import Config, EnvConfig, GroupConfig, OptimConfig, RewardConfig, TrainConfig, UpdateConfig
from z1_jax.metrics import MetricsWriter, read_records
from z1_jax.policy import Policy, named
from z1_jax.rl.loop import train_grpo
from z1_jax.rl.rollout import Rollouts
from z1_jax.rl.trainer import GrpoTrainer

SEED = fresh_seed(__name__) % 10_000
CONFIG = Config(
    seed=SEED,
    env=EnvConfig(parallel=16),
    flow=tiny.EVERY_STEP,
    group=GroupConfig(count=4, size=4, branching="tree", prefix_chunks=2, prefix_chunks_end=2),
    reward=RewardConfig(keep_low=0.0, keep_high=1.0),
    update=UpdateConfig(
        epochs=2, batch_size=8, micro_batch=8, optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="constant")
    ),
    train=TrainConfig(iterations=3, checkpoint_every=2),
)


@functools.cache
def compiled() -> GrpoTrainer:
    """The trainer whose compiled functions the others use. Nobody may train it."""
    return GrpoTrainer(tiny.policy(), CONFIG, tiny.one_device(), 16)


def trainer(config: Config = CONFIG, **episodes: Any) -> GrpoTrainer:
    """A trainer at iteration 0 with the functions of `compiled`; `config` may differ in what they do not know.

    Args: `episodes`: the trainer's `episode_of`.
    """
    new, shared = GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16, **episodes), compiled()
    new.actor, new._updater = shared.actor, shared._updater
    return new


def differing(made: GrpoTrainer) -> Rollouts:
    """Rollouts whose update has nodes to train on: in some iterations all members succeed before they part."""
    for iteration in range(20):
        rollouts = made.collect(tiny.pool(16), iteration)
        if made.credit(rollouts, np.random.default_rng(0)).usable.any():
            return rollouts
    raise AssertionError("in 20 iterations no group comes to a chunk of its members' own")


def grpo(run_dir: pathlib.Path, made: GrpoTrainer, pool: Any = None) -> Policy:
    with MetricsWriter(run_dir) as writer:
        return train_grpo(made, pool or tiny.pool(16), run_dir / "checkpoints" / "grpo", writer)


def records(run_dir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records without what is measured by the clock."""
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in read_records(run_dir / name)]


def assert_same_bits(a: Policy, b: Policy) -> None:
    a, b = named(a.params), named(b.params)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
