"""The flow-matching sampler as a policy with a density: Flow-SDE (method: sections 1 and 2).

Pure functions, arrays in, arrays out. openpi's time: t = 1 is noise, t = 0 is data; x_t = t·ε + (1 − t)·a, v = ε − a.
Means, scales and log-probabilities are float32 whatever the model computes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

Velocity = Callable[[Array, Array], Array]  # (x [..., H, A], t [...]) -> v [..., H, A]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """One denoising run: everything that the density of its actions depends on. Leading axes are samples."""

    x: Float[Array, "*N K1 H A"]  # x_0 (noise) … x_K (the action chunk), K1 = K + 1
    stochastic: Bool[Array, "*N K"]  # which of the K steps drew noise
    logp: Float[Array, "*N"]  # log-probability of the stochastic steps over the counted coordinates


def times(steps: int) -> Float[Array, " K"]:
    """The time at which each of `steps` denoising steps starts: 1, 1 − 1/K, …, 1/K."""
    return 1.0 - jnp.arange(steps, dtype=jnp.float32) / steps


def noise_scale(t: Float[Array, "*N"], steps: int, noise_level: float) -> Array:
    """σ_t = a·√(t / (1 − t)); at t = 1 the denominator is that of the next grid time, so σ_1 = a·√K."""
    return noise_level * jnp.sqrt(t / jnp.maximum(1.0 - t, 1.0 / steps))


def transition(
    x: Float[Array, "*N H A"], v: Float[Array, "*N H A"], t: Float[Array, "*N"], steps: int, noise_level: float
) -> tuple[Array, Array]:
    """Mean and standard deviation of one stochastic step from t to t − Δ, which keeps every marginal of the ODE.

    μ = x − Δ·[v + σ²/(2t)·(x + (1 − t)·v)], std = σ·√Δ (method: section 2).

    Args:
        x, v: [..., H, A] the state and its velocity.
        t: [...] the time of each sample.
    Returns:
        mean [..., H, A] and std [..., 1, 1] (σ_t·√Δ), float32.
    """
    dt = 1.0 / steps
    x, v, t = (jnp.asarray(y, jnp.float32) for y in (x, v, t))
    t = t[..., None, None]
    sigma = noise_scale(t, steps, noise_level)
    mean = x - dt * (v + sigma**2 / (2.0 * t) * (x + (1.0 - t) * v))
    return mean, sigma * jnp.sqrt(dt)


def stochastic_steps(rng: np.random.Generator, steps: int, sde_steps: str, last_step: str) -> Bool[np.ndarray, " K"]:
    """Which steps of one sample draw noise.

    `sde_steps="all"`: each; `"one"`: one index drawn uniformly. `last_step="ode"` takes the last step out of both.
    """
    candidates = steps - 1 if last_step == "ode" else steps
    index = np.arange(steps)
    if sde_steps == "all":
        return index < candidates
    return index == rng.integers(candidates)


def step_logp(
    x_next: Float[Array, "*N H A"],
    mean: Float[Array, "*N H A"],
    std: Float[Array, "*N 1 1"],
    counted: Bool[Array, "H A"],
) -> Float[Array, "*N"]:
    """log N(x_next; mean, std²), summed over the counted coordinates."""
    per_coordinate = -0.5 * ((x_next - mean) / std) ** 2 - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
    return jnp.sum(jnp.where(counted, per_coordinate, 0.0), axis=(-2, -1))


def reduce_logp(
    total: Float[Array, "*N"], stochastic: Bool[Array, "*N K"], counted: Bool[Array, "H A"], reduce: str
) -> Float[Array, "*N"]:
    """The sum over steps and coordinates (a density), or its mean over all these terms (a surrogate)."""
    if reduce == "sum":
        return total
    return total / jnp.maximum(jnp.sum(stochastic, axis=-1) * jnp.sum(counted), 1)


def sample(
    velocity: Velocity,
    noise: Float[Array, "*N K1 H A"],
    stochastic: Bool[Array, "*N K"],
    counted: Bool[Array, "H A"],
    *,
    noise_level: float,
    reduce: str = "sum",
) -> Chain:
    """Runs K denoising steps. A sample's deterministic steps are Euler steps of the ODE and have no density.

    Args:
        velocity: the policy.
        noise: standard normal draws: [0] is x_0, [k + 1] drives step k. With no stochastic step only [0] is used.
        stochastic: which steps draw noise; all false is the ODE sampler.
        counted: coordinates that enter the log-probability.
    """

    def step(held: None, x: Array, t: Array) -> tuple[Array, None]:
        return velocity(x, jnp.broadcast_to(t, x.shape[:-2])), held

    grid = times(stochastic.shape[-1])
    return sample_in_steps(step, None, grid, noise, stochastic, counted, noise_level=noise_level, reduce=reduce)


def sample_in_steps(
    velocity: Callable[[Any, Float[Array, "*N H A"], Any], tuple[Float[Array, "*N H A"], Any]],
    held: Any,
    rows: Any,
    noise: Float[Array, "*N K1 H A"],
    stochastic: Bool[Array, "*N K"],
    counted: Bool[Array, "H A"],
    *,
    noise_level: float,
    reduce: str = "sum",
) -> Chain:
    """`sample` by a velocity that holds something from step to step and is told each step's row instead of its time.

    Args:
        velocity: (held, x, row) -> (v, held).
        held: what the first step is handed.
        rows: a tree of arrays [K, …].
    """
    steps = stochastic.shape[-1]
    noise = jnp.asarray(noise, jnp.float32)

    def step(carry: tuple[Any, Array, Array], inputs: tuple[Any, ...]) -> tuple[tuple[Any, Array, Array], Array]:
        held, x, logp = carry
        row, t_scalar, z, drawn = inputs
        t = jnp.broadcast_to(t_scalar, drawn.shape)
        v, held = velocity(held, x, row)
        v = jnp.asarray(v, jnp.float32)
        mean, std = transition(x, v, t, steps, noise_level)
        wide = drawn[..., None, None]
        x_next = jnp.where(wide, mean + std * z, x - v / steps)
        # A deterministic step is scored at a point of density, then left out: no NaN can reach the gradient.
        scored = step_logp(jnp.where(wide, x_next, mean), mean, std, counted)
        return (held, x_next, logp + jnp.where(drawn, scored, 0.0)), x_next

    first = noise[..., 0, :, :]
    inputs = (rows, times(steps), jnp.moveaxis(noise[..., 1:, :, :], -3, 0), jnp.moveaxis(stochastic, -1, 0))
    (_, _, logp), xs = jax.lax.scan(step, (held, first, jnp.zeros(first.shape[:-2], jnp.float32)), inputs)
    x = jnp.concatenate([first[..., None, :, :], jnp.moveaxis(xs, 0, -3)], axis=-3)
    return Chain(x=x, stochastic=stochastic, logp=reduce_logp(logp, stochastic, counted, reduce))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The S denoising steps of stored chains that a density is taken of. Leading axes are samples."""

    before: Float[Array, "*N S H A"]
    after: Float[Array, "*N S H A"]
    t: Float[Array, "*N S"]  # the time at which each starts
    stochastic: Bool[Array, "*N S"]  # a step that drew no noise has no density


