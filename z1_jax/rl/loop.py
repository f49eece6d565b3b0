"""The GRPO loop: collect groups → calibrate returns and advantages → update → log → save."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from envs.base import Pool
from z1_jax import processes
from z1_jax.checkpoint import Checkpoints, Keep
from z1_jax.interrupt import GracefulStop
from z1_jax.metrics import ALARMS, METRICS, NUMBERED, MetricsWriter, Progress, read_records
from z1_jax.policy import Policy
from z1_jax.profiling import PROFILE, profiled
from z1_jax.resuming import Counts, counted_grpo, nothing_left, settled
from z1_jax.rl import diagnostics, rollout, selective
from z1_jax.rl.trainer import GrpoTrainer
from z1_jax.train_state import TrainState, restore

_COLUMNS = {"success": ".1%", "groups/kept": ".0f", "ratio/max": ".3f", "clip_fraction": ".3f"}


def train_grpo(
    trainer: GrpoTrainer, pool: Pool, directory: pathlib.Path, writer: MetricsWriter, *, alone: bool = False
) -> Policy:
    """Trains to `train.iterations`, from the newest checkpoint in `directory` where there is one.

    Args:
        alone: the trainer's policy is that of a checkpoint of RL; RL must not begin with it.

    Order of an iteration: stop if asked → collect → update → decide on the scope → log → save. A decision is made and
    saved with the iteration that it follows from, so that a resumed run neither repeats nor misses it.

    Raises:
        KeyboardInterrupt: after an interruption; the last finished iteration is saved.
        UserError: records that the checkpoint stands on are gone; nothing was touched.
        BrokenIteration: a broken ratio or number; the last checkpoint stays, and broken/iteration-N.npz shows it.
    """
    config = trainer.config
    train = config.train
    checkpoints = Checkpoints(directory, Keep(train.keep_last, train.keep_every, best=train.keep_best > 0))
    start, document = _restore(checkpoints, trainer)
    if alone and not start:
        raise nothing_left(writer.run_dir)
    told = processes.on_leader(lambda: dataclasses.asdict(counted_grpo(writer.run_dir, start, document)))
    counts = Counts(**{**told, "recent": tuple(told["recent"])})
    writer.resume("grpo", start)
    unstable = processes.on_leader(lambda: _unstable_so_far(writer.run_dir))

    def save(step: int) -> None:
        saved = trainer.policy()
        checkpoints.save(
            step,
            trainer.state.parts(saved),
            {
                **saved.document(),
                "iteration": step,
                "training": trainer.progress(),
                "counts": {**dataclasses.asdict(counts), "recent": list(counts.recent)},
            },
            success=_rating(trainer, counts),
        )

    last = config.train.iterations
    with GracefulStop() as stop, Progress("grpo", last, "iteration", _COLUMNS, start, alarms=ALARMS) as progress:
        if missed := sorted(number for number in config.log.profiled if number < start):
            progress.say(f"log.profile: of {', '.join(map(str, missed))} no trace is written, they were trained before")
        for iteration in range(start, last):
            if _settled(trainer, counts):
                last = iteration
                every = " on every task" * (len(trainer.tasks.tasks) > 1)
                progress.say(f"training success is at least {train.stop_success:.0%}{every}: stopping early")
                break
            if processes.anyone(stop.requested):
                save(iteration)
                checkpoints.close()
                raise KeyboardInterrupt
            began = time.perf_counter()
            try:
                with profiled(writer.run_dir / PROFILE, iteration, config.log.profiled):
                    trainer.lost_before = counts.lost, counts.groups
                    rollouts = trainer.collect(pool, iteration)
                    collected = time.perf_counter()
                    stats = trainer.update(rollouts, iteration)
            except rollout.BrokenIteration as error:
                path = diagnostics.save_broken(writer.run_dir, iteration, error.evidence)
                checkpoints.close()
                raise type(error)(f"iteration {iteration}: {error} (kept in {path})", error.evidence) from None
            finished = time.perf_counter()
            for group, why in rollouts.lost.items():
                progress.say(f"iteration {iteration}: group {group} of {rollouts.drawn} is dropped: {why}")
            first = rollouts.success[: rollouts.first]  # what is drawn again depends on what came of these
            if not first.size:  # they are all lost
                first = rollouts.success
            success = float(first.mean())
            tasks = [episode.task for episode in rollouts.episodes[: len(first)]]
            by_task = trainer.tasks.observe(tasks, first)
            looked_at = max(train.stop_window, train.keep_best)
            drawn = {"groups": rollouts.drawn, "lost": len(rollouts.lost)}
            counts = counts.plus(rollouts.simulated_steps, rollouts.success.size, success, looked_at, **drawn)
            unstable += stats["unstable"]
            values = {
                "success": success,
                **stats,
                "steps/total": counts.simulated_steps,
                **_decided(trainer.observe(success), progress),
                **by_task,
                **diagnostics.times(rollouts, collected - began, finished - collected),
            }
            writer.write("grpo", iteration, values)
            _write_episodes(writer, rollouts, iteration)
            progress.report(iteration + 1, {**values, "unstable": unstable, "groups lost": counts.lost})
            if (iteration + 1) % config.train.checkpoint_every == 0 or iteration + 1 == last:
                save(iteration + 1)
        save(last)  # within the context: a stop that was asked for late must find it written
    checkpoints.close()
    return trainer.policy()


def _unstable_so_far(run_dir: pathlib.Path) -> int:
    records = read_records(run_dir / METRICS, NUMBERED)
    return sum(record.get("unstable", 0) for record in records if record["stage"] == "grpo")


def _settled(trainer: GrpoTrainer, counts: Counts) -> bool:
    """Whether training success calls for an early stop: on every task, where there are several."""
    train = trainer.config.train
    if len(trainer.tasks.tasks) == 1:
        return settled(counts.recent, train)
    return trainer.tasks.settled(train.stop_window, train.stop_success)


def _rating(trainer: GrpoTrainer, counts: Counts) -> float | None:
    """The mean training success by which the best checkpoint is chosen; None before there were so many iterations.

    Of several tasks, which an iteration's groups need not all be of, it is the mean over tasks.
    """
    window = trainer.config.train.keep_best
    if not window or len(counts.recent) < window:
        return None
    return float(np.mean(counts.recent[-window:])) if len(trainer.tasks.tasks) == 1 else trainer.tasks.rating(window)


def _decided(decision: selective.Decision | None, progress: Progress) -> dict[str, Any]:
    """Says what `train.scope=auto` decided, and returns its metrics."""
    if decision is None:
        return {}
    progress.say(f"train.scope=auto: {decision.reason}")
    return {
        "selective/scope": decision.scope,
        "selective/slope": decision.trend.slope,
        "selective/p_value": decision.trend.p_value,
        "selective/mean_success": decision.mean_success,
        "selective/reason": decision.reason,
    }


def _write_episodes(writer: MetricsWriter, rollouts: rollout.Rollouts, iteration: int) -> None:
    for group, episode in enumerate(rollouts.episodes):
        for member in range(rollouts.success.shape[1]):
            writer.episode(
                "grpo",
                iteration,
                {
                    "group": group,
                    "member": member,
                    **episode.to_json(),
                    "success": bool(rollouts.success[group, member]),
                    "unstable": bool(rollouts.unstable[group, member]),
                    "chunks": int(rollouts.chunks[group, member]),
                    "control_steps": int(rollouts.steps[group, member]),
                },
            )


def _restore(checkpoints: Checkpoints, trainer: GrpoTrainer) -> tuple[int, dict[str, Any]]:
    """Loads the newest intact checkpoint into the trainer; returns its iteration and document, 0 for none."""

    def state(document: dict[str, Any]) -> TrainState:
        if "training" in document:  # the scope decides which arrays there are
            trainer.resume(document["training"])
        return trainer.state

    newest = restore(checkpoints, state)
    if newest is None:
        return 0, {}
    step, trainer.state, document = newest
    return step, document
