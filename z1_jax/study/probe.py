"""python -m z1_jax.study.probe: a short measurement of what a study's runs do here, in a process of its own.

Real parts of a run, on few tasks: demonstrations, SFT steps, and an iteration of RL whose episodes are cut short.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from z1_jax.agreement import seen_in, trained_in
from z1_jax.config.schema import Config
from z1_jax.data.dataset import Dataset
from z1_jax.data.loader import Loader
from z1_jax.files import write_whole
from z1_jax.initial_policy import given_policy, new_policy
from z1_jax.policy import Policy
from z1_jax.process import run_main, start_jax
from z1_jax.rl.trainer import GrpoTrainer
from z1_jax.sft import SftTrainer
from z1_jax.stages import demonstrations, make_mesh, make_pool
from z1_jax.study.config import parsed_line
from z1_jax.suites import episode_steps, names_of_tasks, resolve, settled

TASKS, DEMOS = 3, 8  # tasks that are tried, at most, and demonstrations of each
STEPS, LOOKS = 3, 4  # timed SFT steps, looks of a rollout


def main(argv: Sequence[str]) -> None:
    """Measures the runs whose command lines the JSON file argv[1] holds, and writes what they take to argv[2]."""
    lines = json.loads(pathlib.Path(argv[1]).read_text())
    start_jax()
    sft, rl = (parsed_line(lines[name]) if lines[name] else None for name in ("sft", "rl"))
    measured = measure(sft, rl)
    write_whole(pathlib.Path(argv[2]), json.dumps(measured))


def measure(sft: Config | None, rl: Config | None) -> dict[str, float]:
    """Seconds of a control step of demonstrations, of an SFT step, of a look of RL and of a chunk in its update.

    And `executed`, the control steps between two looks. What there is not is left out.
    """
    if sft is None:
        return _from_given(rl) if rl else {}
    sft = settled(sft)
    few = sft.every_task[:: -(-len(sft.every_task) // TASKS)]
    mesh, found = make_mesh(sft), {}
    with tempfile.TemporaryDirectory() as scratch, jax.set_mesh(mesh):
        took = []
        for episodes in (1, 1 + DEMOS):  # the difference is without the workers' start
            demos = dataclasses.replace(sft.demos, episodes=episodes)
            small = settled(_with_tasks(dataclasses.replace(sft, demos=demos), few))
            began = time.perf_counter()
            dataset = demonstrations(small, pathlib.Path(scratch) / f"demonstrations{episodes}")
            took.append(time.perf_counter() - began)
        if not sft.demos.dataset:
            steps = DEMOS * sum(episode_steps(_with_tasks(small, [task])) for task in few)
            found["demonstration"] = max(0.0, took[1] - took[0]) / steps
        policy = given_policy(small, sft.init, mesh, dataset) if sft.init else new_policy(small, dataset, mesh)
        found["sft"], policy = _sft(small, policy, dataset, mesh)
    found["executed"] = policy.executed
    return found | (_rl(rl, policy, mesh) if rl else {})


def _from_given(rl: Config) -> dict[str, float]:
    """What RL takes from a policy that is there."""
    mesh = make_mesh(rl)
    with jax.set_mesh(mesh):
        policy = given_policy(rl, rl.init, mesh)
        return {"executed": policy.executed, **_rl(rl, policy, mesh)}


def _with_tasks(config: Config, tasks: Sequence[str]) -> Config:
    one = len(tasks) == 1
    return dataclasses.replace(config, task=tasks[0] if one else "", tasks=() if one else tuple(tasks))


def _sft(config: Config, policy: Policy, dataset: Dataset, mesh: jax.sharding.Mesh) -> tuple[float, Policy]:
    """Seconds of an SFT step once it is compiled, and the policy."""
    batch = config.sft.batch_size
    loader = Loader(dataset, policy.processor, batch, config.seed, sampling=config.demos.sampling)
    trainer = SftTrainer(policy, config.sft, config.seed, mesh, config.lora)
    jax.block_until_ready(trainer.step(next(loader), 0))
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        stats = trainer.step(next(loader), step)
    jax.block_until_ready(stats)
    return (time.perf_counter() - began) / STEPS, trainer.policy()


def _rl(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Seconds of a look in rollouts and of a chunk in an update, once they are compiled."""
    config = settled(config)
    # Of an untrained policy: episodes of a few looks, every group kept.
    config = dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, horizon=LOOKS * policy.executed),
        reward=dataclasses.replace(config.reward, keep_low=-10.0, keep_high=1.0),
        group=dataclasses.replace(
            config.group,
            oversample=1.0,
            prefix_chunks=min(config.group.prefix_chunks, LOOKS - 1),
            prefix_chunks_end=min(config.group.prefix_chunks_end, LOOKS - 1),
        ),
    )
    with make_pool(config) as pool:
        policy = trained_in(policy, seen_in(config.every_task, pool.spec), names_of_tasks(config))
        trainer = GrpoTrainer(policy, config, mesh, pool.num_envs, resolve(config).episode)
        for iteration in range(2):  # the first compiles
            began = time.perf_counter()
            rollouts = trainer.collect(pool, iteration)
            collected = time.perf_counter()
            stats: dict[str, Any] = trainer.update(rollouts, iteration)
            ended = time.perf_counter()
    chunks, used = len(rollouts.nodes.chunk), max(1, int(stats["nodes/used"]))
    return {"look": (collected - began) / chunks, "update": (ended - collected) / used}


if __name__ == "__main__":
    run_main(main)  # type: ignore[arg-type]
