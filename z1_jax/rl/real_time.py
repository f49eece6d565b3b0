"""Real-time chunking (Black et al. 2025, arXiv 2506.07339): the next chunk is sampled while the last one is executed.

Each function turns a velocity into another one for `flow.sample`, so that the new chunk continues the actions that are
already committed. Pure: arrays in, arrays out. The paper's time is τ = 1 − t and its velocity is −v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from z1_jax.rl.flow import Velocity

MAX_GUIDANCE = 5.0  # β: what the paper takes for five denoising steps


def soft_mask(
    horizon: int, delay: Int[np.ndarray, "*N"] | int, overlap: Int[np.ndarray, "*N"] | int
) -> Float[np.ndarray, "*N H"]:
    """How strongly each step of a new chunk is held to the chunk before it (equation 5). NumPy.

    Args:
        horizon: H, steps of a chunk.
        delay: d, steps that will have been executed when the new chunk is there: held fully, weight 1.
        overlap: L, steps that are left of the chunk before; d ≤ L ≤ H. From step d on the weight falls, with
            c = (L − i)/(L − d + 1), as c·(e^c − 1)/(e − 1); from step L on it is 0.
    """
    i = np.arange(horizon)
    delay, overlap = np.asarray(delay)[..., None], np.asarray(overlap)[..., None]
    c = np.clip((overlap - i) / (overlap - delay + 1), 0.0, 1.0)
    falling = c * np.expm1(c) / np.expm1(1.0)
    return np.where(i < delay, 1.0, falling).astype(np.float32)


def guidance_weight(t: Float[Array, "*N"], largest: float) -> Float[Array, "*N"]:
    """min(β, t/((1 − t)·r²)) with r² = t²/((1 − t)² + t²) (equations 2 and 4); β at both ends of time, t = 1 and 0."""
    below = t * (1.0 - t)
    return jnp.where(below > 0, jnp.minimum(largest, ((1.0 - t) ** 2 + t**2) / jnp.maximum(below, 1e-9)), largest)


def guided(
    velocity: Velocity, target: Float[Array, "*N H A"], weights: Float[Array, "*N H A"], largest: float = MAX_GUIDANCE
) -> Velocity:
    """The velocity under ΠGDM guidance towards `target` (equation 2): v − w(t)·Jᵀ(W ⊙ (target − x̂0)).

    x̂0 = x − t·v estimates the data. J = ∂x̂0/∂x enters by the velocity's vector-Jacobian product, so a call costs a
    forward and a backward pass. If all weights of a sample are 0, its velocity is unchanged.

    Args:
        target: the committed actions, normalised; any finite number where the weight is 0.
        weights: W, see `soft_mask`.
        largest: β, which the weight of the guidance is clipped to.
    """

    def with_guidance(x: Array, t: Array) -> Array:
        wide = t[..., None, None]

        def estimate(x: Array) -> tuple[Array, Array]:
            v = jnp.asarray(velocity(x, t), jnp.float32)
            return x - wide * v, v

        data, pull, v = jax.vjp(estimate, x, has_aux=True)
        (push,) = pull(weights * (target - data))
        return v - guidance_weight(wide, largest) * push

    return with_guidance


def overwritten(
    velocity: Velocity, noise: Float[Array, "*N H A"], target: Float[Array, "*N H A"], fixed: Bool[Array, "*N H A"]
) -> Velocity:
    """The velocity with hard overwriting, the control of `guided`: fixed coordinates go straight to their target.

    They start at `noise` (x_0 of the chain) and move with ε − target, so that at every t they are t·ε + (1 − t)·target.
    The model sees them so, and is free in the other coordinates.
    """

    def with_overwriting(x: Array, t: Array) -> Array:
        return jnp.where(fixed, noise - target, velocity(x, t))

    return with_overwriting
