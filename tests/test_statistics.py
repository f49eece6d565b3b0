"""Intervals and tests against closed formulas, SciPy and brute force."""

import itertools
import json
import math
import pathlib
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from z1_jax import statistics

# What rliable and statsmodels say of random numbers: see tests/helpers/rliable_reference.py.
REFERENCE = json.loads((pathlib.Path(__file__).parent / "reference" / "rliable.json").read_text())


def test_wilson_is_the_closed_formula(rng):
    for _ in range(200):
        n = int(rng.integers(1, 600))
        successes = int(rng.choice([0, n, rng.integers(0, n + 1)]))
        confidence = float(rng.uniform(0.5, 0.999))
        z, rate = NormalDist().inv_cdf(0.5 + confidence / 2), successes / n
        centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
        got = statistics.wilson_interval(successes, n, confidence)
        np.testing.assert_allclose(got, (centre - half, centre + half), atol=1e-12)
        assert 0.0 <= got[0] <= successes / n <= got[1] <= 1.0


def test_wilson_of_88_in_256():
    low, high = statistics.wilson_interval(88, 256)
    assert (round(low, 3), round(high, 3)) == (0.288, 0.404)


def test_mcnemar_counts_tosses_of_a_coin_on_differing_pairs(rng):
    for _ in range(200):
        n = int(rng.integers(1, 400))
        before, after = rng.random(n) < rng.random(), rng.random(n) < rng.random()
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))  # integers: nothing is rounded
        expected = min(1.0, 2 * tail / 2 ** (gained + lost))
        assert statistics.mcnemar_exact(before, after) == pytest.approx(expected, rel=1e-9)
        assert statistics.mcnemar_exact(before, after) == statistics.mcnemar_exact(after, before)


def test_mcnemar_survives_many_pairs():
    before, after = np.zeros(5000, bool), np.ones(5000, bool)
    assert statistics.mcnemar_exact(before, after) == 0.0 or statistics.mcnemar_exact(before, after) < 1e-300


def test_paired_interval_equals_the_enumerated_bootstrap():
    before, after = np.array([0, 0, 1, 1, 0]), np.array([1, 1, 1, 0, 0])
    draws = itertools.product(range(5), repeat=5)  # all 5^5 equally likely resamples
    exact = np.sort([np.mean(after[list(draw)] - before[list(draw)]) for draw in draws])
    for confidence in (0.5, 0.8, 0.95):
        low, high = statistics.paired_difference_interval(
            before, after, seed=1, confidence=confidence, resamples=100_000
        )
        tail = (1 - confidence) / 2
        assert abs(np.mean(exact < low) - tail) <= np.mean(np.isclose(exact, low)) + 0.01
        assert abs(np.mean(exact > high) - tail) <= np.mean(np.isclose(exact, high)) + 0.01


def test_paired_interval_is_scipys_for_real_numbers(rng):
    before = rng.normal(size=80)
    after = before + rng.normal(0.3, 0.5, 80)
    got = statistics.paired_difference_interval(before, after, seed=int(rng.integers(2**31)), resamples=20_000)
    expected = stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=20_000, rng=rng, vectorized=True
    ).confidence_interval
    np.testing.assert_allclose(got, (expected.low, expected.high), atol=0.01)


def test_paired_interval_uses_the_pairing(rng):
    before = rng.random(300) < 0.5
    same = statistics.paired_difference_interval(before, before, seed=3)
    assert -0.02 < same[0] < 0 < same[1] < 0.02
    shuffled = statistics.paired_difference_interval(before, rng.permutation(before), seed=3)
    assert shuffled[0] < 0 < shuffled[1]


