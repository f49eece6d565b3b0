"""Real-time chunking against its equations: by hand, by a Jacobian in the paper's own time, on exact flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from z1_jax.rl import flow, real_time

HORIZON, WIDTH = 6, 3
ALL = jnp.ones((HORIZON, WIDTH), bool)


def mask_by_hand(horizon, delay, overlap):
    """Equation 5 of the paper, with H − s = overlap."""
    weights = []
    for i in range(horizon):
        if i < delay:
            weights.append(1.0)
        elif i < overlap:
            c = (overlap - i) / (overlap - delay + 1)
            weights.append(c * (np.exp(c) - 1) / (np.e - 1))
        else:
            weights.append(0.0)
    return np.array(weights)


MASKS = [(16, 3, 8), (16, 0, 8), (8, 8, 8), (5, 2, 5), (4, 0, 0), (50, 7, 25)]


@pytest.mark.parametrize("horizon, delay, overlap", MASKS)
def test_the_mask_is_the_papers(horizon, delay, overlap):
    np.testing.assert_allclose(
        real_time.soft_mask(horizon, delay, overlap), mask_by_hand(horizon, delay, overlap), rtol=1e-6
    )


def test_a_batch_of_masks_and_two_values_worked_out():
    rows = real_time.soft_mask(8, np.array([1, 0]), np.array([4, 1]))
    np.testing.assert_allclose(rows[0], mask_by_hand(8, 1, 4), rtol=1e-6)
    np.testing.assert_allclose(rows[1], mask_by_hand(8, 0, 1), rtol=1e-6)
    # d = 1, L = 4: step 1 has c = 3/4, 0.75·(2.117 − 1)/1.71828 = 0.487551; step 3 has c = 1/4, 0.041324.
    np.testing.assert_allclose(rows[0][[0, 1, 3, 4]], [1.0, 0.487551, 0.041324, 0.0], rtol=1e-5)


def test_the_weight_is_the_papers_clipped(rng):
    tau = rng.uniform(0.01, 0.99, 50)
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    for largest in (1e6, 5.0, 2.0):
        expected = np.minimum(largest, (1 - tau) / (tau * r2))
        np.testing.assert_allclose(real_time.guidance_weight(jnp.asarray(1 - tau), largest), expected, rtol=1e-4)
    np.testing.assert_array_equal(real_time.guidance_weight(jnp.array([0.0, 1.0]), 5.0), [5.0, 5.0])


def some_velocity(rng):
    """A smooth velocity that mixes all coordinates of a chunk, in float64 NumPy and in JAX."""
    size = HORIZON * WIDTH
    mix, out = rng.standard_normal((2, size, size)) / np.sqrt(size)

    def velocity(x, t, np=jnp):
        flat = x.reshape(*x.shape[:-2], size)
        return (np.tanh(flat @ mix + t[..., None]) @ out).reshape(x.shape)

    return velocity


def test_guidance_is_equation_2_in_the_papers_time(rng):
    """v + min(β, …)·(Y − Â)ᵀ diag(W) ∂Â/∂A with a Jacobian by central differences, then turned into our direction."""
    velocity = some_velocity(rng)
    x, target = rng.standard_normal((2, 4, HORIZON, WIDTH))
    weights = np.broadcast_to(rng.uniform(0, 1, (4, HORIZON, 1)), x.shape)
    t = np.array([1.0, 0.75, 0.5, 0.1])
    largest = 5.0
    got = real_time.guided(velocity, *(jnp.asarray(y, jnp.float32) for y in (target, weights)), largest)(
        jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32)
    )
    for row in range(4):
        tau = 1 - t[row]

        def papers_velocity(a, row=row):
            return -velocity(a, t[row], np)

        def estimate(flat, tau=tau, papers_velocity=papers_velocity):  # Â¹ = A + (1 − τ)·v
            a = flat.reshape(HORIZON, WIDTH)
            return (a + (1 - tau) * papers_velocity(a)).ravel()

        flat, step = x[row].ravel(), 1e-5
        eye = np.eye(flat.size)
        jacobian = np.stack([(estimate(flat + step * e) - estimate(flat - step * e)) / (2 * step) for e in eye], axis=1)
        error = (target[row].ravel() - estimate(flat)) * weights[row].ravel()
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = largest if tau == 0 else min(largest, (1 - tau) / (tau * r2))
        guided = papers_velocity(x[row]) + weight * (error @ jacobian).reshape(HORIZON, WIDTH)
        np.testing.assert_allclose(got[row], -guided, rtol=1e-3, atol=2e-4)


def exact_velocity(covariance, means):
    """E[ε − a | x_t] of normal data over the steps of a chunk [H, 1], by linear algebra."""

    def velocity(x, t):
        t = t[..., None, None]
        eye = jnp.eye(len(means))
        total = t**2 * eye + (1 - t) ** 2 * covariance
        centred = x[..., 0] - (1 - t[..., 0]) * means
        data = means + (1 - t[..., 0]) * jnp.einsum(
            "ij,...j->...i", covariance, jnp.linalg.solve(total, centred[..., None])[..., 0]
        )
        return (x[..., 0] - (1 - t[..., 0]) * data)[..., None] / t - data[..., None]

    return velocity


def chunks(velocity, noise, steps=50):
    x_0 = jnp.concatenate([noise[:, None], jnp.zeros((len(noise), steps, *noise.shape[1:]))], axis=1)
    still = jnp.zeros((len(noise), steps), bool)
    return flow.sample(velocity, x_0, still, jnp.ones(noise.shape[1:], bool), noise_level=0.5).x


def test_guided_steps_end_at_their_target_and_pull_the_steps_that_belong_to_them(rng):
    """Normal data: step 1 belongs to step 0 (correlation 0.9), step 2 to neither."""
    covariance = jnp.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    velocity = exact_velocity(covariance, jnp.zeros(3))
    noise = jnp.asarray(rng.standard_normal((2000, 3, 1)), jnp.float32)
    weights = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0])[:, None], noise.shape)
    target = jnp.full(noise.shape, 1.5)
    free = chunks(velocity, noise)[:, -1, :, 0]
    held = chunks(real_time.guided(velocity, target, weights, 1e3), noise)[:, -1, :, 0]
    away = chunks(lambda x, t: 2 * velocity(x, t) - real_time.guided(velocity, target, weights, 5.0)(x, t), noise)
    assert np.abs(free[:, 0] - 1.5).mean() > 1.0
    assert np.abs(held[:, 0] - 1.5).max() < 0.1
    assert np.abs(away[:, -1, 0, 0] - 1.5).mean() > 2.0  # the sign trap shows
    assert 0.9 * 1.5 - 0.3 < held[:, 1].mean() < 0.9 * 1.5 + 0.3 and abs(free[:, 1].mean()) < 0.1
    np.testing.assert_allclose(held[:, 2], free[:, 2], atol=1e-4)


def papers_chunks(weight, bias, start, target, mask, steps, largest):
    """Algorithm 1's guided inference for v(A, τ) = weight·A + τ·bias: NumPy, in the paper's time, Jacobian written out.

    start, target [N, D]; mask [D].
    """
    a, eye = start.astype(np.float64), np.eye(len(weight))
    for k in range(steps):
        tau = k / steps
        velocity = a @ weight.T + tau * bias
        estimate = a + (1 - tau) * velocity
        jacobian = eye + (1 - tau) * weight  # of the estimate by A
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = largest if tau == 0 else min(largest, (1 - tau) / (tau * r2))
        a = a + (velocity + strength * ((target - estimate) * mask) @ jacobian) / steps
    return a


@pytest.mark.parametrize("steps, largest", [(5, 5.0), (10, 5.0), (4, 2.0), (20, 50.0)])
def test_whole_chunks_of_a_linear_model_are_the_papers(rng, steps, largest):
    """From noise to the end: mask, weight, pull and direction of time together."""
    size, delay, overlap = HORIZON * WIDTH, 2, 4
    weight, bias = rng.standard_normal((size, size)) / size, rng.standard_normal(size)
    start, target = rng.standard_normal((2, 3, size))
    mask = np.repeat(mask_by_hand(HORIZON, delay, overlap), WIDTH)
    expected = papers_chunks(weight, bias, start, target, mask, steps, largest)

    def ours(x, t):  # τ = 1 − t, and the velocity points the other way
        flat = x.reshape(*x.shape[:-2], size)
        return -(flat @ weight.T.astype("f") + (1 - t)[..., None] * bias.astype("f")).reshape(x.shape)

    shaped = [jnp.asarray(y.reshape(3, HORIZON, WIDTH), jnp.float32) for y in (start, target)]
    weights = jnp.broadcast_to(real_time.soft_mask(HORIZON, delay, overlap)[:, None], shaped[0].shape)
    got = chunks(real_time.guided(ours, shaped[1], weights, largest), shaped[0], steps)[:, -1]
    np.testing.assert_allclose(np.asarray(got).reshape(3, size), expected, rtol=1e-4, atol=1e-4)
    free = chunks(ours, shaped[0], steps)[:, -1]
    error = [np.abs(np.asarray(end).reshape(3, size) - target)[:, : delay * WIDTH].mean() for end in (got, free)]
    assert error[0] < 0.5 * error[1]


def test_without_weights_nothing_changes(rng):
    velocity = some_velocity(rng)
    x, target = (jnp.asarray(rng.standard_normal((2, HORIZON, WIDTH)), jnp.float32) for _ in range(2))
    t = jnp.array([0.9, 0.2])
    np.testing.assert_array_equal(
        jax.jit(real_time.guided(velocity, target, jnp.zeros_like(x)))(x, t), jax.jit(velocity)(x, t)
    )


def test_overwritten_steps_are_noised_targets_at_every_time(rng):
    velocity = some_velocity(rng)
    noise, target = (jnp.asarray(rng.standard_normal((2, HORIZON, WIDTH)), jnp.float32) for _ in range(2))
    fixed = jnp.broadcast_to((jnp.arange(HORIZON) < 2)[:, None], noise.shape)
    seen = []

    def spied(x, t):
        seen.append(x.shape)
        return velocity(x, t)

    steps = 4
    x = chunks(real_time.overwritten(spied, noise, target, fixed), noise, steps)
    for k in range(steps + 1):
        t = 1 - k / steps
        np.testing.assert_allclose(x[:, k, :2], t * noise[:, :2] + (1 - t) * target[:, :2], atol=1e-5)
    # The others are what a loop that overwrites before each look makes of them.
    y = noise
    for k in range(steps):
        t = 1 - k / steps
        y = jnp.where(fixed, t * noise + (1 - t) * target, y)
        y = y - velocity(y, jnp.full(2, t)) / steps
    np.testing.assert_allclose(x[:, -1, 2:], y[:, 2:], atol=1e-5)
    assert seen
