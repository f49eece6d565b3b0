"""Paired evaluation under a fixed protocol (method: section 7).

ODE sampler, fixed noise, held-out seeds; intervals and exact tests.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs.base import Episode, Pool, SlotsLost, episodes
from z1_jax import processes
from z1_jax.config.schema import EvalConfig, FlowConfig
from z1_jax.errors import UserError
from z1_jax.files import writing
from z1_jax.metrics import ALARMS, Progress, drop_half_line, read_records
from z1_jax.policy import Policy
from z1_jax.rl import rollout
from z1_jax.rl.actor import Actor, make_actor
from z1_jax.rl.lost import check_lost
from z1_jax.statistics import clustered_interval, mcnemar_exact, paired_difference_interval, wilson_interval


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcome of each held-out episode: task by task the same seeds."""

    seeds: np.ndarray  # int [n]
    success: np.ndarray  # bool [n]
    steps: np.ndarray  # int [n], control steps until success or the end
    unstable: np.ndarray  # bool [n], the simulation broke down: a failure
    tasks: tuple[str, ...] = ()  # [n], or empty where it is of one task
    lost: np.ndarray | None = None  # bool [n], its environment failed again and again at one state: a failure

    def by_task(self) -> dict[str, Evaluation]:
        """The part of each task; empty where it is of one."""
        names = np.array(self.tasks)
        several = list(dict.fromkeys(self.tasks)) if len(set(self.tasks)) > 1 else []
        return {task: self._part(names == task) for task in several}

    def _part(self, chosen: np.ndarray) -> Evaluation:
        lost = None if self.lost is None else self.lost[chosen]
        return Evaluation(
            self.seeds[chosen], self.success[chosen], self.steps[chosen], self.unstable[chosen], lost=lost
        )

    def summary(self, confidence: float) -> dict[str, Any]:
        """Successes, episodes, rate and its Wilson interval; how many failed because the simulation broke down.

        And how many because the environment failed, if any did (`lost`).

        Of several tasks, with as many episodes each, the rate is the mean over them, and the interval that of all
        episodes, which is no narrower than one that knows each task's rate. `tasks` holds each one's own.
        """
        parts = {task: part.summary(confidence) for task, part in self.by_task().items()}
        successes, episodes = int(self.success.sum()), len(self.success)
        return {
            "successes": successes,
            "episodes": episodes,
            "rate": successes / episodes,
            "interval": list(wilson_interval(successes, episodes, confidence)),
            "control_steps": int(self.steps.sum()),
            "unstable": int(self.unstable.sum()),
            **({} if self.lost is None or not self.lost.any() else {"lost": int(self.lost.sum())}),
            **({"tasks": parts} if parts else {}),
        }


def evaluate(
    policy: Policy,
    pool: Pool,
    mesh: jax.sharding.Mesh,
    config: EvalConfig,
    flow: FlowConfig,
    results: pathlib.Path,
    *,
    title: str,
    actor: Actor | None = None,
    params: tuple[Any, Any] | None = None,
    held_out: Sequence[Episode] | None = None,
    overlap: bool = False,
) -> Evaluation:
    """Runs every held-out episode once. Finished waves are kept in `results` (JSONL); a second call goes on after them.

    An episode whose environment fails again and again at one state is a failure, and told as such: left out, it would
    make the rate that of other episodes.

    Args:
        actor, params: to act with functions that are compiled already, and parameters split as they want them.
        held_out: the episodes, as the suite has them; default: those of the held-out seeds alone.
        overlap: see `rollout.collect`.

    Raises:
        TooManyLost: the environments of more than 1 % of the episodes, and of more than two, failed.
    """
    if held_out is None:
        held_out = episodes(range(config.first_seed, config.first_seed + config.episodes))
    done = processes.on_leader(lambda: _read_results(results, held_out))
    if len(done) < len(held_out):
        if actor is None or params is None:
            graphdef, trainable, frozen = policy.split("expert")
            params = (trainable, frozen)
            actor = make_actor(policy, graphdef, flow, mesh, rollout.largest_batch(pool.num_envs, 1, overlap))
        if processes.leads():
            results.parent.mkdir(parents=True, exist_ok=True)
        columns = {"success": ".1%"}
        with Progress(
            title, len(held_out), "episode", columns, start=len(done), interval_s=5.0, alarms=ALARMS
        ) as progress:
            at_once = pool.num_envs * processes.count()
            # A wave of which some rows are missing is played again as it was: in a wave of another size, the batch's
            # rounding would differ, and with it now and then an outcome.
            for start in range(len(done) // at_once * at_once, len(held_out), at_once):
                wave = held_out[start : start + at_once]
                mine = wave[processes.index() * pool.num_envs :][: pool.num_envs]
                lost = sum(row.get("lost", False) for row in done[:start])
                how = {"overlap": overlap, "before": (lost, start + len(wave) - len(mine))}
                rows, broken = _play(policy, pool, actor, params, config, mine, how) if mine else ([], [])
                if processes.count() > 1:
                    actor.finish(params)
                broken = [why for part in processes.exchange(broken) for why in part]
                for why in broken:
                    progress.say(f"an episode counts as a failure: {why}")
                if broken:  # each process has counted its own
                    check_lost(lost + len(broken), start + len(wave), "episodes", broken[-1])
                rows = [row for part in processes.exchange(rows) for row in part][len(done) - start :]
                if processes.leads():
                    with writing(results), results.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in rows)
                done.extend(rows)
                success = float(np.mean([row["success"] for row in done]))
                unstable = sum(row.get("unstable", False) for row in done)
                lost = sum(row.get("lost", False) for row in done)
                progress.report(len(done), {"success": success, "unstable": unstable, "episodes lost": lost})
    outcome = Evaluation(
        seeds=np.array([episode.seed for episode in held_out]),
        success=np.array([row["success"] for row in done]),
        steps=np.array([row["steps"] for row in done]),
        unstable=np.array([row.get("unstable", False) for row in done]),  # absent: of a version that did not look
        tasks=tuple(episode.task for episode in held_out),
        lost=np.array([row.get("lost", False) for row in done]),
    )
    for task, part in outcome.by_task().items():
        print(f"  {task}: {part.success.mean():.1%} of {len(part.seeds)} episodes", flush=True)
    return outcome


