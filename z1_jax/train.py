"""python -m z1_jax.train [--config=configs/grpo.py]: demonstrations → SFT → GRPO → paired evaluation → report.

Every stage finds its own finished work in the run directory, so the same command continues an interrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from z1_jax.agreement import seen_in, trained_in
from z1_jax.config.schema import RANDOM
from z1_jax.data.normalize import held_line
from z1_jax.earlier_evaluation import take_over
from z1_jax.evaluation import Evaluation, compare, evaluate, instructions, rate_sentence, sentence
from z1_jax.extending import known_changes
from z1_jax.initial_policy import given_policy, untrained_policy
from z1_jax.metrics import MetricsWriter
from z1_jax.opening import Run, open_run
from z1_jax.policy import Policy, policy_steps
from z1_jax.process import run_main
from z1_jax.resuming import check_records, concluded, goes_on_alone, own_policy
from z1_jax.rl.loop import GrpoTrainer, train_grpo
from z1_jax.run_dir import clip_paths, conclude, results_of
from z1_jax.stages import demonstrations, make_pool, supervised_policy
from z1_jax.suites import held_out, names_of_tasks, resolve
from z1_jax.videos import clips_of, record_clips

HARDLY = 0.05  # success after SFT, below which RL seldom starts


def main(argv: Sequence[str]) -> int | None:
    """Runs the stages of a config in order; each prints what it does."""
    run = open_run(argv, "train", ("grpo", "sft"), "configs/grpo.py")
    if run is None:
        return None
    check_records(run.directory)
    alone = goes_on_alone(run.config, run.directory)
    with run.writer() as writer, jax.set_mesh(run.mesh):
        # No name for the policy here: what RL keeps in bfloat16 must not stay in memory in float32 too.
        if run.config.algorithm == "sft":
            finish_sft(run, start_policy(run, writer), writer)
        elif alone:
            finish_grpo(run, own_policy(run.directory, run.mesh), writer, alone=True)
        else:
            finish_grpo(run, start_policy(run, writer), writer)
    return None


def start_policy(run: Run, writer: MetricsWriter) -> Policy:
    """The policy that RL starts from: `init`, or SFT on demonstrations; algorithm=sft trains `init` on."""
    config = run.config
    if config.init == RANDOM:
        return untrained_policy(config, run.mesh)
    if config.init and config.algorithm == "grpo":
        return given_policy(config, config.init, run.mesh)
    with run.clock.stage("demonstrations"):
        dataset = demonstrations(config, run.directory / "demonstrations")
    with run.clock.stage("sft"):
        return supervised_policy(config, dataset, run.mesh, run.directory / "checkpoints" / "sft", writer)


def finish_sft(run: Run, policy: Policy, writer: MetricsWriter) -> None:
    """Evaluates an SFT policy, where there is something to evaluate it in, and writes the summary."""
    config = run.config
    concluded(config, run.directory)
    if not config.eval.episodes:
        line = f"SFT on {config.demos.dataset}: {config.sft.steps} steps, not evaluated (eval.episodes=0)"
        told = list(policy.world.get("instructions", ()))
        result: dict[str, Any] = {**({"instructions": told} if told else {}), **_lengths(run)}
        conclude(config, policy, run.directory, run.clock, result, line, run.differing)
        return
    with make_pool(config) as pool, run.clock.stage("evaluation"):
        results = results_of(run.directory, "after", "sft")
        seen = held_out(config)
        how: Any = {"title": "evaluation", "held_out": seen, "overlap": config.rollout.overlap}
        after = evaluate(policy, pool, run.mesh, config.eval, config.flow, results, **how)
        told = instructions(pool, held_out(config, 4))
    result = {"after": after.summary(config.eval.confidence), "instructions": told, **_lengths(run)}
    writer.evaluation("after", config.sft.steps, result["after"])
    line = rate_sentence("SFT", config.task_words, result["after"], config.eval.confidence)
    conclude(config, policy, run.directory, run.clock, result, line, run.differing)


def _lengths(run: Run) -> dict[str, Any]:
    changes = known_changes(run.directory)
    return {"lengths": changes} if changes else {}


def finish_grpo(run: Run, policy: Policy, writer: MetricsWriter, alone: bool = False) -> None:
    """Evaluates, trains by GRPO, evaluates again on the same seeds, films, compares, reports.

    Args:
        alone: `policy` is that of a checkpoint of RL, and what comes before RL is there: see `resuming`.
    """
    config, run_dir, clock = run.config, run.directory, run.clock
    if line := held_line(policy.processor.stats):
        print(line, flush=True)
    episodes = held_out(config)
    with make_pool(config) as pool:
        policy = trained_in(policy, seen_in(config.every_task, pool.spec), names_of_tasks(config))
        trainer = GrpoTrainer(policy, config, run.mesh, pool.num_envs, resolve(config).episode)
        policy = policy.without_params()  # the trainer has them

        def measure(name: str, title: str, stage: str | None, step: int) -> Evaluation:
            with clock.stage("evaluation"):
                outcome = evaluate(
                    policy,
                    pool,
                    run.mesh,
                    config.eval,
                    config.flow,
                    results_of(run_dir, name, stage),
                    title=title,
                    actor=trainer.actor,
                    params=trainer.params,
                    held_out=episodes,
                    overlap=config.rollout.overlap,
                )
            writer.evaluation(name, step, outcome.summary(config.eval.confidence))
            return outcome

        def record(name: str, step: int) -> dict[str, bool]:
            with clock.stage("videos"):
                outcomes = record_clips(config, policy, pool, trainer.actor, trainer.params, run_dir, name)
            for path in clip_paths(config, run_dir, name).values():
                writer.video(path.stem, step, path, outcomes[path.name])
            return outcomes

        if not alone:
            take_over(config, policy, run_dir, episodes)
        before = measure("before", "evaluation before RL", None if alone or config.init else "sft", 0)
        parts = before.by_task() or {config.task: before}
        hardly = [task for task, part in parts.items() if part.success.mean() < HARDLY]
        if hardly and not config.init:
            names = ", ".join(hardly)
            print(
                f"SFT leaves few successes on {names} for RL to learn from: give it more demonstrations and SFT "
                "steps, or Muon (presets long and carry of configs/grpo.py)"
            )
        clips = {"before": ("before", record("before", 0))}
        with clock.stage("grpo"):
            policy = train_grpo(trainer, pool, run_dir / "checkpoints" / "grpo", writer, alone=alone)
        done = policy_steps(run_dir / "checkpoints" / "grpo")[-1]
        after = measure("after", "evaluation after RL", "grpo", done)
        clips["after"] = "after", record("after", done)
        told = instructions(pool, held_out(config, 4))
    result = {**compare(before, after, config.eval.confidence), "instructions": told}
    result |= {**clips_of(config, clips), **concluded(config, run_dir), **_lengths(run)}
    result["compilations"] = trainer.traces
    line = sentence(config.task_words, "GRPO", result, config.eval.confidence)
    conclude(config, policy, run_dir, clock, result, line, run.differing)


if __name__ == "__main__":
    run_main(main)
