"""The Flow-SDE sampler against exact velocity fields, scipy's densities and hand loops in float64."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from z1_jax.rl import flow

MODES = [(sde, last) for sde in ("all", "one") for last in ("sde", "ode")]
STEPS, HORIZON, WIDTH = 5, 4, 3
ONE, ALL = jnp.ones((1, 1), bool), jnp.ones((HORIZON, WIDTH), bool)


def exact_velocity(x, t, weights, means, stds):
    """E[ε − a | x_t = x] where a is drawn from a mixture of normals and ε from N(0, 1)."""
    t = t[..., None, None, None]
    x = x[..., None]
    variance = t**2 + ((1 - t) * stds) ** 2
    centred = x - (1 - t) * means
    log_weight = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * centred**2 / variance
    mean_data = means + (1 - t) * stds**2 / variance * centred
    data = jnp.sum(jax.nn.softmax(log_weight, axis=-1) * mean_data, axis=-1)
    t, x = t[..., 0], x[..., 0]
    return (x - (1 - t) * data) / t - data


def one_mode(x, t):
    return exact_velocity(x, t, jnp.array([1.0]), jnp.array([2.0]), jnp.array([0.5]))


def chosen_steps(rng, samples, steps, sde_steps, last_step):
    return np.stack([flow.stochastic_steps(rng, steps, sde_steps, last_step) for _ in range(samples)])


def draw(velocity, rng, samples, steps, sde_steps, last_step, noise_level=0.5):
    noise = rng.standard_normal((samples, steps + 1, 1, 1), np.float32)
    chosen = chosen_steps(rng, samples, steps, sde_steps, last_step)
    chain = jax.jit(lambda n, s: flow.sample(velocity, n, s, ONE, noise_level=noise_level))(noise, chosen)
    return np.asarray(chain.x[:, -1, 0, 0])


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_marginal_of_one_normal_is_kept(rng, sde_steps, last_step):
    n = 60_000
    x = draw(one_mode, rng, n, 200, sde_steps, last_step)
    # Five standard errors, and 0.003 for the finite number of steps.
    assert abs(x.mean() - 2.0) < 5 * 0.5 / np.sqrt(n) + 0.003
    assert abs(x.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * n) + 0.003


def test_flipped_sign_of_the_correction_does_not_keep_it(rng):
    """The same loop, written out with either sign: −1 is the sign trap, and it shows."""

    velocity = jax.jit(one_mode)

    def run(sign):
        steps, x = 200, rng.normal(size=10_000)
        for k in range(steps):
            t, dt = 1 - k / steps, 1 / steps
            v = np.asarray(velocity(x[:, None, None], np.full(len(x), t)))[:, 0, 0]
            sigma = 0.5 * np.sqrt(t / max(1 - t, dt))
            x = (
                x
                - dt * (v + sign * sigma**2 / (2 * t) * (x + (1 - t) * v))
                + sigma * np.sqrt(dt) * rng.normal(size=len(x))
            )
        return x.std()

    assert run(+1) == pytest.approx(0.5, abs=0.02)
    assert run(-1) == pytest.approx(1.7, abs=0.15)


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_random_mixture_is_kept(rng, sde_steps, last_step):
    """Kolmogorov-Smirnov distance to the mixture's own distribution function, for both kinds of both switches."""
    weights = rng.dirichlet([4, 4])
    means, stds = np.array([-1.5, 1.5]) + rng.normal(0, 0.3, 2), rng.uniform(0.3, 0.6, 2)
    n = 20_000
    x = draw(
        lambda x, t: exact_velocity(x, t, jnp.asarray(weights), jnp.asarray(means), jnp.asarray(stds)),
        rng,
        n,
        200,
        sde_steps,
        last_step,
    )

    def mixture(y):
        return sum(w * stats.norm.cdf(y, m, s) for w, m, s in zip(weights, means, stds, strict=True))

    distance = stats.ks_1samp(x, mixture).statistic
    assert distance < 2.2 / np.sqrt(n) + 0.008  # p < 1e-4, and the error of 200 steps
    assert stats.ks_1samp(x + 0.1, mixture).statistic > 2.2 / np.sqrt(n) + 0.008  # the test can fail


