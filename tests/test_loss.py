"""The deduplicated objective against the naive sum over members, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from z1_jax.rl.loss import grpo_loss, node_objective
from z1_jax.rl.tree import branch_plan, signed_advantage_sums

LOW, HIGH = 0.2, 0.3


def random_tree(rng):
    """Nodes of random trees, advantages of both signs, and log-ratios inside and outside the clip range."""
    groups, size, chunks = 3, 2 ** int(rng.integers(1, 4)), 6
    plan = branch_plan("tree", size, int(rng.integers(0, 6)))
    rows = [
        (g, leader, plan.cluster_size(c))
        for g in range(groups)
        for c in range(chunks)
        if plan.trainable(c)
        for leader in plan.leaders(c)
    ]
    group, leader, width = np.array(rows).T
    advantages = rng.normal(size=(groups, size)).astype("f")
    logp_old = rng.normal(-20, 5, len(rows)).astype("f")
    # Away from the kinks at 1 − η and 1 + η by far more than rounding.
    log_ratio = rng.choice([-0.6, -0.4, -0.1, 0.0, 0.1, 0.4, 0.6], len(rows))
    log_ratio[rng.permutation(len(rows))[:2]] = -0.6, 0.6  # the smallest trees have six nodes: both sides, always
    log_ratio += rng.uniform(-0.04, 0.04, len(rows))
    return group, leader, width, advantages, logp_old, (logp_old + log_ratio).astype("f")


def naive_loss(logp, logp_old, group, leader, width, advantages):
    """One term per member and chunk, as the method writes it: L = −(1/Σ|B_i|) Σ min(ρA, clip(ρ)A)."""
    total, count = 0.0, 0
    for n in range(len(group)):
        ratio = jnp.exp(logp[n] - logp_old[n])
        for member in range(leader[n], leader[n] + width[n]):
            a = advantages[group[n], member]
            total += jnp.minimum(ratio * a, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * a)
            count += 1
    return -total / count


@pytest.mark.parametrize("trial", range(3))
def test_value_and_gradient_equal_the_naive_sum(rng, trial):
    group, leader, width, advantages, logp_old, logp = random_tree(rng)
    positive, negative = signed_advantage_sums(advantages, group, leader, width)

    def deduplicated(logp):
        valid = np.ones(len(logp), bool)
        return grpo_loss(logp, logp_old, positive, negative, valid, float(width.sum()), LOW, HIGH)[0]

    with jax.enable_x64(True):
        exact = jnp.asarray(logp, jnp.float64)
        value, gradient = jax.value_and_grad(
            lambda x: naive_loss(x, logp_old.astype(float), group, leader, width, advantages.astype(float))
        )(exact)
        value, gradient = float(value), np.asarray(gradient)
    got, slope = jax.jit(jax.value_and_grad(deduplicated))(logp)
    scale = np.abs(gradient).max()
    assert scale > 0
    assert float(got) == pytest.approx(value, rel=1e-5, abs=2e-6)
    np.testing.assert_allclose(slope, gradient, rtol=2e-5, atol=2e-6 * scale)
    ratio = np.exp(logp - logp_old)
    assert (ratio > 1 + HIGH).any() and (ratio < 1 - LOW).any()


def test_float32_value_and_gradient_equal_the_naive_ones_to_rounding(rng):
    """Both in float32 on the same ratios: the only difference is the order of sums."""
    group, leader, width, advantages, logp_old, logp = random_tree(rng)
    positive, negative = signed_advantage_sums(advantages, group, leader, width)
    ratio = jnp.exp(logp - logp_old)

    def naive(ratio):
        terms = [
            jnp.minimum(ratio[n] * a, jnp.clip(ratio[n], 1 - LOW, 1 + HIGH) * a)
            for n in range(len(group))
            for a in advantages[group[n], leader[n] : leader[n] + width[n]]
        ]
        return sum(terms)

    def exact(ratio):
        return node_objective(ratio, positive, negative, LOW, HIGH).sum()

    (a, da), (b, db) = jax.value_and_grad(naive)(ratio), jax.value_and_grad(exact)(ratio)
    magnitude = float(np.sum(np.maximum(ratio, 1.3) * (positive - negative)))
    assert abs(float(a) - float(b)) < 1e-6 * magnitude
    np.testing.assert_allclose(db, da, rtol=1e-6, atol=1e-6 * np.abs(da).max())


def test_by_hand():
    # Node 1: ρ = 1.5, members +2 and −1.  min(1.5·2, 1.2·2) = 2.4;  min(1.5·−1, 1.2·−1) = −1.5;  sum  0.9
    # Node 2: ρ = 0.5, members +2 and −1.  min(0.5·2, 0.8·2) = 1.0;  min(0.5·−1, 0.8·−1) = −0.8;  sum  0.2
    # Node 3: ρ = 1,   member −3.                                                                  sum −3.0
    # L = −(0.9 + 0.2 − 3.0) / 5 members = 0.38
    logp_old = jnp.array([-1.0, -2.0, -3.0])
    logp = logp_old + jnp.log(jnp.array([1.5, 0.5, 1.0]))
    positive, negative = jnp.array([2.0, 2.0, 0.0]), jnp.array([-1.0, -1.0, -3.0])
    valid = jnp.ones(3, bool)
    loss, stats = grpo_loss(logp, logp_old, positive, negative, valid, 5.0, 0.2, 0.2)
    assert float(loss) == pytest.approx(0.38, rel=1e-6)
    # dL/dlogp_n = −ρ·(what is not clipped)/5: +1.5·1/5, −0.5·2/5, +3/5
    gradient = jax.grad(lambda x: grpo_loss(x, logp_old, positive, negative, valid, 5.0, 0.2, 0.2)[0])(logp)
    np.testing.assert_allclose(gradient, [0.3, -0.2, 0.6], rtol=1e-5)
    assert float(stats["ratio_sum"]) == pytest.approx(3.0, rel=1e-6)
    assert float(stats["ratio_max"]) == pytest.approx(1.5, rel=1e-6)
    assert float(stats["ratio_error"]) == pytest.approx(0.5, rel=1e-6)
    assert float(stats["clipped"]) == 2 and float(stats["nodes"]) == 3
    # k3: Σ ρ − 1 − log ρ = (0.5 − 0.405465) + (−0.5 + 0.693147) + 0
    assert float(stats["kl_sum"]) == pytest.approx(0.287682, rel=1e-4)


def test_padding_contributes_nothing(rng):
    group, leader, width, advantages, logp_old, logp = random_tree(rng)
    positive, negative = signed_advantage_sums(advantages, group, leader, width)
    n, pad = len(logp), 5
    valid = np.arange(n + pad) < n

    def run(logp, logp_old, positive, negative, valid):
        return jax.value_and_grad(
            lambda x: grpo_loss(x, logp_old, positive, negative, valid, 7.0, LOW, HIGH), has_aux=True
        )(logp)

    def padded(x, value):
        return np.concatenate([x, np.full(pad, value, np.float32)])

    (loss, stats), gradient = run(logp, logp_old, positive, negative, valid[:n])
    # exp(1000) is infinite: padding may hold anything.
    (loss2, stats2), gradient2 = run(
        padded(logp, 1000.0), padded(logp_old, 0.0), padded(positive, 9.0), padded(negative, -9.0), valid
    )
    # Terms of either sign and of size 1 cancel in these sums, whose order changes with the padding.
    assert float(loss2) == pytest.approx(float(loss), rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient2[:n], gradient, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(gradient2[n:], 0.0)
    assert {k: pytest.approx(float(v), rel=1e-5, abs=1e-6) for k, v in stats.items()} == {
        k: float(v) for k, v in stats2.items()
    }


def test_dual_clip_of_a_node_equals_the_sum_over_its_members(rng):
    """Ye et al. 2020: a member with A < 0 counts max(min(ρA, clip(ρ)A), c·A). Value and gradient, ratios up to 20."""
    ratio = np.exp(rng.uniform(-1, 3, 40)).astype("f")
    advantages, bound = rng.normal(size=(40, 4)).astype("f"), 1.0 + float(rng.uniform(0.5, 3))

    def naive(ratio):
        r = ratio[:, None]
        clipped = jnp.minimum(r * advantages, jnp.clip(r, 1 - LOW, 1 + HIGH) * advantages)
        return jnp.where(advantages < 0, jnp.maximum(clipped, bound * advantages), clipped).sum()

    positive, negative = np.maximum(advantages, 0).sum(1), np.minimum(advantages, 0).sum(1)
    got, slope = jax.value_and_grad(lambda r: node_objective(r, positive, negative, LOW, HIGH, bound).sum())(ratio)
    value, expected = jax.value_and_grad(naive)(ratio)
    assert float(got) == pytest.approx(float(value), rel=1e-5, abs=1e-4)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)
    assert (ratio > bound).any() and abs(float(got) - float(node_objective(ratio, positive, negative, LOW, HIGH).sum()))


def test_clip_fractions_by_sign():
    """ρ = 1.5, 0.5, 1.5, 0.5, 1, 9 with A of +, −, −, +, both, −: cut off where the objective has become flat."""
    logp = np.log(np.array([1.5, 0.5, 1.5, 0.5, 1.0, 9.0], "f"))
    positive, negative = np.array([1, 0, 0, 1, 1, 0.0]), -np.array([0, 1, 1, 0, 1, 1.0])
    for bound, down in ((0.0, 1), (3.0, 2)):
        stats = grpo_loss(logp, np.zeros(6, "f"), positive, negative, np.ones(6, bool), 6.0, 0.2, 0.2, bound)[1]
        counts = [int(stats[name]) for name in ("clipped_positive", "clipped_negative", "clipped")]
        assert counts == [1, down, 1 + down]
