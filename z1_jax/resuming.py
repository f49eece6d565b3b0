"""What a continued run needs: the records that its checkpoints depend on, and the policy before RL.

All of it is checked before anything is written. If something is missing the run is refused and nothing changes.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.schema import Config, TrainConfig
from z1_jax.errors import UserError
from z1_jax.metrics import EPISODES, METRICS, NUMBERED, read_records
from z1_jax.policy import Policy, load_policy
from z1_jax.rl.task_groups import TaskGroups
from z1_jax.run_dir import missing_clips


@dataclasses.dataclass(frozen=True)
class Counts:
    """What RL has done up to a checkpoint, whose document keeps it."""

    iterations: int = 0
    simulated_steps: int = 0
    episodes: int = 0  # records of them
    recent: tuple[float, ...] = ()  # training success of the newest iterations: `stop_window` or `keep_best`
    groups: int = 0  # drawn
    lost: int = 0  # of these, dropped because an environment failed again and again

    def plus(
        self, simulated_steps: int, episodes: int, success: float, window: int, groups: int = 0, lost: int = 0
    ) -> Counts:
        """After one more iteration."""
        return Counts(
            self.iterations + 1,
            self.simulated_steps + simulated_steps,
            self.episodes + episodes,
            (*self.recent, success)[-window:],
            self.groups + groups,
            self.lost + lost,
        )


def stages(run_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Where a run keeps the checkpoints of each stage."""
    return {stage: run_dir / "checkpoints" / stage for stage in ("sft", "grpo")}


def check_records(run_dir: pathlib.Path) -> None:
    """Compares the records of a run with its newest checkpoints.

    Raises:
        UserError: records that a checkpoint stands on are gone.
    """
    for stage, directory in reversed(stages(run_dir).items()):  # RL's first: a new run can begin with it
        newest = _newest_document(directory)
        if newest is not None:
            counted_sft(run_dir, *newest) if stage == "sft" else counted_grpo(run_dir, *newest)


def counted_grpo(run_dir: pathlib.Path, step: int, document: Mapping[str, Any]) -> Counts:
    """What RL has done up to checkpoint `step`: by its document, or where that is an old one by the records.

    Raises:
        UserError: the records are not those of this checkpoint.
    """
    records, episodes = (
        [r for r in read_records(run_dir / name, NUMBERED) if r["stage"] == "grpo" and r["step"] < step]
        for name in (METRICS, EPISODES)
    )
    if [record["step"] for record in records] != list(range(step)):
        raise _lost(run_dir, "grpo", step, f"{METRICS} holds {len(records)} of the {step} GRPO iterations")
    by_iteration = collections.Counter(record["step"] for record in episodes)
    steps = int(records[-1].get("steps/total", 0)) if records else 0
    lost = sum(record.get("groups/lost", 0) for record in records)
    groups = len({(record["step"], record.get("group")) for record in episodes}) + lost
    counts = Counts(step, steps, len(episodes), tuple(record["success"] for record in records), groups, lost)
    if "counts" in document:
        known = Counts(**{**document["counts"], "recent": tuple(document["counts"]["recent"])})
        if counts.simulated_steps != known.simulated_steps:
            what = f"{METRICS} tells of {counts.simulated_steps:,} of the {known.simulated_steps:,} simulated steps"
            raise _lost(run_dir, "grpo", step, what)
        if counts.episodes != known.episodes:
            what = f"{EPISODES} holds {counts.episodes:,} of the {known.episodes:,} episodes"
            raise _lost(run_dir, "grpo", step, what)
        return known
    added = sum(int(record.get("steps/simulated", 0)) for record in records)
    if added and added != steps:
        raise _lost(run_dir, "grpo", step, f"{METRICS} tells of {added:,} of the {steps:,} simulated steps")
    if len(by_iteration) != step or len(set(by_iteration.values())) > 1:
        raise _lost(run_dir, "grpo", step, f"{EPISODES} holds not all of the episodes")
    return counts


def concluded(config: Config, run_dir: pathlib.Path) -> dict[str, Any]:
    """What a summary says of the work that was done: by the last checkpoint, and checked against the records.

    Of RL: simulated steps, iterations, and the best checkpoint that is kept (`train.keep_best`).

    Raises:
        UserError: they contradict each other, or the last checkpoint is not the one that was asked for.
    """
    check_records(run_dir)
    stage, wanted = ("sft", config.sft.steps) if config.algorithm == "sft" else ("grpo", config.train.iterations)
    directory = stages(run_dir)[stage]
    step, document = _newest_document(directory) or (0, {})
    counts = counted_grpo(run_dir, step, document) if stage == "grpo" else Counts()
    by_task = _by_task(config, document)
    enough = by_task.settled(config.train.stop_window, config.train.stop_success) if by_task else None
    stopped = settled(counts.recent, config.train) if enough is None else enough
    if step != wanted and not (stage == "grpo" and stopped):
        raise UserError(
            f"the newest checkpoint in {directory} is {step}, expected {wanted}: something else works on this run, or "
            "took one away; the same command goes on from it"
        )
    if stage == "sft":
        return {}
    told: dict[str, Any] = {"training_by_task": by_task.summary()} if by_task else {}
    if counts.lost:
        told["groups_lost"] = counts.lost
    return {"simulated_steps": counts.simulated_steps, "iterations": step, **told, **_best(config, directory)}


