"""What a study found: rates and paired tests of each task, means with intervals that hold training noise. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from z1_jax.statistics import (
    clustered_interval,
    holm,
    interquartile_mean,
    mcnemar_exact,
    paired_difference_interval,
    stratified_interval,
    wilson_interval,
)

START = "sft"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Held-out episodes of one task under one policy."""

    form: str  # sft, specialists or joint
    task: str
    seed: int  # of training
    episodes: tuple[int, ...]  # seeds of the episodes
    success: Bool[np.ndarray, " n"]
    simulated_steps: int = 0  # of RL up to this policy; of a joint one over all tasks


@dataclasses.dataclass(frozen=True)
class Row:
    """One task under one form of RL, beside the common start."""

    task: str
    form: str
    before: float  # rates, means over training seeds
    after: float
    interval: tuple[float, float]  # of the difference: over training seeds and episodes
    p_value: float  # exact McNemar over all episodes, corrected by Holm over the form's tasks


@dataclasses.dataclass(frozen=True)
class Mean:
    """One form over all tasks."""

    form: str
    rate: float
    interval: tuple[float, float]  # clustered by task, then training seed
    interquartile: float  # mean of the middle half of all (task, training seed) rates
    interquartile_interval: tuple[float, float] | None  # training seeds drawn within each task; None: there is one
    difference: float = 0.0  # from the start
    difference_interval: tuple[float, float] = (0.0, 0.0)


def rows(outcomes: Sequence[Outcome], confidence: float) -> list[Row]:
    """A row for each form of RL and task. What is not there on both sides is left out."""
    found: list[Row] = []
    for form in _forms(outcomes):
        pairs = {task: _paired(outcomes, form, task) for task in _tasks(outcomes)}
        pairs = {task: paired for task, paired in pairs.items() if len(paired)}
        corrected = holm([mcnemar_exact(*_joined(paired)) for paired in pairs.values()])
        for (task, paired), p_value in zip(pairs.items(), corrected, strict=True):
            before, after = _joined(paired)
            interval = _over_seeds(before, after, [seed for seed, one, _ in paired for _ in one], confidence)
            found.append(Row(task, form, float(before.mean()), float(after.mean()), interval, p_value))
    return found


def means(outcomes: Sequence[Outcome], confidence: float) -> list[Mean]:
    """The start, then each form: only of those that have all tasks with the same training seeds."""
    return [_mean(outcomes, form, confidence) for form in (START, *_forms(outcomes)) if _complete(outcomes, form)]


def _mean(outcomes: Sequence[Outcome], form: str, confidence: float) -> Mean:
    mine = [outcome for outcome in outcomes if outcome.form == form]
    cells = _cells(mine)
    tasks, seeds = cells.shape
    rate = float(cells.mean())
    if rate in (0.0, 1.0):  # every resample is the sample; tasks are what is drawn
        interval = wilson_interval(int(rate) * tasks, tasks, confidence)
    else:
        interval = _clustered([(outcome, outcome.success.astype(float)) for outcome in mine], confidence)
    found = Mean(
        form,
        rate,
        interval,
        interquartile_mean(cells),
        stratified_interval(cells, interquartile_mean, 0, confidence) if seeds > 1 else None,
    )
    if form == START:
        return found
    pairs = [(outcome, start) for outcome in mine if (start := _start_of(outcomes, outcome)) is not None]
    gains = [(outcome, outcome.success.astype(float) - start.success) for outcome, start in pairs]
    difference = float(np.mean([values.mean() for _, values in gains]))
    if np.ptp(np.concatenate([values for _, values in gains])):
        interval = _clustered(gains, confidence)
    else:  # as above: one pair a task
        firsts = {outcome.task: (start.success[0], outcome.success[0]) for outcome, start in pairs}
        before, after = np.array(list(firsts.values())).T
        interval = paired_difference_interval(before, after, 0, confidence)
    return dataclasses.replace(found, difference=difference, difference_interval=interval)


