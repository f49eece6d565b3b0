"""The sampler's exactness: random mixtures over whole chunks, change of variables, and unbiased policy gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from seeds import fresh_seed

from z1_jax.rl import flow

MODES = [(sde, last) for sde in ("all", "one") for last in ("sde", "ode")]
SHAPE = (2, 2)  # H, A
ALL = np.ones(SHAPE, bool)
LEVEL = 0.5


def chosen_steps(rng, samples, steps, sde_steps, last_step):
    return np.stack([flow.stochastic_steps(rng, steps, sde_steps, last_step) for _ in range(samples)])


# --- marginals ------------------------------------------------------------------------------------------------------


def mixture_velocity(x, t, weights, means, stds):
    """E[ε − a | x_t = x] for a ~ Σ_c w_c N(m_c, diag s_c²) over the chunk, ε ~ N(0, I), x_t = t·ε + (1 − t)·a.

    Given component c, x_t ~ N((1 − t)·m_c, t² + (1 − t)²s_c²) and (a, x_t) are jointly normal with covariance
    (1 − t)·s_c², so E[a | x, c] = m_c + (1 − t)s_c²/var·(x − (1 − t)m_c); c has the posterior weight of x. One
    component explains all coordinates at once: they depend on one another. Then ε = (x − (1 − t)·a)/t.
    """
    t, x = t[..., None, None, None], x[..., None, :, :]
    variance = t**2 + ((1 - t) * stds) ** 2
    centred = x - (1 - t) * means
    log_density = jnp.sum(-0.5 * jnp.log(variance) - 0.5 * centred**2 / variance, axis=(-2, -1))
    posterior = jax.nn.softmax(jnp.log(weights) + log_density, axis=-1)[..., None, None]
    data = jnp.sum(posterior * (means + (1 - t) * stds**2 / variance * centred), axis=-3)
    t, x = t[..., 0, :, :], x[..., 0, :, :]
    return (x - (1 - t) * data) / t - data


def draw_with(transition):
    """A compiled sampler that takes its steps by `transition`: the mixture and the chosen steps are its inputs."""

    @jax.jit
    def draw(noise, stochastic, weights, means, stds):
        def velocity(x, t):
            return mixture_velocity(x, t, weights, means, stds)

        with pytest.MonkeyPatch.context() as patch:  # at tracing
            patch.setattr(flow, "transition", transition)
            return flow.sample(velocity, noise, stochastic, ALL, noise_level=LEVEL).x[:, -1]

    return draw


def flipped(x, v, t, steps, noise_level, true=flow.transition):
    """The true step with the sign of its correction turned: x − Δ·(v − correction)."""
    mean, std = true(x, v, t, steps, noise_level)
    return 2 * (x - v / steps) - mean, std


DRAW, DRAW_FLIPPED = draw_with(flow.transition), draw_with(flipped)


def random_mixture(rng):
    components = 3
    weights = rng.dirichlet([5.0] * components)
    means = 1.5 * rng.normal(size=(components, *SHAPE))
    return weights.astype("f"), means.astype("f"), rng.uniform(0.3, 0.7, (components, *SHAPE)).astype("f")


def worst_distance(rng, x, mixture):
    """Largest Kolmogorov-Smirnov distance over random directions: each projection is a mixture in one dimension."""
    weights, means, stds = mixture
    worst = 0.0
    for _ in range(6):
        direction = rng.normal(size=SHAPE)
        direction /= np.linalg.norm(direction)
        at, width = np.sum(means * direction, (1, 2)), np.sqrt(np.sum((stds * direction) ** 2, (1, 2)))

        def distribution(y, at=at, width=width):
            return sum(w * stats.norm.cdf(y, m, s) for w, m, s in zip(weights, at, width, strict=True))

        worst = max(worst, stats.ks_1samp(np.sum(x * direction, (1, 2)), distribution).statistic)
    return worst


SAMPLES, STEPS = 5_000, 150
BOUND = 2.6 / np.sqrt(SAMPLES) + 0.013  # six directions at p < 1e-5 each, and the error of 150 steps


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_random_mixtures_over_a_chunk_are_kept(rng, sde_steps, last_step):
    mixture = random_mixture(rng)
    noise = rng.standard_normal((SAMPLES, STEPS + 1, *SHAPE), np.float32)
    x = np.asarray(DRAW(noise, chosen_steps(rng, SAMPLES, STEPS, sde_steps, last_step), *mixture))
    assert worst_distance(rng, x, mixture) < BOUND
    assert worst_distance(rng, x + 0.5, mixture) > BOUND  # the test can fail


@pytest.mark.parametrize("last_step", ["sde", "ode"])
def test_the_flipped_sign_keeps_no_mixture(rng, last_step):
    mixture = random_mixture(rng)
    noise = rng.standard_normal((SAMPLES, STEPS + 1, *SHAPE), np.float32)
    x = np.asarray(DRAW_FLIPPED(noise, chosen_steps(rng, SAMPLES, STEPS, "all", last_step), *mixture))
    assert worst_distance(rng, x, mixture) > 3 * BOUND


# --- the density ----------------------------------------------------------------------------------------------------

K = 3


def coupled_velocity(theta, xp):
    """A velocity that mixes all coordinates of a chunk, for either library; theta: [D, D + 1], D = H·A."""

    def velocity(x, t):
        flat = x.reshape(*x.shape[:-2], -1)
        moved = xp.tanh(flat @ theta[:, :-1] + t[..., None] * theta[:, -1])
        return (moved + 0.3 * flat).reshape(x.shape)

    return velocity


def random_theta(rng):
    size = SHAPE[0] * SHAPE[1]
    return (0.7 * rng.normal(size=(size, size + 1))).astype("f")


@pytest.mark.parametrize("pattern", [(1, 1, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1)])
def test_density_is_that_of_a_change_of_variables(rng, pattern):
    """The stochastic states are a function of the noise: log p = Σ log N(z; 0, 1) − log |det ∂x/∂z|, by autodiff."""
    theta, stochastic = random_theta(rng), np.array(pattern, bool)
    at = np.flatnonzero(stochastic)
    noise = rng.normal(size=(K + 1, *SHAPE)).astype("f")

    def chain(z):
        full = jnp.asarray(noise).at[at + 1].set(z)
        return flow.sample(coupled_velocity(theta, jnp), full, stochastic, ALL, noise_level=LEVEL)

    z = noise[at + 1]
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda z: chain(z).x[at + 1]))(z), float).reshape(z.size, z.size)
    expected = stats.norm.logpdf(z.astype(float)).sum() - np.linalg.slogdet(jacobian)[1]
    assert float(chain(z).logp) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_scores_of_a_step_are_the_derivatives_of_a_normal(rng):
    """∂ log p/∂x' = −(x' − μ)/σ², ∂/∂μ its negative, ∂/∂σ = Σ (x' − μ)²/σ³ − 1/σ, ∂²/∂x'² = −1/σ²."""
    x, mean = rng.normal(size=(2, *SHAPE)).astype("f")
    std = np.float32(rng.uniform(0.2, 0.8))
    counted = np.array([[True, False], [True, True]])
    gradient = jax.grad(flow.step_logp, argnums=(0, 1, 2))(x, mean, std, counted)
    residual = np.where(counted, (x - mean).astype(float), 0.0)
    np.testing.assert_allclose(gradient[0], -residual / std**2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[1], residual / std**2, rtol=1e-5, atol=1e-6)
    assert float(gradient[2]) == pytest.approx(np.sum(residual**2) / std**3 - 3 / std, rel=1e-4, abs=1e-4)
    curvature = jax.hessian(flow.step_logp)(x, mean, std, counted).reshape(4, 4)
    np.testing.assert_allclose(curvature, -np.diag(counted.ravel() / std**2), rtol=1e-5, atol=1e-6)


def reference_logp(theta, x, stochastic):
    """One chain, float64, scipy's density: nothing of flow.py."""
    total = 0.0
    for k in np.flatnonzero(stochastic):
        dt, t = 1 / K, 1 - k / K
        sigma = LEVEL * np.sqrt(t / max(1 - t, dt))
        v = coupled_velocity(theta, np)(x[k], np.float64(t))
        mean = x[k] - dt * (v + sigma**2 / (2 * t) * (x[k] + (1 - t) * v))
        total += stats.norm.logpdf(x[k + 1], mean, sigma * np.sqrt(dt)).sum()
    return total


class Variants(chex.TestCase):
    """Compiled and not: one set of assertions."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_sampled_and_scored_density_and_its_slope(self):
        """Sampler and score against scipy; the slope in parameters *and* states against central differences."""
        seed = fresh_seed(__name__, "test_sampled_and_scored_density_and_its_slope")
        rng = np.random.default_rng(seed)
        theta = random_theta(rng)
        noise = rng.normal(size=(4, K + 1, *SHAPE)).astype("f")
        stochastic = np.concatenate([chosen_steps(rng, 1, K, *mode) for mode in MODES])

        @self.variant
        def run(theta, noise):
            chain = flow.sample(coupled_velocity(theta, jnp), noise, stochastic, ALL, noise_level=LEVEL)

            def score(theta, x):
                return flow.chain_logp(coupled_velocity(theta, jnp), x, stochastic, ALL, noise_level=LEVEL).sum()

            return chain, score(theta, chain.x), jax.grad(score, argnums=(0, 1))(theta, chain.x)

        chain, scored, slopes = run(theta, noise)
        x = np.asarray(chain.x, float)
        expected = [reference_logp(theta.astype(float), *pair) for pair in zip(x, stochastic, strict=True)]
        np.testing.assert_allclose(chain.logp, expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(scored, sum(expected), rtol=1e-5, atol=1e-4)

        def along(theta, x):
            return sum(reference_logp(theta, *pair) for pair in zip(x, stochastic, strict=True))

        h = 1e-5
        for _ in range(4):
            a, b = rng.normal(size=theta.shape), rng.normal(size=x.shape)
            numeric = (along(theta + h * a, x + h * b) - along(theta - h * a, x - h * b)) / (2 * h)
            # A deterministic step's outcome does not enter, but the reference and the code must agree on that too.
            got = float(np.sum(slopes[0] * a) + np.sum(slopes[1] * b))
            size = float(np.sum(np.abs(slopes[0] * a)) + np.sum(np.abs(slopes[1] * b)))
            assert abs(got - numeric) < 1e-4 * size


# --- one stochastic step per sample ---------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", ["sde", "ode"])
def test_one_step_is_an_unbiased_share_of_all_steps(rng, last_step):
    """On given chains E[∇ log π of the drawn step] = (1/n)·∇ log π of all n steps, n = K, or K − 1 with last_step=ode.

    Exact over the n possible indices; and the drawn ones approach it.
    """
    steps, theta = 5, random_theta(rng)
    x = rng.normal(size=(steps + 1, *SHAPE)).astype("f")
    candidates = steps - (last_step == "ode")

    @jax.jit
    def slope(stochastic):
        def score(theta):
            return flow.chain_logp(coupled_velocity(theta, jnp), x, stochastic, ALL, noise_level=LEVEL)

        return jax.grad(score)(theta)

    every = np.asarray(slope(np.arange(steps) < candidates))
    single = np.stack([slope(np.arange(steps) == k) for k in range(candidates)])
    size = np.abs(single).max()
    np.testing.assert_allclose(single.mean(axis=0), every / candidates, atol=1e-5 * size)
    assert np.abs(single - every / candidates).max() > 0.05 * size  # a single one does not equal it

    draws = 40_000
    drawn = chosen_steps(rng, draws, steps, "one", last_step).argmax(axis=1)
    error = single.std(axis=0) / np.sqrt(draws)
    assert (np.abs(single[drawn].mean(axis=0) - every / candidates) < 5.5 * error + 1e-5 * size).all()


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_policy_gradient_of_own_samples_is_the_derivative_of_their_expected_reward(rng, sde_steps, last_step):
    """E[f(x_K)·∇ log π] against the derivative of E[f(x_K)] through the sampler itself, by its noise.

    Two estimators of one number. Only stochastic steps have a density, so only there does the parameter move; the
    chain passes through the deterministic ones. Chain by chain, with the chain's own stored indices.
    """
    steps, n = 4, 60_000
    stochastic = jnp.asarray(chosen_steps(rng, n, steps, sde_steps, last_step))
    noise = rng.standard_normal((n, steps + 1, 1, 1), np.float32)
    shift, counted = jnp.float32(0.3), np.ones((1, 1), bool)

    def velocity(moved, now):
        """`moved` where the chain's step at that time draws noise, `now` elsewhere."""

        def at(x, t):
            k = jnp.round((1 - t) * steps).astype(int)
            drawn = jnp.take_along_axis(stochastic, k.reshape(n, -1), axis=1).reshape(k.shape)
            return jnp.tanh(x + jnp.where(drawn, moved, now)[..., None, None]) + 0.5 * x

        return at

    def reward(x):
        return jnp.sin(x[:, -1, 0, 0])

    @jax.jit
    def estimates(shift):
        def rewards(moved):
            return reward(flow.sample(velocity(moved, shift), noise, stochastic, counted, noise_level=LEVEL).x)

        def logps(moved):
            x = flow.sample(velocity(shift, shift), noise, stochastic, counted, noise_level=LEVEL).x
            return flow.chain_logp(velocity(moved, shift), x, stochastic, counted, noise_level=LEVEL)

        f, pathwise = jax.jvp(rewards, (shift,), (1.0,))
        _, scores = jax.jvp(logps, (shift,), (1.0,))
        return pathwise, (f - f.mean()) * scores, scores

    pathwise, scored, scores = (np.asarray(y, float) for y in estimates(shift))
    assert abs(scores.mean()) < 5 * scores.std() / np.sqrt(n)  # a density's score has mean zero
    error = np.hypot(pathwise.std(), scored.std()) / np.sqrt(n)
    assert abs(pathwise.mean() - scored.mean()) < 5 * error
    assert abs(pathwise.mean()) > 10 * error  # there is something to agree on