def most_stochastic(steps: int, sde_steps: str, last_step: str) -> int:
    """How many of the K steps of a sample `stochastic_steps` may choose."""
    return 1 if sde_steps == "one" else steps - (last_step == "ode")


def chain_steps(x: Float[Array, "*N K1 H A"], stochastic: Bool[Array, "*N K"], most: int | None = None) -> Steps:
    """The steps of stored chains; with `most`, those alone that drew noise, where no chain has more of them."""
    x = jnp.asarray(x, jnp.float32)
    t = jnp.broadcast_to(times(stochastic.shape[-1]), stochastic.shape)
    steps = Steps(x[..., :-1, :, :], x[..., 1:, :, :], t, stochastic)
    if most in (None, stochastic.shape[-1]):
        return steps
    index = jnp.argsort(~stochastic, axis=-1, stable=True)[..., :most]
    wide = index[..., None, None]
    return Steps(
        jnp.take_along_axis(steps.before, wide, axis=-3),
        jnp.take_along_axis(steps.after, wide, axis=-3),
        jnp.take_along_axis(t, index, axis=-1),
        jnp.take_along_axis(stochastic, index, axis=-1),
    )


def chain_transitions(
    velocity: Velocity, steps: Steps, total: int, *, noise_level: float
) -> tuple[Float[Array, "*N S H A"], Float[Array, "*N S 1 1"]]:
    """Mean and standard deviation of the steps under `velocity`, as stochastic ones; `total` is K.

    `velocity` sees a chain's steps at once: x [*N, S, H, A], t [*N, S].
    """
    return transition(steps.before, velocity(steps.before, steps.t), steps.t, total, noise_level)


