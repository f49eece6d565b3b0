"""What a study found: rates and paired tests of each task, means with intervals that hold training noise. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize, stats

from z1_jax.statistics import (
    Interval,
    clustered_interval,
    clustered_mean,
    holm,
    interquartile_mean,
    mcnemar_exact,
    paired_difference_interval,
    stratified_interval,
    wilson_interval,
)

START = "sft"
GIVEN = -1  # in place of a training seed: a start that was given, which all training seeds have
WINDOW = 10  # iterations of RL whose mean training success counts
GROUPS = 80  # or as many more as hold so many groups of a task, where it has a share of them: eight an iteration
STEADY_END, STEADY_FALL = 0.05, 0.10  # above which the end's deviation over training seeds, or a fall, is told


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Held-out episodes of one task under one policy."""

    form: str  # sft, specialists or joint
    task: str
    seed: int  # of training, or GIVEN
    episodes: tuple[int, ...]  # seeds of the episodes
    success: Bool[np.ndarray, " n"]
    evaluation: str = ""  # the name of a further evaluation; empty: that of the run itself


@dataclasses.dataclass(frozen=True)
class Row:
    """One task under one form of RL, beside the common start."""

    task: str
    form: str
    before: float  # rates, means over training seeds
    after: float
    interval: Interval  # of the difference: over episodes, widened by the form's deviation over training seeds
    p_value: float  # exact McNemar over all episodes, widened as the interval, corrected by Holm over the form's tasks
    seeds: int = 1  # of training
    deviation: float | None = None  # of the end over training seeds (n − 1); None: there is one
    fall: float | None = (
        None  # largest of training success, over WINDOW iterations, from the first of these; None: short
    )


@dataclasses.dataclass(frozen=True)
class Mean:
    """One form over all tasks."""

    form: str
    rate: float
    interval: Interval  # clustered by task, then training seed
    interquartile: float  # mean of the middle half of the (task, training seed) rates of `matrix`
    interquartile_interval: Interval | None  # training seeds drawn within each task; None: there is one
    matrix: tuple[int, int]  # tasks that have as many training seeds as any, and how many that are
    difference: float = 0.0  # from the start
    difference_interval: Interval = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """The policies of one form in a further evaluation, beside their own on the same tasks and episodes."""

    evaluation: str
    form: str
    task: str  # empty: the mean over tasks
    usual: float  # rates, means over tasks and training seeds
    rate: float
    interval: Interval
    change: float  # of the usual
    change_interval: Interval
    gain: float | None  # over the start in this evaluation; None for the start itself
    gain_interval: Interval | None


Falls = Mapping[tuple[str, str, int], float | None]  # form, task, training seed -> see Row.fall
Values = Sequence[tuple[Outcome, np.ndarray]]  # one number an episode


def largest_fall(success: Sequence[float], groups: Sequence[float] = ()) -> float | None:
    """How far the mean of WINDOW iterations of training success falls below that of the first WINDOW, at most.

    With `groups`, those of the task in each iteration, of as many iterations as hold GROUPS, if that is more: of ten
    scenes the mean would fall by 20 points by chance alone. None where there are fewer.
    """
    window = max(WINDOW, int(np.ceil(GROUPS / np.mean(groups)))) if len(groups) else WINDOW
    if len(success) < window:
        return None
    moving = np.convolve(np.asarray(success, float), np.full(window, 1 / window), mode="valid")
    return float(max(0.0, moving[0] - moving.min()))


def rows(outcomes: Sequence[Outcome], confidence: float, falls: Falls | None = None) -> list[Row]:
    """A row for each form of RL and task. What is not there on both sides is left out."""
    outcomes, found = _own(outcomes), []
    for form in _forms(outcomes):
        pairs = {task: _paired(outcomes, form, task) for task in _tasks(outcomes)}
        pairs = {task: paired for task, paired in pairs.items() if paired}
        gains = [[float(np.mean(b) - np.mean(a)) for _, a, b in paired] for paired in pairs.values()]
        noise, freedom = training_noise(gains), sum(len(one) - 1 for one in gains)
        corrected = holm([_p_of_one_task(paired, noise, freedom) for paired in pairs.values()])
        for (task, paired), p_value in zip(pairs.items(), corrected, strict=True):
            before, after = _joined(paired)
            ends = [float(np.mean(one)) for _, _, one in paired]
            known = [fall for seed, *_ in paired if (fall := (falls or {}).get((form, task, seed))) is not None]
            found.append(
                Row(
                    task,
                    form,
                    float(before.mean()),
                    float(after.mean()),
                    _of_one_task(paired, noise, freedom, confidence),
                    p_value,
                    len(paired),
                    float(np.std(ends, ddof=1)) if len(ends) > 1 else None,
                    max(known, default=None),
                )
            )
    return found