def test_noise_scale():
    for steps, level in ((4, 0.5), (10, 0.7)):
        sigma = np.asarray(flow.noise_scale(flow.times(steps), steps, level))
        assert sigma[0] == pytest.approx(level * np.sqrt(steps), rel=1e-6)
        for k in range(1, steps):
            t = 1 - k / steps
            assert sigma[k] == pytest.approx(level * np.sqrt(t / (1 - t)), rel=1e-5)


def test_times_are_the_ode_grid():
    np.testing.assert_allclose(flow.times(4), [1.0, 0.75, 0.5, 0.25])


def test_mean_equals_the_form_of_data_and_noise_estimates(rng):
    """μ = x̂0·(1 − (t − Δ)) + x̂1·((t − Δ) − σ²Δ/(2t)), at t = 1 too."""
    steps, level = 6, 0.6
    dt = 1 / steps
    x, v = rng.normal(size=(2, steps, HORIZON, WIDTH)).astype("f")
    mean, std = flow.transition(x, v, flow.times(steps), steps, level)
    for k in range(steps):
        t = 1 - k * dt
        sigma2 = level**2 * t / max(1 - t, dt)
        data, noise = x[k] - t * v[k], x[k] + (1 - t) * v[k]
        expected = data * (1 - (t - dt)) + noise * ((t - dt) - sigma2 * dt / (2 * t))
        np.testing.assert_allclose(mean[k], expected, rtol=2e-5, atol=2e-5)
        assert float(std[k].squeeze()) == pytest.approx(np.sqrt(sigma2 * dt), rel=1e-5)


def test_half_precision_inputs_are_computed_in_float32(rng):
    x, v = rng.normal(size=(2, HORIZON, WIDTH)).astype("f")
    low = [jnp.asarray(y, jnp.bfloat16) for y in (x, v)]
    mean, std = flow.transition(*low, jnp.float32(0.5), 4, 0.5)
    exact, _ = flow.transition(*(y.astype(jnp.float32) for y in low), jnp.float32(0.5), 4, 0.5)
    assert mean.dtype == std.dtype == jnp.float32
    np.testing.assert_array_equal(mean, exact)


# A velocity with parameters that any library can compute.
def velocity_of(theta, xp):
    return lambda x, t: theta[0] * xp.tanh(x + theta[1]) + theta[2] * t[..., None, None] * x


def reference_logp(theta, x, stochastic, counted, level, reduce):
    """The log-probability of one chain: scipy and loops in float64, every term on its own."""
    steps = len(stochastic)
    dt, terms = 1 / steps, []
    for k in range(steps):
        if not stochastic[k]:
            continue
        t = 1 - k * dt
        sigma = level * np.sqrt(t / max(1 - t, dt))
        v = velocity_of(theta, np)(x[k][None], np.array([t]))[0]
        for h in range(x.shape[1]):
            for d in range(x.shape[2]):
                if counted[h, d]:
                    drift = v[h, d] + sigma**2 / (2 * t) * (x[k, h, d] + (1 - t) * v[h, d])
                    mean = x[k, h, d] - dt * drift
                    terms.append(stats.norm.logpdf(x[k + 1, h, d], mean, sigma * np.sqrt(dt)))
    return sum(terms) / (len(terms) if reduce == "mean" else 1)


