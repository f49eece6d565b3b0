"""Which task each group of an iteration is of, and how training goes on each task. Sees training episodes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

SPREADS = ("uniform", "adaptive")
WINDOW = 10  # iterations of a task whose mean success counts, for its share of groups and for its fall
_STREAM = 0x7A5C  # keeps these draws apart from others of the same seed


def in_turn(tasks: int, seed: int, first: int, count: int) -> np.ndarray:
    """int [count]: tasks of groups first … first + count − 1 of a run, each task once in a round of random order."""
    rounds, places = np.divmod(np.arange(first, first + count), tasks)
    orders = {n: np.random.default_rng([seed, _STREAM, n]).permutation(tasks) for n in set(rounds.tolist())}
    return np.array([orders[n][place] for n, place in zip(rounds.tolist(), places.tolist(), strict=True)], int)


def shares(
    success: Float[np.ndarray, " tasks"], groups: Float[np.ndarray, " tasks"], floor: float
) -> Float[np.ndarray, " tasks"]:
    """Of an iteration's groups the share of each task: in proportion to what is expected of p(1 − p), with a floor.

    Of a task whose success rate is p, p(1 − p) is the variance of an episode's outcome, by which members of a group are
    compared: nothing is learned where all fail or all succeed. p is known from few groups, and the members of a group
    share their episode: a group that succeeds does not show that its task always does. So each group counts as one
    observation, p starts as uniform on [0, 1], and the mean of p(1 − p) over its posterior, a Beta, is taken.

    Args:
        success: mean success of a task's groups, anything where it had none.
        groups: how many groups those are.
        floor: least share of a task, as a part of 1/tasks.
    """
    successes = np.where(groups > 0, success, 0.0) * groups
    weight = (1.0 + successes) * (1.0 + groups - successes) / ((2.0 + groups) * (3.0 + groups))
    return floor / len(weight) + (1.0 - floor) * weight / weight.sum()


def apportioned(share: Float[np.ndarray, " tasks"], count: int, seed: int, iteration: int) -> np.ndarray:
    """int [count]: tasks of an iteration's groups; how many a task gets is its share of them, rounded up or down.

    The rounding is drawn (systematic sampling), so that over iterations each task gets its share exactly.
    """
    rng = np.random.default_rng([seed, _STREAM, iteration, 1])
    order = rng.permutation(len(share))
    edges = np.cumsum(share[order])
    points = (np.arange(count) + rng.random()) / count * edges[-1]
    return np.sort(order[np.minimum(np.searchsorted(edges, points, side="right"), len(share) - 1)])


@dataclasses.dataclass
class TaskRecord:
    """Training success of one task."""

    recent: list[float] = dataclasses.field(default_factory=list)  # of its newest iterations
    sizes: list[int] = dataclasses.field(default_factory=list)  # groups that each of those had
    iterations: int = 0  # that had groups of it
    groups: int = 0
    best: float = 0.0  # highest mean over WINDOW of its iterations
    fall: float = 0.0  # largest fall of that mean from the best before it

    def add(self, success: float, groups: int, window: int) -> None:
        """One more iteration. `window`: how many are remembered."""
        kept = max(window, WINDOW)
        self.recent, self.sizes = [*self.recent, success][-kept:], [*self.sizes, groups][-kept:]
        self.iterations, self.groups = self.iterations + 1, self.groups + groups
        if len(self.recent) >= WINDOW:
            self.best = max(self.best, self.mean)
            self.fall = max(self.fall, self.best - self.mean)

    @property
    def mean(self) -> float:
        """Mean success over its last iterations, at most WINDOW; NaN before the first."""
        return float(np.mean(self.recent[-WINDOW:])) if self.recent else float("nan")

    @property
    def evidence(self) -> tuple[float, float]:
        """Mean success over the groups of its last iterations, at most WINDOW, and how many groups those are."""
        recent, sizes = self.recent[-WINDOW:], self.sizes[-WINDOW:]
        return (float(np.average(recent, weights=sizes)), float(sum(sizes))) if recent else (0.0, 0.0)


class TaskGroups:
    """The tasks of a run: gives each iteration's groups theirs, and keeps each one's record.

    Args:
        tasks: their names; spread, floor: as `group` of the config; window: iterations that a record remembers.
    """

    def __init__(self, tasks: Sequence[str], spread: str, floor: float, seed: int, window: int):
        self.tasks, self._spread, self._floor, self._seed, self._window = tuple(tasks), spread, floor, seed, window
        self.records = {task: TaskRecord() for task in self.tasks}

    def of_groups(self, iteration: int, count: int) -> list[str]:
        """The task of each group of an iteration."""
        if len(self.tasks) == 1:
            return [self.tasks[0]] * count
        if self._spread == "uniform":
            chosen = in_turn(len(self.tasks), self._seed, iteration * count, count)
        else:
            chosen = apportioned(self.shares(), count, self._seed, iteration)
        return [self.tasks[number] for number in chosen]

    def shares(self) -> Float[np.ndarray, " tasks"]:
        """Of the next iteration's groups, the share of each task."""
        if self._spread == "uniform":
            return np.full(len(self.tasks), 1.0 / len(self.tasks))
        success, groups = np.array([record.evidence for record in self.records.values()]).T
        return shares(success, groups, self._floor)

    def observe(self, tasks: Sequence[str], success: Bool[np.ndarray, "groups G"]) -> dict[str, float]:
        """Notes an iteration's outcomes; returns the metrics of a run of several tasks.

        Args:
            tasks: of its groups.
        """
        if len(self.tasks) == 1:
            return {}
        given, metrics = self.shares(), {}
        for task, share in zip(self.tasks, given, strict=True):
            mine = success[[name == task for name in tasks]]
            record = self.records[task]
            if len(mine):
                record.add(float(mine.mean()), len(mine), self._window)
                metrics[f"tasks/{task}/success"] = float(mine.mean())
            metrics[f"tasks/{task}/groups"] = len(mine)
            metrics[f"tasks/{task}/share"] = float(share)
            metrics[f"tasks/{task}/fall"] = record.fall
        if not np.isnan(self.mean_success):
            metrics["tasks/mean_success"] = self.mean_success
        metrics["tasks/largest_fall"] = max(record.fall for record in self.records.values())
        return metrics

    @property
    def mean_success(self) -> float:
        """The mean over tasks of each one's mean success; NaN while nothing is known of one."""
        return float(np.mean([record.mean for record in self.records.values()]))

    def settled(self, window: int, success: float) -> bool:
        """Whether every task's mean success over its last `window` iterations is at least `success`."""
        recent = [record.recent[-window:] for record in self.records.values()]
        return all(len(last) >= window and float(np.mean(last)) >= success for last in recent)

    def rating(self, window: int) -> float | None:
        """The mean over tasks of each one's success over its last `window` iterations; None where one had none."""
        recent = [record.recent[-window:] for record in self.records.values()]
        return float(np.mean([np.mean(last) for last in recent])) if all(recent) else None

    def summary(self) -> dict[str, dict[str, Any]]:
        """By task: groups, mean success over its last iterations, the best such mean, and the largest fall from it.

        The latter two are None where it had fewer than WINDOW iterations.
        """
        return {
            task: {
                "groups": record.groups,
                "success": None if np.isnan(record.mean) else record.mean,
                "best": record.best if record.iterations >= WINDOW else None,
                "fall": record.fall if record.iterations >= WINDOW else None,
            }
            for task, record in self.records.items()
        }

    def progress(self) -> dict[str, Any]:
        """What a checkpoint's document must say, JSON values."""
        return {task: dataclasses.asdict(record) for task, record in self.records.items()}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Takes the records of a checkpoint."""
        self.records = {task: TaskRecord(**progress[task]) for task in self.tasks}
        for record in self.records.values():  # earlier checkpoints do not tell the sizes
            record.sizes = record.sizes or [1] * len(record.recent)