def _by_task(config: Config, document: Mapping[str, Any]) -> TaskGroups | None:
    """How training went on each task up to a checkpoint of RL; None in a run of one task."""
    told = document.get("training", {}).get("tasks")
    if not told:
        return None
    known = TaskGroups(config.every_task, config.group.spread, config.group.floor, config.seed, 0)
    known.resume(told)
    return known


def _best(config: Config, directory: pathlib.Path) -> dict[str, Any]:
    if not config.train.keep_best:
        return {}
    checkpoints = Checkpoints(directory)
    found = checkpoints.best()
    checkpoints.close()
    if not found:
        return {}
    several = {"tasks": len(config.every_task)} if len(config.every_task) > 1 else {}
    return {"best_checkpoint": {"step": found[0], "success": found[1], "window": config.train.keep_best, **several}}


def settled(recent: Sequence[float], config: TrainConfig) -> bool:
    """Whether training success calls for an early stop."""
    window = config.stop_window
    return len(recent) >= window and float(np.mean(recent[-window:])) >= config.stop_success


def counted_sft(run_dir: pathlib.Path, step: int, document: Mapping[str, Any], stage: str = "sft") -> int:
    """Records of SFT up to checkpoint `step`.

    Raises:
        UserError: there are fewer or more than when the checkpoint was written.
    """
    records = read_records(run_dir / METRICS, NUMBERED)
    rows = [r["step"] for r in records if r["stage"] == stage and r["step"] <= step]
    wanted = document.get("records", len(rows))
    if len(rows) != wanted or rows != sorted(set(rows)):
        raise _lost(run_dir, stage, step, f"{METRICS} holds {len(rows)} of the {wanted} SFT records")
    return len(rows)


def goes_on_alone(config: Config, run_dir: pathlib.Path) -> bool:
    """Whether RL must continue from its own checkpoint because the policy after SFT is gone.

    Raises:
        UserError: it cannot.
    """
    sft, grpo = (stages(run_dir)[stage] for stage in ("sft", "grpo"))
    if config.algorithm != "grpo" or config.init or _newest_document(grpo) is None:
        return False
    reason = _unreadable(sft, config.sft.steps)
    if not reason:
        return False
    episodes = config.eval.episodes * len(config.every_task)
    needs = {
        f"train.scope={config.train.scope}": config.train.scope in ("auto", "lora"),
        f"update.kl_coef={config.update.kl_coef:g}": config.update.kl_coef > 0,
        "the evaluation before RL, which is not complete,": len(_before(run_dir)) < episodes,
        "the videos before RL": bool(missing_clips(config, run_dir, "before")),
    }
    for what in (what for what, needed in needs.items() if needed):
        raise UserError(
            f"{reason}, and {what} needs it, so that RL cannot continue: restore it, or delete {grpo} too to train SFT "
            "and RL again"
        )
    print(f"warning: {reason}; RL no longer needs it and continues from its own checkpoint", flush=True)
    return True


def own_policy(run_dir: pathlib.Path, mesh: jax.sharding.Mesh) -> Policy:
    """The policy of RL's newest checkpoint that can be read.

    Raises:
        UserError: there is none.
    """
    checkpoints = Checkpoints(stages(run_dir)["grpo"])
    try:
        for step in reversed(checkpoints.steps()):
            try:
                return load_policy(checkpoints, step, mesh)
            except CheckpointError as error:
                print(f"warning: {error}", flush=True)
    finally:
        checkpoints.close()
    raise nothing_left(run_dir)


def nothing_left(run_dir: pathlib.Path) -> UserError:
    """The error where neither RL's own checkpoints nor the policy before RL can be read."""
    sft, grpo = (stages(run_dir)[stage] for stage in ("sft", "grpo"))
    return UserError(
        f"no checkpoint in {grpo} can be read, and the policy before RL in {sft} is gone: bring one of them back; the "
        "same command again trains both anew"
    )


def _before(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    return read_records(run_dir / "evaluation" / "before.jsonl")


def _newest_document(directory: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and document of the newest checkpoint whose document can be read."""
    if not directory.is_dir():
        return None
    checkpoints = Checkpoints(directory)
    try:
        for step in reversed(checkpoints.steps()):
            try:
                return step, checkpoints.document(step)
            except CheckpointError:
                continue
        return None
    finally:
        checkpoints.close()


def _unreadable(directory: pathlib.Path, step: int) -> str:
    """Why a checkpoint cannot be read, in words; empty where it can."""
    if not (directory / str(step)).is_dir():
        return f"checkpoint {directory / str(step)} is gone"
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.document(step)
    except CheckpointError as error:
        return str(error).partition("; ")[0]
    finally:
        checkpoints.close()
    return ""


def _lost(run_dir: pathlib.Path, stage: str, step: int, what: str) -> UserError:
    checkpoint = stages(run_dir)["grpo" if stage == "grpo" else "sft"] / str(step)
    return UserError(
        f"{run_dir}: {what} that checkpoint {checkpoint} stands on: bring the file back, or start a new run with "
        f"--config.init={checkpoint}"
    )