@pytest.fixture
def case(rng):
    """Random parameters, chains in mixed modes, and counted coordinates."""
    theta = rng.normal(size=3).astype("f")
    n = 6
    counted = rng.random((HORIZON, WIDTH)) < 0.6
    counted[0, 0] = True
    stochastic = rng.random((n, STEPS)) < 0.6
    stochastic[:, 2] = True
    stochastic[0] = True
    noise = rng.normal(size=(n, STEPS + 1, HORIZON, WIDTH)).astype("f")
    return theta, noise, stochastic, counted


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_logp_matches_scipy_and_the_sampler(case, reduce):
    theta, noise, stochastic, counted = case
    args = {"noise_level": 0.4, "reduce": reduce}
    chain = flow.sample(velocity_of(theta, jnp), noise, stochastic, counted, **args)
    expected = [
        reference_logp(theta.astype(float), np.asarray(x, float), s, counted, 0.4, reduce)
        for x, s in zip(chain.x, stochastic, strict=True)
    ]
    np.testing.assert_allclose(chain.logp, expected, rtol=1e-4, atol=1e-4)
    scored = jax.jit(lambda x: flow.chain_logp(velocity_of(theta, jnp), x, stochastic, counted, **args))(chain.x)
    np.testing.assert_allclose(scored, chain.logp, rtol=1e-5, atol=1e-4)
    assert np.ptp(expected) > 0.1  # the chains differ, so equality says something


