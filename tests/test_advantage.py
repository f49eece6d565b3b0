"""Returns and advantages against hand calculations and a slow version in plain Python."""

import math

import numpy as np
import pytest

from z1_jax.rl.advantage import calibrated_return, group_advantages, kept_groups, returns_of


def test_returns_by_hand():
    # 0.998^1 = 0.998, 0.998^2 = 0.996004, a failure is 0 however short it was
    out = calibrated_return(np.array([True, True, False]), np.array([1, 2, 1]), 0.998)
    np.testing.assert_allclose(out, [0.998, 0.996004, 0.0], rtol=1e-12)
    np.testing.assert_array_equal(calibrated_return(np.array([True, False]), np.array([9, 9]), 1.0), [1.0, 0.0])


def test_mixed_group_by_hand():
    # R = 1, 0, 0, 0: mean 0.25, population variance (0.5625 + 3·0.0625)/4 = 0.1875, std 0.4330127
    advantages = group_advantages(np.array([[1.0, 0, 0, 0]]), np.array([[True, False, False, False]]))
    np.testing.assert_allclose(advantages, [[0.75 / 0.4330127, *[-0.25 / 0.4330127] * 3]], rtol=1e-5)


def test_all_success_rewards_haste_and_punishes_nobody():
    success, chunks = np.ones((1, 3), bool), np.array([[4, 2, 4]])
    returns = calibrated_return(success, chunks, 0.998)
    advantages = group_advantages(returns, success)
    # 0.998^2 − 0.998^4 = 0.996004 − 0.992023968
    np.testing.assert_allclose(advantages, [[0.0, 0.003980032, 0.0]], rtol=1e-6, atol=1e-15)
    # With γ = 1 there is nothing to compare, and no division by the zero spread.
    np.testing.assert_array_equal(group_advantages(np.ones((1, 3)), success), 0.0)


def test_all_fail_teaches_nothing():
    returns = calibrated_return(np.zeros((1, 4), bool), np.array([[1, 2, 3, 4]]), 0.998)
    np.testing.assert_array_equal(group_advantages(returns, np.zeros((1, 4), bool)), 0.0)
    assert not kept_groups(returns, 0.1, 0.99).any()


def test_an_all_success_group_is_kept_from_six_chunks_on():
    """γ = 0.998 and the bound 0.99: 0.998^5 = 0.99004 is above, 0.998^6 = 0.98806 is not."""
    kept = [
        bool(kept_groups(calibrated_return(np.ones((1, 8), bool), np.full((1, 8), d), 0.998), 0.1, 0.99)[0])
        for d in range(1, 12)
    ]
    assert kept == [False] * 5 + [True] * 6


def test_bounds_of_the_filter_are_included():
    returns = np.array([[0.1, 0.1], [0.99, 0.99], [0.0999, 0.0999], [0.9901, 0.9901], [0.0, 1.0]])
    np.testing.assert_array_equal(kept_groups(returns, 0.1, 0.99), [True, True, False, False, True])


def slow(success, chunks, discount):
    returns = [discount**d if s else 0.0 for s, d in zip(success, chunks, strict=True)]
    if all(success):
        return returns, [r - min(returns) for r in returns]
    mean = sum(returns) / len(returns)
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / len(returns))
    return returns, [(r - mean) / (std + 1e-6) for r in returns]


def test_random_groups_match_plain_python(rng):
    for _ in range(50):
        groups, size = int(rng.integers(1, 5)), int(rng.integers(2, 10))
        success = rng.random((groups, size)) < rng.choice([0.0, 0.5, 0.9, 1.0])
        chunks = rng.integers(1, 16, (groups, size))
        discount = float(rng.choice([0.9, 0.998, 1.0]))
        returns = calibrated_return(success, chunks, discount)
        advantages = group_advantages(returns, success)
        kept = kept_groups(returns, 0.1, 0.99)
        for g in range(groups):
            expected_returns, expected = slow(success[g].tolist(), chunks[g].tolist(), discount)
            np.testing.assert_allclose(returns[g], expected_returns, rtol=1e-12)
            np.testing.assert_allclose(advantages[g], expected, rtol=1e-6, atol=1e-9)
            assert kept[g] == (0.1 <= sum(expected_returns) / size <= 0.99)


@pytest.mark.parametrize("shift", [1, 3])
def test_groups_do_not_mix(rng, shift):
    success = rng.random((4, 6)) < 0.5
    returns = calibrated_return(success, rng.integers(1, 9, (4, 6)), 0.9)
    rolled = group_advantages(np.roll(returns, shift, axis=0), np.roll(success, shift, axis=0))
    np.testing.assert_array_equal(rolled, np.roll(group_advantages(returns, success), shift, axis=0))


def test_kinds_of_reward_by_hand():
    success, chunks = np.array([[True, True, False]]), np.array([[1, 3, 4]])
    np.testing.assert_allclose(returns_of("decay", success, chunks, 0.5, 9.0), [[0.5, 0.125, 0.0]])
    np.testing.assert_allclose(returns_of("penalty", success, chunks, 9.0, 0.1), [[0.9, 0.7, -0.4]])
    np.testing.assert_array_equal(returns_of("sparse", success, chunks, 9.0, 9.0), [[1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="expected one of decay, penalty, sparse"):
        returns_of("dense", success, chunks, 0.5, 0.1)


def test_a_penalty_is_to_first_order_the_decay(rng):
    success, chunks = np.ones((5, 4), bool), rng.integers(1, 6, (5, 4))
    gap = returns_of("decay", success, chunks, 0.998, 0.0) - returns_of("penalty", success, chunks, 0.0, 0.002)
    assert np.abs(gap).max() < 0.002**2 * 5**2


def test_divisors_by_hand():
    # R = 1, 0, 0, 0: deviations 0.75, −0.25 …; over G: √0.1875, over G − 1: √0.25 = 0.5
    returns, success = np.array([[1.0, 0, 0, 0]]), np.array([[True, False, False, False]])
    np.testing.assert_allclose(group_advantages(returns, success, std="sample"), [[1.5, -0.5, -0.5, -0.5]], rtol=1e-5)
    np.testing.assert_allclose(group_advantages(returns, success, std="none"), [[0.75, -0.25, -0.25, -0.25]])


def test_all_success_centred_on_the_mean():
    success, returns = np.ones((1, 3), bool), np.array([[0.98, 0.96, 0.97]])
    np.testing.assert_allclose(group_advantages(returns, success, all_success="mean"), [[0.01, -0.01, 0.0]], atol=1e-12)


def test_the_filter_before_the_decay_drops_what_it_keeps_after_it():
    """All succeed in 6 chunks: the mean success is 1, above 0.99; the mean return is 0.998⁶ = 0.988, below it."""
    success, chunks = np.ones((1, 4), bool), np.full((1, 4), 6)
    assert kept_groups(calibrated_return(success, chunks, 0.998), 0.1, 0.99).all()
    assert not kept_groups(success, 0.1, 0.99).any()