def score_statistic(n: int, gained: int, lost: int, difference: float) -> float:
    """Tango's: the distance of n pairs from a difference, in standard deviations that the likelihood allows there."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]  # of pairs that are lost
    with np.errstate(divide="ignore", invalid="ignore"):
        loglik = (
            lost * np.log(shares)
            + gained * np.log(shares + difference)
            + (n - lost - gained) * np.log1p(-2 * shares - difference)
        )
    share = shares[np.nanargmax(loglik)]
    return (gained - lost - n * difference) / np.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (16, 0), (0, 16)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_pairs_that_all_differ_alike_leave_a_doubt(gained, lost, confidence):
    """The interval's ends are where the score statistic, maximised on a grid, is the normal quantile."""
    before, after = np.zeros(16), np.full(16, float(gained + lost > 0))
    before, after = (after, before) if lost else (before, after)
    low, high = statistics.paired_difference_interval(before, after, seed=0, confidence=confidence)
    z = stats.norm.ppf(0.5 + confidence / 2)
    assert low <= (gained - lost) / 16 <= high and high - low > 0.09
    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 1:
            assert score_statistic(16, gained, lost, end) == pytest.approx(sign * z, rel=1e-3)
    real = statistics.paired_difference_interval(before / 3, after / 3 + 0.1, seed=0)  # no successes: as it was
    assert real[0] == real[1]


def test_bootstraps_repeat_with_their_seed(rng):
    before, after = rng.random(50), rng.random(50)  # real numbers: those of a few successes often coincide
    tasks, seeds = rng.choice(["a", "b", "c"], 50), rng.integers(0, 5, 50)
    for function, args in [
        (statistics.paired_difference_interval, (before, after)),
        (statistics.clustered_interval, (rng.random(50), tasks, seeds)),
    ]:
        assert function(*args, seed=7) == function(*args, seed=7)
        assert function(*args, seed=7) != function(*args, seed=8)


def test_clustered_interval_covers_as_the_variance_components_say(rng):
    tasks, cells, episodes = 12, 6, 20
    values = (
        rng.normal(0, 0.3, (tasks, 1, 1))
        + rng.normal(0, 0.2, (tasks, cells, 1))
        + rng.normal(0, 0.1, (tasks, cells, episodes))
    )
    labels = np.broadcast_to(np.arange(tasks)[:, None, None], values.shape).ravel().astype(str)
    clusters = np.broadcast_to(np.arange(cells)[None, :, None], values.shape).ravel()
    order = rng.permutation(values.size)  # the order of the episodes is immaterial
    got = statistics.clustered_interval(
        values.ravel()[order], labels[order], clusters[order], seed=int(rng.integers(2**31)), confidence=0.9
    )
    # Bootstrap variance by hand: between tasks (1/T^2 sum of squares) plus the mean of the variances within, over T.
    cell_means = values.mean(axis=2)
    variance = cell_means.mean(axis=1).var() / tasks + cell_means.var(axis=1).mean() / cells / tasks
    half = stats.norm.ppf(0.95) * np.sqrt(variance)
    np.testing.assert_allclose(got, (values.mean() - half, values.mean() + half), atol=0.2 * half)


def test_tasks_weigh_equally_however_many_episodes_they_have():
    values, tasks = np.r_[np.ones(1), np.zeros(9)], ["a"] + ["b"] * 9
    assert statistics.clustered_mean(values, tasks, range(10)) == 0.5


