"""Branch plans against the examples of the method, and against an enumeration of every pair of members."""

import itertools

import numpy as np
import pytest

from z1_jax.rl.tree import BranchPlan, branch_plan, prefix_schedule, signed_advantage_sums


@pytest.mark.parametrize(
    ("size", "prefix", "points"),
    [(4, 15, (7, 15)), (8, 15, (3, 7, 15)), (8, 3, (0, 1, 3)), (8, 0, (0, 0, 0)), (2, 5, (5,))],
)
def test_branch_points_of_the_method(size, prefix, points):
    assert branch_plan("tree", size, prefix).points == points


def share(branching, size, prefix, i, j, chunk):
    """Whether members i and j take one chunk together: nothing but the definition, no clusters."""
    if i == j:
        return True
    if branching == "none":
        return False
    if branching == "prefix":
        return chunk < prefix
    depth = size.bit_length() - 1
    for level in range(1, depth + 1):  # at b_ℓ the ℓ-th highest bit of a member's number decides
        bit = depth - level
        if chunk >= prefix // 2 ** (depth - level) and (i >> bit) != (j >> bit):
            return False
    return True


@pytest.mark.parametrize("branching", ["none", "prefix", "tree"])
def test_clusters_are_those_of_an_enumeration(rng, branching):
    for _ in range(30):
        size = 2 ** int(rng.integers(1, 6)) if branching == "tree" else int(rng.integers(2, 12))
        prefix = 0 if branching == "none" else int(rng.integers(0, 20))
        plan = branch_plan(branching, size, prefix)
        before = None
        for chunk in range(prefix + 3):
            clusters = {
                tuple(j for j in range(size) if share(branching, size, prefix, i, j, chunk)) for i in range(size)
            }
            width = plan.cluster_size(chunk)
            leaders = plan.leaders(chunk)
            assert {tuple(range(a, a + width)) for a in leaders} == clusters
            assert list(leaders) == sorted(c[0] for c in clusters)
            # Shared by all: no comparison can credit it.
            assert plan.trainable(chunk) == (len(clusters) > 1)
            assert plan.split(chunk) == len(clusters) // (1 if before is None else before)
            before = len(clusters)
        assert len(clusters) == size  # at last everyone is alone


def test_a_group_of_one_never_branches_and_is_whole():
    plan = BranchPlan(1, (), ())
    assert [plan.cluster_size(c) for c in range(3)] == [1, 1, 1]
    assert plan.split(0) == plan.split(5) == 1 and plan.trainable(0)


def test_masked_part_of_a_tree_ends_at_the_first_branch_point():
    plan = branch_plan("tree", 8, 15)
    assert [plan.trainable(c) for c in range(5)] == [False, False, False, True, True]
    assert [plan.split(c) for c in (0, 3, 4, 7, 15)] == [1, 2, 1, 2, 2]
    assert [plan.split(0), plan.split(1)] == [1, 1]
    # Branch points 0, 1, 3: the first chunk is decided twice from one look.
    plan = branch_plan("tree", 8, 3)
    assert [plan.split(c) for c in range(5)] == [2, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("star", 4, 0), "branching: got 'star', expected one of none, prefix, tree"),
        (("none", 1, 0), "group size: got 1"),
        (("prefix", 4, -1), "prefix_chunks: got -1"),
        (("tree", 6, 3), "got 6 with branching=tree, expected a power of two"),
    ],
)
def test_plans_that_cannot_be(args, message):
    with pytest.raises(ValueError, match=message):
        branch_plan(*args)


def test_prefix_schedule_falls_from_start_to_end():
    assert [prefix_schedule(15, 0, i, 16) for i in range(16)] == list(range(15, -1, -1))
    values = [prefix_schedule(2, 0, i, 60) for i in range(60)]
    assert values[0] == 2 and values[-1] == 0 and all(a >= b for a, b in itertools.pairwise(values))
    assert prefix_schedule(5, 0, 0, 1) == 5 and prefix_schedule(3, 3, 7, 9) == 3


def test_signed_sums_match_a_loop(rng):
    advantages = rng.normal(size=(5, 8))
    n = 40
    group = rng.integers(0, 5, n)
    size = 2 ** rng.integers(0, 4, n)
    leader = rng.integers(0, 8 // size) * size
    positive, negative = signed_advantage_sums(advantages, group, leader, size)
    for row in range(n):
        members = [float(advantages[group[row], m]) for m in range(leader[row], leader[row] + size[row])]
        assert positive[row] == pytest.approx(sum(a for a in members if a > 0), rel=1e-6, abs=1e-7)
        assert negative[row] == pytest.approx(sum(a for a in members if a < 0), rel=1e-6, abs=1e-7)
    assert positive.dtype == negative.dtype == np.float32