def training_noise(gains: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation of a gain over training seeds, pooled over the tasks that have several; None: none has.

    It holds some noise of the evaluation too, and is therefore rather too large.
    """
    several = [one for one in gains if len(one) > 1]
    squares = sum((len(one) - 1) * float(np.var(one, ddof=1)) for one in several)
    return float(np.sqrt(squares / sum(len(one) - 1 for one in several))) if several else None


def _of_one_task(
    paired: Sequence[tuple[int, np.ndarray, np.ndarray]], noise: float | None, freedom: int, confidence: float
) -> Interval:
    """The interval of a task's difference: that over episodes, widened by training noise.

    Two or three training seeds say too little of their own deviation to be drawn from: an interval of 95 % would hold
    the truth in 50 to 80 % of cases. So the deviation is that of all tasks of the form, which has `freedom` degrees of
    freedom, divided by the root of this task's seeds.
    """
    before, after = _joined(paired)
    low, high = paired_difference_interval(before, after, 0, confidence)
    if noise is None:
        return low, high
    centre = float(after.mean()) - float(before.mean())
    wide = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * noise / np.sqrt(len(paired))
    return (
        max(-1.0, centre - float(np.hypot(centre - low, wide))),
        min(1.0, centre + float(np.hypot(high - centre, wide))),
    )


def _p_of_one_task(paired: Sequence[tuple[int, np.ndarray, np.ndarray]], noise: float | None, freedom: int) -> float:
    """The p-value of a task's difference: McNemar's, which takes training seeds for episodes, with training noise.

    It is the level at which an interval as that of `_of_one_task` would end at 0, its part over episodes such that
    without training noise this is McNemar's p-value.
    """
    before, after = _joined(paired)
    exact, gain = mcnemar_exact(before, after), float(after.mean() - before.mean())
    if not noise or exact == 1.0:
        return exact
    lowest = max(exact, 1e-300)
    episodes, training = abs(gain) / stats.norm.isf(lowest / 2), noise / np.sqrt(len(paired))

    def beyond(log_p: float) -> float:
        half = np.exp(log_p) / 2
        return float(np.hypot(stats.norm.isf(half) * episodes, stats.t.isf(half, freedom) * training)) - abs(gain)

    return float(np.exp(optimize.bisect(beyond, np.log(lowest), 0.0)))


def means(outcomes: Sequence[Outcome], confidence: float) -> list[Mean]:
    """The start, then each form: only of those that have all tasks."""
    outcomes = _own(outcomes)
    return [_mean(outcomes, form, confidence) for form in (START, *_forms(outcomes)) if _complete(outcomes, form)]


def _mean(outcomes: Sequence[Outcome], form: str, confidence: float) -> Mean:
    mine = [outcome for outcome in outcomes if outcome.form == form]
    cells = _matrix(mine)
    values = [(outcome, outcome.success.astype(float)) for outcome in mine]
    interval = stratified_interval(cells, interquartile_mean, 0, confidence) if cells.shape[1] > 1 else None
    rate, middle = _over(values, clustered_mean), interquartile_mean(cells)
    found = Mean(form, rate, _rate_interval(values, confidence), middle, interval, (cells.shape[0], cells.shape[1]))
    gains = _minus_start(outcomes, mine)
    if form == START or not gains:
        return found
    over = _over(gains, clustered_mean), _change_interval(gains, confidence)
    return dataclasses.replace(found, difference=over[0], difference_interval=over[1])


def elsewhere(outcomes: Sequence[Outcome], confidence: float) -> list[Elsewhere]:
    """Of each further evaluation and form the mean over its tasks, then each task."""
    usual = {(one.form, one.task, one.seed): one for one in _own(outcomes)}
    found: list[Elsewhere] = []
    for evaluation in dict.fromkeys(one.evaluation for one in outcomes if one.evaluation):
        there = [one for one in outcomes if one.evaluation == evaluation]
        for form in (START, *_forms(outcomes)):
            mine = [one for one in there if one.form == form and (one.form, one.task, one.seed) in usual]
            tasks = _tasks(mine)
            for task in ["", *tasks] if len(tasks) > 1 else tasks:
                chosen = [one for one in mine if task in ("", one.task)]
                found.append(_elsewhere(task, chosen, there, usual, confidence))
    return found


def _elsewhere(
    task: str,
    chosen: Sequence[Outcome],
    there: Sequence[Outcome],
    usual: Mapping[tuple[str, str, int], Outcome],
    confidence: float,
) -> Elsewhere:
    values = [(one, one.success.astype(float)) for one in chosen]
    own = [(one, _on(usual[one.form, one.task, one.seed], one.episodes)) for one in chosen]
    changes = [(one, value - base) for (one, value), (_, base) in zip(values, own, strict=True)]
    gains = _minus_start(there, chosen) if chosen[0].form != START else []
    return Elsewhere(
        chosen[0].evaluation,
        chosen[0].form,
        task,
        _over(own, clustered_mean),
        _over(values, clustered_mean),
        _rate_interval(values, confidence),
        _over(changes, clustered_mean),
        _change_interval(changes, confidence),
        _over(gains, clustered_mean) if gains else None,
        _change_interval(gains, confidence) if gains else None,
    )


def _on(outcome: Outcome, episodes: Sequence[int]) -> Float[np.ndarray, " n"]:
    """The successes of these episodes; where they are others, the rate of those that there are."""
    known = dict(zip(outcome.episodes, outcome.success.tolist(), strict=True))
    rate = float(outcome.success.mean())
    return np.array([float(known.get(seed, rate)) for seed in episodes])


def _minus_start(outcomes: Sequence[Outcome], mine: Sequence[Outcome]) -> list[tuple[Outcome, np.ndarray]]:
    pairs = [(outcome, start) for outcome in mine if (start := _start_of(outcomes, outcome)) is not None]
    return [(outcome, outcome.success.astype(float) - start.success) for outcome, start in pairs]


def _over(values: Values, what: Callable[..., Any], **options: Any) -> Any:
    """A statistic of all episodes by task and training seed."""
    tasks = [outcome.task for outcome, each in values for _ in each]
    seeds = [outcome.seed for outcome, each in values for _ in each]
    return what(np.concatenate([each for _, each in values]), tasks, seeds, **options)


def _rate_interval(values: Values, confidence: float) -> Interval:
    """Clustered by task, then training seed. Where all episodes ended alike, that of the tasks: they are drawn.

    Where all tasks and training seeds have one rate, every draw is alike, and episodes are counted instead.
    """
    rate, tasks = _over(values, clustered_mean), len(_tasks([outcome for outcome, _ in values]))
    if rate in (0.0, 1.0):  # every resample is the sample
        return wilson_interval(int(rate) * tasks, tasks, confidence)
    if tasks == 1 and len(values) == 1:
        return wilson_interval(int(values[0][1].sum()), len(values[0][1]), confidence)
    if not np.ptp([each.mean() for _, each in values]):
        each = np.concatenate([each for _, each in values])
        return wilson_interval(int(each.sum()), len(each), confidence)
    return _over(values, clustered_interval, seed=0, confidence=confidence)


def _change_interval(values: Values, confidence: float) -> Interval:
    """The same of differences; where all episodes are alike, that of one pair a task."""
    each, tasks = np.concatenate([one for _, one in values]), len(_tasks([outcome for outcome, _ in values]))
    alike = not np.ptp(each)
    if len(values) == 1 and not (alike and each[0] not in (-1, 0, 1)):
        return paired_difference_interval(np.maximum(-each, 0), np.maximum(each, 0), 0, confidence)
    if np.ptp([one.mean() for _, one in values]):
        return _over(values, clustered_interval, seed=0, confidence=confidence)
    if not alike or each[0] not in (-1, 0, 1):
        # A normal interval, no narrower than Wilson's of as many episodes that all end alike.
        z, count, centre = float(stats.norm.ppf(0.5 + confidence / 2)), len(each), float(each.mean())
        wide = max(z * float(each.std()) / np.sqrt(count), z**2 / (count + z**2))
        return max(-1.0, centre - wide), min(1.0, centre + wide)
    first = each[:1].repeat(tasks)
    return paired_difference_interval(np.maximum(-first, 0), np.maximum(first, 0), 0, confidence)


def _matrix(outcomes: Sequence[Outcome]) -> Float[np.ndarray, "tasks seeds"]:
    """Rates of the tasks that have as many training seeds as any."""
    rates: dict[str, dict[int, float]] = {}
    for one in outcomes:
        rates.setdefault(one.task, {})[one.seed] = float(one.success.mean())
    seeds = max((sorted(by_seed) for by_seed in rates.values()), key=len)
    return np.array([[by_seed[seed] for seed in seeds] for by_seed in rates.values() if sorted(by_seed) == seeds])


def _complete(outcomes: Sequence[Outcome], form: str) -> bool:
    mine = {one.task for one in outcomes if one.form == form}
    return bool(mine) and mine == set(_tasks(outcomes))


def _paired(outcomes: Sequence[Outcome], form: str, task: str) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(training seed, successes of the start, of the form) where both are there."""
    found = []
    for outcome in outcomes:
        if outcome.form == form and outcome.task == task and (start := _start_of(outcomes, outcome)) is not None:
            found.append((outcome.seed, start.success, outcome.success))
    return found


def _start_of(outcomes: Sequence[Outcome], outcome: Outcome) -> Outcome | None:
    """The start's episodes that an outcome is paired with: of its own training seed, or of a given start.

    Raises:
        ValueError: they are others.
    """
    for other in outcomes:
        if (other.form, other.task) == (START, outcome.task) and other.seed in (outcome.seed, GIVEN):
            if other.episodes != outcome.episodes:
                raise ValueError(f"{outcome.form} and {START} ran {outcome.task} on different seeds")
            return other
    return None


def _joined(paired: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one for _, one, _ in paired]), np.concatenate([other for _, _, other in paired])


def _own(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if not one.evaluation]


def _forms(outcomes: Sequence[Outcome]) -> list[str]:
    return [form for form in dict.fromkeys(outcome.form for outcome in outcomes) if form != START]


def _tasks(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.task for outcome in outcomes))