def test_one_task_is_a_bootstrap_over_its_seeds(rng):
    values = rng.random(60)
    got = statistics.clustered_interval(values, ["only"] * 60, range(60), seed=5, resamples=20_000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=rng).confidence_interval
    np.testing.assert_allclose(got, (expected.low, expected.high), atol=0.01)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: statistics.wilson_interval(3, 2), "3 successes of 2"),
        (lambda: statistics.wilson_interval(0, 0), "at least one"),
        (lambda: statistics.wilson_interval(1, 2, 95), "confidence=95"),
        (lambda: statistics.mcnemar_exact([True], [True, False]), "paired by seed"),
        (lambda: statistics.mcnemar_exact([0.5], [1]), "booleans"),
        (lambda: statistics.paired_difference_interval([np.nan], [1], seed=0), "not finite"),
        (lambda: statistics.clustered_interval([1.0], ["a"], [1, 2], seed=0), "one of each"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_interquartile_means_by_hand_and_as_rliable_defines_them(rng):
    """rliable: scipy's trimmed mean of all runs and tasks at once, a quarter off at each end."""
    assert statistics.interquartile_mean(np.array([[0.0, 1.0], [2.0, 100.0]])) == 1.5
    rates = rng.random((7, 5))
    flat = np.sort(rates.ravel())
    cut = int(0.25 * len(flat))
    assert statistics.interquartile_mean(rates) == pytest.approx(flat[cut : len(flat) - cut].mean())


def test_the_stratified_bootstrap_draws_seeds_within_each_task(rng):
    """Tasks that differ and seeds that agree leave nothing to draw; the mean's spread is that of the formula."""
    steady = np.repeat(rng.random((6, 1)), 4, axis=1)
    low, high = statistics.stratified_interval(steady, np.mean, 0)
    assert low == pytest.approx(steady.mean()) and high == pytest.approx(steady.mean())
    rates = rng.normal(size=(20, 8))
    low, high = statistics.stratified_interval(rates, np.mean, 1)
    error = np.sqrt((rates.var(axis=1) / 8).sum()) / 20
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.1)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.9: times 4, 3, 2, 1 is 0.04, 0.06, 0.06 (no less than the one before), 0.9.
    assert statistics.holm([0.03, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []


@pytest.mark.parametrize("case", REFERENCE["scores"], ids=lambda case: str(np.shape(case["successes"])))
def test_aggregates_and_stratified_intervals_are_rliables(case):
    """rliable's matrices are [runs, tasks], and it draws runs within each task, as here."""
    rates = np.array(case["successes"]).T / case["episodes"]  # [tasks, training seeds]
    for name, statistic in (("iqm", statistics.interquartile_mean), ("mean", np.mean)):
        point, low, high = case[name]
        assert statistic(rates) == pytest.approx(point, abs=1e-12)
        got = statistics.stratified_interval(rates, statistic, 0, 0.95, resamples=8_000)
        np.testing.assert_allclose(got, (low, high), atol=0.06 * (high - low))


def test_corrections_tests_and_rates_are_statsmodels():
    for case in REFERENCE["holm"]:
        assert statistics.holm(case["p"]) == pytest.approx(case["holm"], abs=1e-12)
    for case in REFERENCE["mcnemar"]:
        before = np.repeat([False, True], [case["gained"], case["lost"]])
        assert statistics.mcnemar_exact(before, ~before) == pytest.approx(case["p"], rel=1e-9)
    for case in REFERENCE["rates"]:
        assert statistics.wilson_interval(case["successes"], 256) == pytest.approx(case["wilson"], abs=1e-9)


def test_holm_is_the_step_down_procedure(rng):
    """A second way: reject from the smallest on, as long as each is at most alpha over how many are left."""
    values = rng.beta(0.5, 2.0, 20)
    corrected = statistics.holm(values)
    for alpha in rng.random(50):
        rejected = set()
        for rank, index in enumerate(np.argsort(values)):
            if values[index] > alpha / (len(values) - rank):
                break
            rejected.add(int(index))
        assert rejected == {index for index, p in enumerate(corrected) if p <= alpha}


def test_stratified_intervals_are_the_enumerated_bootstrap():
    """Two tasks of two seeds: all sixteen draws, of which the interval's ends are quantiles."""
    rates = np.array([[0.0, 1.0], [0.2, 0.6]])
    means = [(np.mean(one) + np.mean(other)) / 2 for one, other in itertools.product(
        itertools.product(rates[0], repeat=2), itertools.product(rates[1], repeat=2)
    )]  # fmt: skip
    for confidence in (0.5, 0.8):
        got = statistics.stratified_interval(rates, np.mean, 3, confidence, resamples=20_000)
        tail = (1 - confidence) / 2
        for end, share in zip(got, (tail, 1 - tail), strict=True):
            assert np.mean(np.array(means) < end - 1e-9) <= share + 0.01
            assert np.mean(np.array(means) <= end + 1e-9) >= share - 0.01