def test_jit_changes_nothing(case):
    theta, noise, stochastic, counted = case

    def run(noise, stochastic):
        velocity = velocity_of(theta, jnp)
        chain = flow.sample(velocity, noise, stochastic, counted, noise_level=0.5)
        return chain, flow.chain_logp(velocity, chain.x, stochastic, counted, noise_level=0.5)

    plain, compiled = run(noise, stochastic), jax.jit(run)(noise, stochastic)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_the_ode_sampler_is_euler(case):
    theta, noise, stochastic, counted = case
    chain = flow.sample(velocity_of(theta, jnp), noise, np.zeros_like(stochastic), counted, noise_level=0.5)
    x = noise[:, 0].astype(float)
    for k in range(STEPS):
        x = x - velocity_of(theta.astype(float), np)(x, np.full(len(x), 1 - k / STEPS)) / STEPS
    np.testing.assert_allclose(chain.x[:, -1], x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(chain.logp, 0.0)


def test_only_counted_coordinates_matter(rng, case):
    theta, noise, stochastic, counted = case
    stochastic = np.ones_like(stochastic)
    x = np.array(flow.sample(velocity_of(theta, jnp), noise, stochastic, counted, noise_level=0.5).x)

    def score(x):
        return np.asarray(flow.chain_logp(velocity_of(theta, jnp), x, stochastic, counted, noise_level=0.5))

    before = score(x)
    moved = x.copy()
    moved[:, -1][:, ~counted] += rng.normal(size=(len(x), (~counted).sum()))
    np.testing.assert_array_equal(score(moved), before)
    moved[:, -1][:, counted] += 0.5
    assert (np.abs(score(moved) - before) > 1e-3).all()


def test_deterministic_steps_never_enter(rng, case):
    """Where a chain's last step is deterministic, neither its outcome nor the velocity there changes the density."""
    theta, noise, stochastic, counted = case
    stochastic = stochastic.copy()
    stochastic[:, -1] = False
    x = np.array(flow.sample(velocity_of(theta, jnp), noise, stochastic, counted, noise_level=0.5).x)

    def score(x, late):
        def velocity(y, t):
            return velocity_of(theta, jnp)(y, t) + late * (t[..., None, None] < 1.5 / STEPS)

        return flow.chain_logp(velocity, x, stochastic, counted, noise_level=0.5)

    moved = x.copy()
    moved[:, -1] += rng.normal(size=moved[:, -1].shape)
    np.testing.assert_array_equal(score(moved, 0.0), score(x, 0.0))
    np.testing.assert_array_equal(score(x, 3.0), score(x, 0.0))
    assert float(jax.grad(lambda late: score(x, late).sum())(0.0)) == 0.0


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_gradients_are_finite_in_every_mode(rng, sde_steps, last_step):
    """Through the sampler and through the score, also where a deterministic step lies far from its mean."""
    n = 8
    stochastic = chosen_steps(rng, n, STEPS, sde_steps, last_step)
    noise = rng.normal(size=(n, STEPS + 1, HORIZON, WIDTH)).astype("f")

    def sampled(theta):
        return flow.sample(velocity_of(theta, jnp), noise, stochastic, ALL, noise_level=0.5).logp.sum()

    def scored(theta, x):
        return flow.chain_logp(velocity_of(theta, jnp), x, stochastic, ALL, noise_level=0.5).sum()

    theta = jnp.asarray(rng.normal(size=3), jnp.float32)
    assert np.isfinite(jax.jit(jax.grad(sampled))(theta)).all()
    slope = jax.jit(jax.grad(scored))
    far = 1e6 * rng.normal(size=noise.shape).astype("f")
    assert np.isfinite(slope(theta, noise)).all() and np.isfinite(slope(theta, far)).all()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_steps_without_noise_need_no_velocity(rng, sde_steps, last_step, reduce):
    """The density of the steps that may draw noise, alone, is that of the chain: value and gradient."""
    n, most = 8, flow.most_stochastic(STEPS, sde_steps, last_step)
    stochastic = chosen_steps(rng, n, STEPS, sde_steps, last_step)
    assert most == stochastic.sum(axis=1).max()
    theta = jnp.asarray(rng.normal(size=3), jnp.float32)
    noise = rng.normal(size=(n, STEPS + 1, HORIZON, WIDTH)).astype("f")
    x = flow.sample(velocity_of(theta, jnp), noise, stochastic, ALL, noise_level=0.5).x
    evaluated = []

    def score(theta, most):
        def velocity(y, t):
            evaluated.append(y.shape[:-2])
            return velocity_of(theta, jnp)(y, t)

        return flow.chain_logp(velocity, x, stochastic, ALL, noise_level=0.5, reduce=reduce, most=most).sum()

    (value, slope), (whole, whole_slope) = (jax.value_and_grad(score)(theta + 0.1, count) for count in (most, None))
    assert evaluated == [(n, most), (n, STEPS)]
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(slope, whole_slope, rtol=1e-4, atol=1e-4 * np.abs(whole_slope).max())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradient_matches_finite_differences(case, reduce):
    theta, noise, stochastic, counted = case
    x = np.asarray(flow.sample(velocity_of(theta, jnp), noise, stochastic, counted, noise_level=0.5).x)
    theta = theta + 0.1

    def score(theta):
        return flow.chain_logp(velocity_of(theta, jnp), x, stochastic, counted, noise_level=0.5, reduce=reduce).sum()

    def reference(theta):
        return sum(
            reference_logp(theta, a.astype(float), s, counted, 0.5, reduce) for a, s in zip(x, stochastic, strict=True)
        )

    h = 1e-5
    slope = [(reference(theta + h * e) - reference(theta - h * e)) / (2 * h) for e in np.eye(3)]
    gradient = jax.jit(jax.grad(score))(jnp.asarray(theta))
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3 * np.abs(slope).max())


@pytest.mark.parametrize("last_step", ["sde", "ode"])
def test_one_step_index_per_sample_is_uniform(rng, last_step):
    n = 4000
    chosen = chosen_steps(rng, n, STEPS, "one", last_step)
    candidates = STEPS - (last_step == "ode")
    np.testing.assert_array_equal(chosen.sum(axis=1), 1)
    np.testing.assert_array_equal(chosen[:, candidates:], False)
    assert stats.chisquare(chosen[:, :candidates].sum(axis=0)).pvalue > 1e-6


def test_all_steps_but_a_deterministic_last():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(flow.stochastic_steps(rng, 4, "all", "sde"), [True] * 4)
    np.testing.assert_array_equal(flow.stochastic_steps(rng, 4, "all", "ode"), [True] * 3 + [False])


