"""Which tasks the groups of an iteration are of, by hand and by counting."""

import json
import math

import numpy as np
import pytest

from z1_jax.rl.task_groups import WINDOW, TaskGroups, TaskRecord, apportioned, in_turn, shares


def test_in_turn_every_task_comes_once_a_round(rng):
    seed, tasks = int(rng.integers(10**6)), 5
    whole = in_turn(tasks, seed, 0, 40)
    for start in range(0, 40, tasks):
        assert sorted(whole[start : start + tasks]) == list(range(tasks))
    assert len({tuple(whole[start : start + tasks]) for start in range(0, 40, tasks)}) > 1  # in another order
    for count in (3, 8):  # iterations cut the same order into pieces
        pieces = [in_turn(tasks, seed, n * count, count) for n in range(40 // count)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole[: len(pieces) * count])


def test_shares_by_hand():
    # Means of p(1 − p) over Beta(1, 3), Beta(1, 1), Beta(3, 1): 3/20, 1/6, 3/20.
    # A floor of 1/2: 1/6 each, and half of the rest.
    got = shares(np.array([0.0, math.nan, 1.0]), np.array([2.0, 0.0, 2.0]), 0.5)
    np.testing.assert_allclose(got, [1 / 6 + 1 / 2 * 9 / 28, 1 / 6 + 1 / 2 * 10 / 28, 1 / 6 + 1 / 2 * 9 / 28])


def test_shares_by_counting(rng):
    """Against draws from the posterior; with much evidence they are p(1 − p)."""
    groups = rng.integers(1, 12, size=5).astype(float)
    successes = rng.random(5) * groups
    p = rng.beta(1 + successes, 1 + groups - successes, size=(400_000, 5))
    weight = (p * (1 - p)).mean(axis=0)
    np.testing.assert_allclose(shares(successes / groups, groups, 0.0), weight / weight.sum(), atol=2e-3)
    p = rng.uniform(0.05, 0.95, size=5)
    np.testing.assert_allclose(shares(p, np.full(5, 1e6), 0.0), p * (1 - p) / (p * (1 - p)).sum(), rtol=1e-4)


def test_one_lucky_group_does_not_end_a_tasks_training():
    once = shares(np.array([1.0, 0.5]), np.array([1.0, 1.0]), 0.25)
    often = shares(np.array([1.0, 0.5]), np.array([80.0, 80.0]), 0.25)
    assert once[0] > 0.4 and often[0] < 0.2


def test_what_a_task_gets_is_its_share(rng):
    share = rng.dirichlet(np.ones(6))
    seed, count = int(rng.integers(10**6)), 8
    counts = np.array([np.bincount(apportioned(share, count, seed, n), minlength=6) for n in range(2000)])
    assert (counts.sum(axis=1) == count).all()
    assert (np.abs(counts - count * share) < 1).all()  # rounded up or down
    np.testing.assert_allclose(counts.mean(axis=0), count * share, atol=0.06)


def test_the_largest_fall_by_hand():
    record = TaskRecord()
    for success in [0.0] * 5 + [1.0] * 15 + [0.0] * 5 + [1.0] * 10:
        record.add(success, 2, 5)
    # The mean of ten reaches 1.0, falls to 0.5 with the five failures, and is back at 1.0.
    assert (record.best, record.fall, record.mean) == (1.0, 0.5, 1.0)
    assert (record.iterations, record.groups, len(record.recent)) == (35, 70, WINDOW)


def test_what_ten_iterations_are_needed_for_is_not_told_before():
    groups = TaskGroups("AB", "uniform", 0.25, 0, 5)
    for _ in range(WINDOW):
        groups.observe(["A"], np.array([[True, False]]))
    groups.observe(["B"], np.array([[True, True]]))
    told = groups.summary()
    assert told["A"] == {"groups": WINDOW, "success": 0.5, "best": 0.5, "fall": 0.0}
    assert told["B"] == {"groups": 1, "success": 1.0, "best": None, "fall": None}


def test_a_rating_is_the_mean_over_tasks_by_hand():
    groups = TaskGroups("AB", "uniform", 0.25, 0, 5)
    assert groups.rating(2) is None
    for success in ([False, False], [True, False], [True, True]):
        groups.observe(["A"], np.array([success]))
    assert groups.rating(2) is None  # nothing is known of B
    groups.observe(["B", "B"], np.array([[True, False], [False, False]]))
    assert groups.rating(2) == pytest.approx((0.75 + 0.25) / 2) and groups.rating(3) == pytest.approx((0.5 + 0.25) / 2)


def test_one_task_is_left_alone():
    alone = TaskGroups(["A"], "uniform", 0.25, 0, 5)
    assert alone.of_groups(3, 4) == ["A"] * 4
    assert alone.observe(["A"] * 4, np.ones((4, 8), bool)) == {}


@pytest.mark.parametrize("spread", ["uniform", "adaptive"])
def test_a_run_that_goes_on_gives_the_same_groups(spread, rng):
    seed = int(rng.integers(10**6))

    def make():
        return TaskGroups("ABC", spread, 0.25, seed, 5)

    first, told = make(), []
    for iteration in range(30):
        tasks = first.of_groups(iteration, 4)
        success = rng.random((4, 8)) < np.array([{"A": 0.0, "B": 0.5, "C": 1.0}[task] for task in tasks])[:, None]
        metrics = first.observe(tasks, success)
        assert sum(metrics[f"tasks/{task}/groups"] for task in "ABC") == 4
        told.append(tasks)
        if iteration == 19:
            second = make()
            second.resume(json.loads(json.dumps(first.progress())))
            assert second.of_groups(20, 4) == first.of_groups(20, 4)
    late = [task for tasks in told[10:] for task in tasks]
    if spread == "adaptive":  # what is half learned gets most
        assert late.count("B") > 36 and 6 <= late.count("A") <= 24 and 6 <= late.count("C") <= 24
    else:
        assert all(abs(late.count(task) - 80 / 3) <= 1 for task in "ABC")


def test_a_run_stops_when_every_task_is_done():
    groups = TaskGroups("AB", "uniform", 0.25, 0, 3)
    for _ in range(3):
        groups.observe(["A", "B"], np.array([[True, True], [True, False]]))
    assert not groups.settled(3, 0.9) and groups.settled(3, 0.5) and not groups.settled(4, 0.5)
    for _ in range(3):
        groups.observe(["B", "B"], np.ones((2, 2), bool))
    assert groups.settled(3, 0.9)
