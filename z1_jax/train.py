"""python -m z1_jax.train --config=configs/grpo.py: demonstrations → SFT → GRPO → paired evaluation → report.

Every stage finds its own finished work in the run directory, so the same command continues an interrupted run.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from envs.video import write_video
from z1_jax.agreement import check_worlds, trained_in
from z1_jax.config import schema as z1_config
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config
from z1_jax.data.normalize import held_line
from z1_jax.evaluation import Evaluation, compare, evaluate, film, rate_sentence, sentence
from z1_jax.files import hold
from z1_jax.initial_policy import given_policy, untrained_policy
from z1_jax.metrics import MetricsWriter
from z1_jax.policy import Policy
from z1_jax.process import require_algorithm, run_main, start_jax
from z1_jax.resuming import check_records, concluded, goes_on_alone, own_policy
from z1_jax.rl.loop import GrpoTrainer, train_grpo
from z1_jax.run_dir import (
    StageClock,
    claim_directory,
    claim_policy,
    conclude,
    finished_sentence,
    policy_identity,
    results_of,
)
from z1_jax.stages import (
    check_inputs,
    demonstrations,
    make_mesh,
    make_pool,
    supervised_policy,
)
from z1_jax.suites import label, pin_version
from z1_jax.worlds import World

HARDLY = 0.05  # success after SFT, below which RL seldom starts


def main(argv: Sequence[str]) -> int | None:
    """Runs the stages of a config in order; each prints what it does."""
    config = parse_command_line(argv)
    require_algorithm(config, ("grpo", "sft"), "train")
    config = pin_version(config)
    start_jax()  # before a checkpoint is opened: that takes the device
    config = check_inputs(config)  # before anything is written
    differing = check_worlds(config)
    mesh = make_mesh(config)
    run_dir = claim_directory(config)
    print(f"run directory {run_dir}", flush=True)
    if finished := finished_sentence(run_dir):
        print(f"already finished: {finished}")
        return None
    hold(run_dir)
    if config.init not in ("", z1_config.RANDOM):
        claim_policy(run_dir, {"init": policy_identity(config.init)})
    check_records(run_dir)
    alone = goes_on_alone(config, run_dir)
    clock = StageClock(run_dir / "wall_seconds.json")
    writer = MetricsWriter(
        run_dir,
        tensorboard=config.log.tensorboard,
        wandb_project="z1-jax" if config.log.wandb else None,
        config=dataclasses.asdict(config),
        constant={"assets": note} if (note := label(config)) else None,
    )
    with writer, jax.set_mesh(mesh):
        # No name for the policy here: what RL keeps in bfloat16 must not stay in memory in float32 too.
        if config.algorithm == "sft":
            finish_sft(config, start_policy(config, mesh, run_dir, writer, clock), mesh, run_dir, clock, differing)
        elif alone:
            finish_grpo(config, own_policy(run_dir, mesh), mesh, run_dir, writer, clock, differing, alone=True)
        else:
            finish_grpo(
                config, start_policy(config, mesh, run_dir, writer, clock), mesh, run_dir, writer, clock, differing
            )
    return None


def start_policy(
    config: Config, mesh: jax.sharding.Mesh, run_dir: pathlib.Path, writer: MetricsWriter, clock: StageClock
) -> Policy:
    """The policy that RL starts from: `init`, or SFT on demonstrations; algorithm=sft trains `init` on."""
    if config.init == z1_config.RANDOM:
        return untrained_policy(config, mesh)
    if config.init and config.algorithm == "grpo":
        return given_policy(config, config.init, mesh)
    with clock.stage("demonstrations"):
        dataset = demonstrations(config, run_dir / "demonstrations")
    with clock.stage("sft"):
        return supervised_policy(config, dataset, mesh, run_dir / "checkpoints" / "sft", writer)


def finish_sft(
    config: Config,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    run_dir: pathlib.Path,
    clock: StageClock,
    differing: Sequence[str],
) -> None:
    """Evaluates an SFT policy, where there is something to evaluate it in, and writes the summary."""
    concluded(config, run_dir)
    if not config.eval.episodes:
        line = f"SFT on {config.demos.dataset}: {config.sft.steps} steps, not evaluated (eval.episodes=0)"
        conclude(config, policy, run_dir, clock, {}, line, differing)
        return
    with make_pool(config) as pool, clock.stage("evaluation"):
        after = evaluate(
            policy, pool, mesh, config.eval, config.flow, results_of(run_dir, "after", "sft"), title="evaluation"
        )
    result = {"after": after.summary(config.eval.confidence)}
    line = rate_sentence("SFT", config.task, result["after"], config.eval.confidence)
    conclude(config, policy, run_dir, clock, result, line, differing)


def finish_grpo(
    config: Config,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    run_dir: pathlib.Path,
    writer: MetricsWriter,
    clock: StageClock,
    differing: Sequence[str],
    alone: bool = False,
) -> None:
    """Evaluates, trains by GRPO, evaluates again on the same seeds, films, compares, reports.

    Args:
        alone: `policy` is that of a checkpoint of RL, and what comes before RL is there: see `resuming`.
    """
    if line := held_line(policy.processor.stats):
        print(line, flush=True)
    with make_pool(config) as pool:
        policy = trained_in(policy, World(name="", tasks=(config.task,), rate=pool.spec.control_hz))
        trainer = GrpoTrainer(policy, config, mesh, pool.num_envs)
        policy = policy.without_params()  # the trainer has them

        def measure(name: str, title: str, stage: str | None) -> Evaluation:
            with clock.stage("evaluation"):
                return evaluate(
                    policy,
                    pool,
                    mesh,
                    config.eval,
                    config.flow,
                    results_of(run_dir, name, stage),
                    title=title,
                    actor=trainer.actor,
                    params=trainer.params,
                )

        before = measure("before", "evaluation before RL", None if alone or config.init else "sft")
        if before.success.mean() < HARDLY and not config.init:
            print(
                f"SFT hardly starts on {config.task}: RL has few successes to learn from; more demonstrations, SFT "
                "steps and Muon help (presets long and carry of configs/grpo.py)"
            )
        clips = record_clips(config, policy, pool, trainer, before, run_dir, "before", clock)
        with clock.stage("grpo"):
            policy = train_grpo(trainer, pool, run_dir / "checkpoints" / "grpo", writer, alone=alone)
        after = measure("after", "evaluation after RL", "grpo")
        record_clips(config, policy, pool, trainer, before, run_dir, "after", clock)
    result = compare(before, after, config.eval.confidence)
    result["videos"] = [
        {
            "seed": seed,
            "before": f"videos/before_seed{seed}.webp",
            "after": f"videos/after_seed{seed}.webp",
            "before_success": bool(before.success[before.seeds == seed][0]),
            "after_success": bool(after.success[after.seeds == seed][0]),
        }
        for seed in clips
    ]
    result |= concluded(config, run_dir)
    result["compilations"] = trainer.traces
    line = sentence(config.task, "GRPO", result, config.eval.confidence)
    conclude(config, policy, run_dir, clock, result, line, differing)


def record_clips(
    config: Config,
    policy: Policy,
    pool: Any,
    trainer: GrpoTrainer,
    before: Evaluation,
    run_dir: pathlib.Path,
    name: str,
    clock: StageClock,
) -> list[int]:
    """Films the first held-out seeds, those that failed before RL first; returns them."""
    order = [*before.seeds[~before.success], *before.seeds[before.success]]
    seeds = [int(seed) for seed in order[: config.eval.videos]]
    paths = [run_dir / "videos" / f"{name}_seed{seed}.webp" for seed in seeds]
    if not seeds or all(path.exists() for path in paths):
        return seeds
    with clock.stage("videos"):
        print(f"filming {len(seeds)} episodes", flush=True)
        clips = film(
            policy,
            pool,
            trainer.actor,
            trainer.params,
            seeds,
            config.eval,
            config.env.cameras[0],
            config.eval.video_size,
        )
        for path, clip in zip(paths, clips, strict=True):
            write_video(path, clip, fps=20)
    return seeds


if __name__ == "__main__":
    run_main(main)
