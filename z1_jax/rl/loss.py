"""The clipped GRPO objective over deduplicated nodes. Pure functions."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def node_objective(
    ratio: Float[Array, " N"],
    positive: Float[Array, " N"],
    negative: Float[Array, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Array, " N"]:
    """Σ_i min(ρ·A_i, clip(ρ, 1 − η, 1 + η)·A_i) over the members of each node, from their signed sums.

    All members of a node share ρ, so the sum is A⁺·min(ρ, 1 + η) + A⁻·max(ρ, 1 − η): exact (method: section 4).

    Args:
        ratio: ρ = π_θ / π_old of the node's chunk.
        positive, negative: A⁺ ≥ 0 and A⁻ ≤ 0 of the node.
    """
    return positive * jnp.minimum(ratio, 1.0 + clip_high) + negative * jnp.maximum(ratio, 1.0 - clip_low)


def grpo_loss(
    logp: Float[Array, " N"],
    logp_old: Float[Array, " N"],
    positive: Float[Array, " N"],
    negative: Float[Array, " N"],
    valid: Array,
    normaliser: Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Array, dict[str, Array]]:
    """−(1 / normaliser)·Σ node objective, and the diagnostics of this batch as sums and maxima.

    Args:
        valid: bool [N]; false at padding, which contributes nothing.
        normaliser: Σ_i |B_i| of the whole optimiser step: all micro-batches, groups and devices.
    Returns:
        The loss and {"ratio_sum", "ratio_max", "ratio_error", "clipped", "kl_sum", "nodes"}; `kl_sum` is
        Schulman's k3 estimator of KL(old ‖ new), summed.
    """
    log_ratio = jnp.where(valid, logp - logp_old, 0.0)
    ratio = jnp.exp(log_ratio)
    objective = node_objective(ratio, positive, negative, clip_low, clip_high)
    loss = -jnp.sum(jnp.where(valid, objective, 0.0)) / normaliser
    clipped = ((ratio > 1.0 + clip_high) & (positive > 0)) | ((ratio < 1.0 - clip_low) & (negative < 0))
    stats = {
        "ratio_sum": jnp.sum(jnp.where(valid, ratio, 0.0)),
        "ratio_max": jnp.max(jnp.where(valid, ratio, 0.0)),
        "ratio_error": jnp.max(jnp.where(valid, jnp.abs(ratio - 1.0), 0.0)),
        "clipped": jnp.sum((clipped & valid).astype(jnp.float32)),
        "kl_sum": jnp.sum(jnp.where(valid, ratio - 1.0 - log_ratio, 0.0)),
        "nodes": jnp.sum(valid.astype(jnp.float32)),
    }
    return loss, stats
