"""Intervals and paired tests for success rates; every draw from an explicit seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy  # scipy.stats, half a second, is imported where it is used
from jaxtyping import Bool, Shaped

Interval = tuple[float, float]  # lower and upper end


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a success rate (Wilson 1927; Brown, Cai and DasGupta 2001).

    Raises:
      ValueError: unless 0 <= successes <= n, n >= 1 and 0 < confidence < 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"got {successes} successes of {n} episodes: expected 0 <= successes <= episodes, at least one"
        )
    _check_confidence(confidence)
    interval = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low = 0.0 if successes == 0 else max(0.0, float(interval.low))  # exactly, where rounding would leave 1e-17
    high = 1.0 if successes == n else min(1.0, float(interval.high))
    return low, high


def mcnemar_exact(before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]) -> float:
    """Two-sided exact McNemar test: the binomial test at 1/2 on the pairs that differ (McNemar 1947).

    Args:
      before: bool [n], success of the first policy on each seed.
      after: bool [n], success of the second policy on the same seeds.

    Returns:
      The p-value; 1 when no pair differs.

    Raises:
      ValueError: when the two are not one-dimensional, equally long, and boolean (or 0 and 1).
    """
    before, after = _pairs(before, after)
    if not (np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all()):
        raise ValueError("McNemar's test compares successes: expected booleans, or 0 and 1")
    gained, lost = int(np.sum(after > before)), int(np.sum(after < before))
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_difference_interval(
    before: Shaped[np.ndarray, " n"],
    after: Shaped[np.ndarray, " n"],
    seed: int,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap interval of mean(after) - mean(before), resampling whole pairs.

    Where all pairs of successes differ alike (none does, or all are gained, or all are lost), every resample is the
    sample, and the bootstrap would claim to know the difference exactly; it is then the score interval (Tango 1998).

    Args:
      before: bool or float [n], outcome of the first policy on each seed.
      after: bool or float [n], outcome of the second policy on the same seeds.
      seed: of the bootstrap's generator.

    Raises:
      ValueError: as `mcnemar_exact`, but for any finite values.
    """
    before, after = _pairs(before, after)
    _check_bootstrap(confidence, resamples)
    values, counts = np.unique(after - before, return_counts=True)
    if len(values) == 1 and np.isin(np.concatenate([before, after]), (0, 1)).all():
        return _alike(float(values[0]), len(before), confidence)
    # n draws with replacement fall on the distinct differences as a multinomial: the same law, far fewer numbers.
    draws = np.random.default_rng(seed).multinomial(len(before), counts / len(before), size=resamples)
    return _percentiles(draws @ values / len(before), confidence)


def _alike(difference: float, n: int, confidence: float) -> Interval:
    """Tango's score interval where all n pairs of successes differ by the same -1, 0 or 1, in closed form."""
    share = float(scipy.stats.norm.ppf(0.5 + confidence / 2)) ** 2 / n
    if difference == 0:
        return -share / (1 + share), share / (1 + share)
    end = (1 - share) / (1 + share)
    return (end, 1.0) if difference > 0 else (-1.0, -end)


def clustered_interval(
    values: Shaped[np.ndarray, " n"],
    tasks: Sequence[str],
    seeds: Sequence[int],
    seed: int,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Bootstrap interval of the mean over tasks, clustered by task and seed.

    The statistic is the mean over tasks of the mean over seeds of each cell's mean. Tasks are drawn with replacement,
    then seeds within each drawn task; the episodes of a cell (task, seed) stay together. With one task, only its seeds
    are drawn.

    Args:
      values: bool or float [n], one outcome (or paired difference) an episode.
      tasks: [n] task of each episode.
      seeds: [n] seed of each episode: of training, or of the episode itself.
      seed: of the bootstrap's generator.
    """
    cells = _cell_means(values, tasks, seeds)
    _check_bootstrap(confidence, resamples)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(cells), (resamples, len(cells)))
    means = np.zeros(resamples)
    for column in drawn.T:  # each drawn task gets its own draw of seeds
        for task, cell in enumerate(cells):
            rows = np.flatnonzero(column == task)
            means[rows] += cell[rng.integers(0, len(cell), (len(rows), len(cell)))].mean(axis=1)
    return _percentiles(means / len(cells), confidence)


def clustered_mean(values: Shaped[np.ndarray, " n"], tasks: Sequence[str], seeds: Sequence[int]) -> float:
    """The mean over tasks of the mean over seeds of each cell's mean: what `clustered_interval` is about."""
    return float(np.mean([cell.mean() for cell in _cell_means(values, tasks, seeds)]))


def interquartile_mean(rates: Shaped[np.ndarray, "tasks seeds"]) -> float:
    """The mean of the middle half of all cells: a quarter of them is left out at each end (Agarwal et al. 2021)."""
    return float(scipy.stats.trim_mean(np.ravel(rates), 0.25))


def stratified_interval(
    rates: Shaped[np.ndarray, "tasks seeds"],
    statistic: Callable[[Any], float],
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2_000,
) -> Interval:
    """Percentile bootstrap interval of a statistic of [tasks, seeds]: seeds are drawn within each task.

    The tasks are those that there are (Agarwal et al. 2021). With one seed nothing is drawn, and both ends are the
    statistic itself.

    Args:
      seed: of the bootstrap's generator.
    """
    rates = np.asarray(rates, np.float64)
    if rates.ndim != 2 or not rates.size or not np.isfinite(rates).all():
        raise ValueError(f"got rates {rates.shape}: expected finite ones of [tasks, seeds], at least one")
    _check_bootstrap(confidence, resamples)
    rng = np.random.default_rng(seed)
    tasks, seeds = rates.shape
    drawn = rng.integers(0, seeds, (resamples, tasks, seeds))
    return _percentiles(np.array([statistic(rates[np.arange(tasks)[:, None], each]) for each in drawn]), confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979): each is that of rejecting it and all smaller ones."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _cell_means(values: np.ndarray, tasks: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
    outcomes = np.asarray(values, np.float64)
    if outcomes.ndim != 1 or not len(outcomes) == len(tasks) == len(seeds) or not len(outcomes):
        raise ValueError(
            f"got values {outcomes.shape}, {len(tasks)} tasks, {len(seeds)} seeds: expected one of each an episode"
        )
    cells: dict[str, dict[int, list[float]]] = {}
    for value, task, cluster in zip(outcomes, tasks, seeds, strict=True):
        cells.setdefault(str(task), {}).setdefault(int(cluster), []).append(float(value))
    return [np.array([np.mean(episodes) for episodes in by_seed.values()]) for by_seed in cells.values()]


def _pairs(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"got outcomes {first.shape} and {second.shape}: expected two of shape [n], paired by seed, n >= 1"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("outcomes are not finite: expected a number for every seed under both policies")
    return first, second


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence={confidence}: expected a number between 0 and 1, such as 0.95")


def _check_bootstrap(confidence: float, resamples: int) -> None:
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"got resamples={resamples}: expected at least 1, such as 10000")


def _percentiles(statistics: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