def transitions_logp(
    steps: Steps,
    mean: Float[Array, "*N S H A"],
    std: Float[Array, "*N S 1 1"],
    counted: Bool[Array, "H A"],
    reduce: str = "sum",
) -> Float[Array, "*N"]:
    """log π of stored chains from the `chain_transitions` of a policy."""
    after = jnp.where(steps.stochastic[..., None, None], steps.after, jax.lax.stop_gradient(mean))
    scored = step_logp(after, mean, std, counted)
    total = jnp.sum(jnp.where(steps.stochastic, scored, 0.0), axis=-1)
    return reduce_logp(total, steps.stochastic, counted, reduce)


def chain_logp(
    velocity: Velocity,
    x: Float[Array, "*N K1 H A"],
    stochastic: Bool[Array, "*N K"],
    counted: Bool[Array, "H A"],
    *,
    noise_level: float,
    reduce: str = "sum",
    most: int | None = None,
) -> Float[Array, "*N"]:
    """log π of stored chains under `velocity`, which sees a chain's steps at once; `most` as in `chain_steps`."""
    steps = chain_steps(x, stochastic, most)
    mean, std = chain_transitions(velocity, steps, stochastic.shape[-1], noise_level=noise_level)
    return transitions_logp(steps, mean, std, counted, reduce)


def transitions_kl(
    mean: Float[Array, "*N S H A"],
    other: Float[Array, "*N S H A"],
    std: Float[Array, "*N S 1 1"],
    stochastic: Bool[Array, "*N S"],
    counted: Bool[Array, "H A"],
    reduce: str = "sum",
) -> Float[Array, "*N"]:
    """KL between two policies' transitions from the same states: ‖μ − μ'‖² / (2σ²Δ), for both have the same std.

    Over the stochastic steps and counted coordinates, reduced as the log-probability is.
    """
    per_coordinate = 0.5 * ((mean - other) / std) ** 2
    per_step = jnp.sum(jnp.where(counted, per_coordinate, 0.0), axis=(-2, -1))
    return reduce_logp(jnp.sum(jnp.where(stochastic, per_step, 0.0), axis=-1), stochastic, counted, reduce)


def entropy(stochastic: Bool[np.ndarray, "*N K"], counted: int, noise_level: float) -> Float[np.ndarray, "*N"]:
    """Differential entropy in nats of a chain's stochastic steps: ½ log(2πe·σ²Δ) for each counted coordinate. NumPy.

    The policy moves the steps' means alone, so this follows from the noise level and the steps drawn.
    """
    steps = stochastic.shape[-1]
    t = 1.0 - np.arange(steps) / steps
    variance = noise_level**2 * t / np.maximum(1.0 - t, 1.0 / steps) / steps
    return counted * np.sum(np.where(stochastic, 0.5 * np.log(2.0 * np.pi * np.e * variance), 0.0), axis=-1)


def training_pair(
    actions: Float[Array, "*N H A"], noise: Float[Array, "*N H A"], t: Float[Array, "*N"]
) -> tuple[Array, Array]:
    """x_t and the target velocity of flow matching: t·ε + (1 − t)·a and ε − a (method: section 1)."""
    wide = t[..., None, None]
    return wide * noise + (1.0 - wide) * actions, noise - actions


def training_times(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """t ~ Beta(1.5, 1)·0.999 + 0.001, as openpi trains."""
    # Beta(1.5, 1) has the distribution function t^1.5, so its quantile function is u^(2/3).
    return jax.random.uniform(key, shape) ** (1.0 / 1.5) * 0.999 + 0.001