def test_training_times_have_the_reference_quantiles(rng):
    """Against quantiles of 0, 5, …, 100 % that were drawn with openpi's own sampler."""
    reference = np.load(pathlib.Path(__file__).parent / "reference" / "misc.npz")["time_beta_quantiles"]
    n = 400_000
    t = np.asarray(flow.training_times(jax.random.key(int(rng.integers(2**31))), (n,)))
    levels = np.linspace(0, 1, 21)[1:-1]
    exact = 0.001 + 0.999 * stats.beta(1.5, 1).ppf(levels)
    np.testing.assert_allclose(np.quantile(t, levels), exact, atol=4e-3)
    np.testing.assert_allclose(np.quantile(t, levels), reference[1:-1], atol=6e-3)
    assert 0.001 <= t.min() and t.max() <= 1.0


def test_training_pair(rng):
    actions, noise = rng.normal(size=(2, 3, HORIZON, WIDTH))
    t = np.array([0.0, 0.25, 1.0])
    x, target = flow.training_pair(actions, noise, t)
    np.testing.assert_allclose(x[0], actions[0])
    np.testing.assert_allclose(x[1], 0.25 * noise[1] + 0.75 * actions[1])
    np.testing.assert_allclose(x[2], noise[2])
    np.testing.assert_allclose(target, noise - actions)


def test_kl_between_transitions_equals_the_normal_distributions_own(rng):
    """E_p[log p − log q] from scipy's entropies, over the stochastic steps and counted coordinates alone."""
    steps, level = 4, 0.6
    x = rng.normal(size=(steps, HORIZON, WIDTH)).astype("f")
    t = flow.times(steps)
    (mean, std), (other, _) = (
        flow.transition(x, rng.normal(size=x.shape).astype("f"), t, steps, level) for _ in range(2)
    )
    stochastic, counted = np.array([True, False, True, True]), rng.random((HORIZON, WIDTH)) < 0.6
    expected = 0.0
    for k, h, d in np.argwhere(stochastic[:, None, None] & counted):
        m, n, s = (float(y) for y in (mean[k, h, d], other[k, h, d], std[k, 0, 0]))
        cross = -stats.norm(m, s).expect(lambda z, n=n, s=s: stats.norm.logpdf(z, n, s), lb=m - 9 * s, ub=m + 9 * s)
        expected += cross - stats.norm(m, s).entropy()
    got = flow.transitions_kl(mean, other, std, stochastic, counted)
    assert float(got) == pytest.approx(expected, rel=1e-4)
    number = stochastic.sum() * counted.sum()
    assert float(flow.transitions_kl(mean, other, std, stochastic, counted, "mean")) == (
        pytest.approx(expected / number, rel=1e-4)
    )


@pytest.mark.parametrize(("sde_steps", "last_step"), MODES)
def test_entropy_is_the_mean_log_density(rng, sde_steps, last_step):
    """−E log π over many chains of a fixed policy, and scipy's entropy of each transition."""
    n, steps, level = 4000, 4, 0.7
    chosen = chosen_steps(rng, n, steps, sde_steps, last_step)
    noise = rng.standard_normal((n, steps + 1, HORIZON, WIDTH), np.float32)
    logp = np.asarray(
        jax.jit(lambda z, s: flow.sample(lambda x, t: 0.3 * x, z, s, ALL, noise_level=level))(noise, chosen).logp
    )
    got = flow.entropy(chosen, HORIZON * WIDTH, level)
    assert abs(got.mean() + logp.mean()) < 5 * (got + logp).std() / np.sqrt(n)
    sigma = np.asarray(flow.noise_scale(flow.times(steps), steps, level)) * np.sqrt(1 / steps)
    one = sum(stats.norm(0, s).entropy() for s, drawn in zip(sigma, chosen[0], strict=True) if drawn)
    assert got[0] == pytest.approx(HORIZON * WIDTH * one, rel=1e-5)
