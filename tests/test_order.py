"""The order of records in batches: proportional against balanced."""

import collections

import numpy as np
import pytest

from z1_jax.data.order import BalancedBatches, Batches


def parts_of(rng) -> list[np.ndarray]:
    """Three tasks of very different sizes, their records mixed."""
    records = rng.permutation(40)
    return np.split(records, [3, 11])


def drawn(batches: Batches, count: int) -> np.ndarray:
    return np.concatenate([batches[n] for n in range(count)])


def test_balanced_batches_hold_each_task_as_often(rng):
    parts = parts_of(rng)
    batches = BalancedBatches(parts, 6, int(rng.integers(10**6)), slice(None))
    for number in range(50):
        assert [int(np.isin(batches[number], part).sum()) for part in parts] == [2, 2, 2]
    records = drawn(batches, 60)  # 120 of each task: whole epochs of 3 and 8, and four of 29 with some over
    for part in parts:
        counts = collections.Counter(records[np.isin(records, part)].tolist())
        assert set(counts) == set(part.tolist()) and max(counts.values()) - min(counts.values()) <= 1
    mine = records[np.isin(records, parts[1])]
    assert sorted(mine[:8].tolist()) == sorted(mine[8:16].tolist()) and mine[:8].tolist() != mine[8:16].tolist()


def test_proportional_batches_hold_each_record_as_often(rng):
    records = drawn(Batches(40, 8, int(rng.integers(10**6)), slice(None)), 10)
    assert sorted(records[:40].tolist()) == sorted(records[40:].tolist()) == list(range(40))


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_share_one_order(balanced, rng):
    parts, seed = parts_of(rng), int(rng.integers(10**6))

    def make(rows):
        return BalancedBatches(parts, 6, seed, rows) if balanced else Batches(40, 6, seed, rows)

    whole, halves = make(slice(None)), [make(slice(0, 3)), make(slice(3, 6))]
    for number in (0, 7, 1000, 6):  # any batch, in any order
        np.testing.assert_array_equal(whole[number], np.concatenate([half[number] for half in halves]))
    assert (
        drawn(whole, 3).tolist()
        != drawn(
            BalancedBatches(parts, 6, seed + 1, slice(None)) if balanced else Batches(40, 6, seed + 1, slice(None)), 3
        ).tolist()
    )