def _clustered(values: Sequence[tuple[Outcome, np.ndarray]], confidence: float) -> tuple[float, float]:
    tasks = [outcome.task for outcome, each in values for _ in each]
    seeds = [outcome.seed for outcome, each in values for _ in each]
    return clustered_interval(np.concatenate([each for _, each in values]), tasks, seeds, 0, confidence)


def _over_seeds(before: np.ndarray, after: np.ndarray, seeds: Sequence[int], confidence: float) -> tuple[float, float]:
    """Training seeds are drawn where there are several; with one, or where all pairs differ alike, episodes."""
    gains = after.astype(float) - before
    if len(set(seeds)) > 1 and np.ptp(gains):
        return clustered_interval(gains, [""] * len(gains), seeds, 0, confidence)
    return paired_difference_interval(before, after, 0, confidence)


def _cells(outcomes: Sequence[Outcome]) -> Float[np.ndarray, "tasks seeds"]:
    rates = {(outcome.task, outcome.seed): float(outcome.success.mean()) for outcome in outcomes}
    tasks, seeds = _tasks(outcomes), sorted({outcome.seed for outcome in outcomes})
    return np.array([[rates[task, seed] for seed in seeds] for task in tasks])


def _complete(outcomes: Sequence[Outcome], form: str) -> bool:
    mine = {(outcome.task, outcome.seed) for outcome in outcomes if outcome.form == form}
    seeds = {seed for _, seed in mine}
    return bool(mine) and mine == {(task, seed) for task in _tasks(outcomes) for seed in seeds}


def _paired(outcomes: Sequence[Outcome], form: str, task: str) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(training seed, successes of the start, of the form) where both are there."""
    found = []
    for outcome in outcomes:
        if outcome.form == form and outcome.task == task and (start := _start_of(outcomes, outcome)) is not None:
            found.append((outcome.seed, start.success, outcome.success))
    return found


def _start_of(outcomes: Sequence[Outcome], outcome: Outcome) -> Outcome | None:
    """The start's episodes that an outcome is paired with.

    Raises:
        ValueError: they are others.
    """
    for other in outcomes:
        if (other.form, other.task, other.seed) == (START, outcome.task, outcome.seed):
            if other.episodes != outcome.episodes:
                raise ValueError(f"{outcome.form} and {START} ran {outcome.task} on different seeds")
            return other
    return None


def _joined(paired: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one for _, one, _ in paired]), np.concatenate([other for _, _, other in paired])


def _forms(outcomes: Sequence[Outcome]) -> list[str]:
    return [form for form in dict.fromkeys(outcome.form for outcome in outcomes) if form != START]


def _tasks(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.task for outcome in outcomes))


def markdown(found: Sequence[Mean], each: Sequence[Row], facts: Mapping[str, Any], confidence: float) -> str:
    """The tables as Markdown: means, then one row a task and form."""
    percent = f"{100 * confidence:g} %"
    over = f"over {facts['tasks']} tasks, {facts['seeds']} training seeds"
    lines = [f"| {over} | mean [{percent}] | difference [{percent}] | IQM [{percent}] |"]
    lines.append("|---|---|---|---|")
    for mean in found:
        gain = "" if mean.form == START else _points(mean.difference, mean.difference_interval)
        iqm = f"{100 * mean.interquartile:.1f}"
        if mean.interquartile_interval:
            iqm = _rate(mean.interquartile, mean.interquartile_interval)
        lines.append(f"| {mean.form} | {_rate(mean.rate, mean.interval)} | {gain} | {iqm} |")
    lines += ["", f"| task | form | {START} | after | difference [{percent}] | p (Holm) |", "|---|---|---|---|---|---|"]
    for row in each:
        gain = _points(row.after - row.before, row.interval)
        lines.append(
            f"| {row.task} | {row.form} | {100 * row.before:.1f} | {100 * row.after:.1f} | {gain} | {row.p_value:.2g} |"
        )
    return "\n".join(lines) + "\n"


def _rate(rate: float, interval: tuple[float, float]) -> str:
    return f"{100 * rate:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _points(difference: float, interval: tuple[float, float]) -> str:
    return f"{100 * difference:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