def _play(
    policy: Policy,
    pool: Pool,
    actor: Actor,
    params: tuple[Any, Any],
    config: EvalConfig,
    wave: Sequence[Episode],
    how: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """What came of as many episodes as the pool holds, and why environments failed at one."""
    out = rollout.play(
        pool, actor, params, policy.processor, wave, (config.noise_seed,), executed=policy.executed, **how
    )
    note = {"assets": pool.spec.label} if pool.spec.label else {}
    outcomes = zip(wave, out.success[:, 0], out.steps[:, 0], out.unstable[:, 0], strict=True)
    rows = [
        {**episode.to_json(), "success": bool(success), "steps": int(steps), "unstable": bool(broken), **note}
        for episode, success, steps, broken in outcomes
    ]
    for number in out.lost:
        rows[number]["lost"] = True
    return rows, list(out.lost.values())


def instructions(pool: Pool, held_out: Sequence[Episode]) -> list[str]:
    """What the robot is told in held-out episodes, each text once. Starts them in the pool."""
    told: list[str] = []
    for start in range(0, len(held_out), pool.num_envs):
        wave = held_out[start : start + pool.num_envs]
        try:
            looks: Sequence[Any] = pool.reset(range(len(wave)), wave)
        except SlotsLost as error:  # such an episode has counted as a failure
            looks = error.answers
        told += [look.instruction for look in looks if look is not None]
    return list(dict.fromkeys(told))


def _read_results(path: pathlib.Path, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    rows = read_records(path)[: len(episodes)]
    for number, (row, episode) in enumerate(zip(rows, episodes, strict=False), 1):
        check_row(path, number, row)
        if any(row.get(key, value) != value for key, value in episode.to_json().items()):  # older rows hold seeds alone
            raise UserError(f"{path} holds other episodes than this evaluation's; move it away to evaluate anew")
    drop_half_line(path)  # what comes next is appended
    return rows


def check_row(path: pathlib.Path, number: int, row: dict[str, Any]) -> None:
    """Refuses a row that is no result of an episode. Args: `number`: of the line in its file, from 1."""
    if not {"seed", "success", "steps"} <= row.keys():
        raise UserError(f"{path}:{number} is no result of an episode: the file is damaged; mend or delete that line")
    told = [row["success"], row["steps"], row.get("unstable", False), row.get("lost", False)]
    least = 0 if row.get("lost") is True else 1
    if list(map(type, told)) != [bool, int, bool, bool] or not least <= row["steps"] < 2**31:
        raise UserError(
            f"{path}:{number} has success={row['success']!r:.80}, steps={row['steps']!r:.80} and "
            f"unstable={row.get('unstable', False)!r:.80}, expected true or false, 1 or more, and true or false: "
            "the file was edited; mend or delete that line"
        )


def compare(before: Evaluation, after: Evaluation, confidence: float) -> dict[str, Any]:
    """The paired comparison of two policies on the same seeds.

    Raises:
        ValueError: the seeds differ.
    """
    if not np.array_equal(before.seeds, after.seeds) or before.tasks != after.tasks:
        raise ValueError("the two evaluations ran on different episodes; a paired test needs the same ones")
    theirs = after.by_task()
    parts = {task: compare(part, theirs[task], confidence) for task, part in before.by_task().items()}
    gains = after.success.astype(float) - before.success
    interval = paired_difference_interval(before.success, after.success, seed=0, confidence=confidence)
    return {
        "before": before.summary(confidence),
        "after": after.summary(confidence),
        "difference": float(after.success.mean() - before.success.mean()),
        "difference_interval": list(interval),
        "mcnemar_p": float(mcnemar_exact(before.success, after.success)),
        "gained": int((after.success & ~before.success).sum()),
        "lost": int((before.success & ~after.success).sum()),
        **(
            {
                "tasks": parts,
                # As if the tasks were drawn from many like them.
                "difference_interval_over_tasks": list(
                    clustered_interval(gains, after.tasks, after.seeds.tolist(), 0, confidence)
                    if np.ptp(gains)
                    else _alike(before, after, confidence)
                ),
            }
            if parts
            else {}
        ),
    }


def _alike(before: Evaluation, after: Evaluation, confidence: float) -> tuple[float, float]:
    """The interval over tasks where all pairs differ alike: that of one pair a task, for tasks are what is drawn."""
    first = [after.tasks.index(task) for task in dict.fromkeys(after.tasks)]
    return paired_difference_interval(before.success[first], after.success[first], 0, confidence)


def task_lines(result: dict[str, Any], confidence: float) -> list[str]:
    """A line for each task of a comparison, or of the rates of one policy; none where there is one task."""
    if "difference" in result:
        return [
            f"{task}: {_percent(part['before'])} → {_percent(part['after'])} ({_paired(part, confidence)})"
            for task, part in result.get("tasks", {}).items()
        ]
    rates = result.get("after", {}).get("tasks", {})
    return [f"{task}: {_rate(part, confidence)}" for task, part in rates.items()]


def sentence(task: str, method: str, result: dict[str, Any], confidence: float) -> str:
    """A method's gain in one sentence: after minus before."""
    gain = result["difference"]
    verb = "raised" if gain > 0 else "lowered" if gain < 0 else "left"
    return (
        f"{method} {verb} success on {task} from {_percent(result['before'])} to {_percent(result['after'])} "
        f"(after minus before: {_paired(result, confidence)}){_broken(result['before'], result['after'])}"
    )


def versus_sentence(name: str, base: str, task: str, result: dict[str, Any], confidence: float) -> str:
    """Two policies in one sentence: B (`name`, the result's `after`) minus A (`base`, its `before`)."""
    return (
        f"On {task} A ({base}) succeeds in {_percent(result['before'])}, B ({name}) in {_percent(result['after'])}: "
        f"B minus A is {_paired(result, confidence)}{_broken(result['before'], result['after'])}"
    )


def rate_sentence(name: str, task: str, summary: dict[str, Any], confidence: float) -> str:
    """One policy in one sentence, with its Wilson interval."""
    return f"{name} succeeds on {task} in {_rate(summary, confidence)}"


def _rate(summary: dict[str, Any], confidence: float) -> str:
    low, high = (100 * x for x in summary["interval"])
    return (
        f"{_percent(summary)} ({100 * confidence:g} % CI {low:.1f} to {high:.1f}, {_seeds(summary)}){_broken(summary)}"
    )


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary.get("tasks", ())) or 1
    return f"{summary['episodes'] // count} held-out seeds{' of each' * (count > 1)}"


def _broken(*summaries: dict[str, Any]) -> str:
    """What must be said where the simulation broke down, which counts as failure."""
    said = ""
    for key, what in (("unstable", "unstable physics"), ("lost", "environments that broke down")):
        counts = [summary.get(key, 0) for summary in summaries]
        said += f"; failures by {what}: {' and '.join(map(str, counts))}" if any(counts) else ""
    return said


def _percent(summary: dict[str, Any]) -> str:
    return f"{100 * summary['rate']:.1f} %"


def _paired(result: dict[str, Any], confidence: float) -> str:
    low, high = (100 * x for x in result["difference_interval"])
    p = result["mcnemar_p"]
    shown = f"p = {p:.2g}" if p >= 1e-300 else "p < 1e-300"
    return (
        f"{100 * result['difference']:+.1f} points, {100 * confidence:g} % CI {low:+.1f} to {high:+.1f}, "
        f"exact McNemar {shown}, {_seeds(result['before'])}"
    )
