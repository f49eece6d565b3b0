"""What an update minimises: a loss over deduplicated nodes, here that of clipped GRPO (method: section 3).

Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# An algorithm's loss: (logp, logp_old, inputs, valid, normaliser) → (loss, statistics of the batch).
#   logp, logp_old: float32 [N], of each node's chunk, now and under the policy that acted.
#   inputs: what the algorithm knows of each node, a tree of arrays [N, …].
#   valid, normaliser: as for `grpo_loss`. The loss is a sum over nodes, so that micro-batches add up to their batch.
# Statistics are sums over nodes, but those whose names end as in MAXIMA.
NodeLoss = Callable[[Array, Array, Any, Array, Array], tuple[Array, dict[str, Array]]]
MAXIMA = ("_max", "_error")


def grpo(clip_low: float, clip_high: float, ratio_max: float) -> NodeLoss:
    """`grpo_loss` for the update, with inputs {"positive": A⁺, "negative": A⁻}."""

    def node_loss(
        logp: Array, logp_old: Array, inputs: dict[str, Array], valid: Array, normaliser: Array
    ) -> tuple[Array, dict[str, Array]]:
        signed = inputs["positive"], inputs["negative"]
        return grpo_loss(logp, logp_old, *signed, valid, normaliser, clip_low, clip_high, ratio_max)

    return node_loss


def node_objective(
    ratio: Float[Array, " N"],
    positive: Float[Array, " N"],
    negative: Float[Array, " N"],
    clip_low: float,
    clip_high: float,
    ratio_max: float = 0.0,
) -> Float[Array, " N"]:
    """Σ_i min(ρ·A_i, clip(ρ, 1 − η, 1 + η)·A_i) over the members of each node, from their signed sums.

    All members of a node share ρ, so the sum is A⁺·min(ρ, 1 + η) + A⁻·max(ρ, 1 − η): exact (method: section 4).
    The dual clip (Ye et al. 2020) bounds a member with A_i < 0 from below by ratio_max·A_i. Such a term is
    max(A_i·max(ρ, 1 − η), ratio_max·A_i) = A_i·min(max(ρ, 1 − η), ratio_max), linear in A_i again: the sum stays exact.

    Args:
        ratio: ρ = π_θ / π_old of the node's chunk.
        positive, negative: A⁺ ≥ 0 and A⁻ ≤ 0 of the node.
        ratio_max: of the dual clip, above 1; 0: none.
    """
    against = jnp.maximum(ratio, 1.0 - clip_low)
    if ratio_max:
        against = jnp.minimum(against, ratio_max)
    return positive * jnp.minimum(ratio, 1.0 + clip_high) + negative * against


def grpo_loss(
    logp: Float[Array, " N"],
    logp_old: Float[Array, " N"],
    positive: Float[Array, " N"],
    negative: Float[Array, " N"],
    valid: Bool[Array, " N"],
    normaliser: Float[Array, ""],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_max: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """−(1 / normaliser)·Σ node objective, and the diagnostics of this batch as sums and maxima.

    Args:
        valid: bool [N]; false at padding, which contributes nothing.
        normaliser: Σ_i |B_i| of the whole optimiser step: all micro-batches, groups and devices.
    Returns:
        The loss and {"ratio_sum", "ratio_max", "ratio_error", "clipped", "clipped_positive", "clipped_negative",
        "kl_sum", "nodes"}; `kl_sum` is Schulman's k3 estimator of KL(old ‖ new), summed. A node is clipped where the
        gradient of its members of one sign, or the other, is cut off.
    """
    log_ratio = jnp.where(valid, logp - logp_old, 0.0)
    ratio = jnp.exp(log_ratio)
    objective = node_objective(ratio, positive, negative, clip_low, clip_high, ratio_max)
    loss = -jnp.sum(jnp.where(valid, objective, 0.0)) / normaliser
    beyond = (ratio > ratio_max) if ratio_max else jnp.zeros_like(valid)
    up = (ratio > 1.0 + clip_high) & (positive > 0) & valid
    down = ((ratio < 1.0 - clip_low) | beyond) & (negative < 0) & valid
    stats = {
        "ratio_sum": jnp.sum(jnp.where(valid, ratio, 0.0)),
        "ratio_max": jnp.max(jnp.where(valid, ratio, 0.0)),
        "ratio_error": jnp.max(jnp.where(valid, jnp.abs(ratio - 1.0), 0.0)),
        "clipped": jnp.sum((up | down).astype(jnp.float32)),
        "clipped_positive": jnp.sum(up.astype(jnp.float32)),
        "clipped_negative": jnp.sum(down.astype(jnp.float32)),
        "kl_sum": jnp.sum(jnp.where(valid, ratio - 1.0 - log_ratio, 0.0)),
        "nodes": jnp.sum(valid.astype(jnp.float32)),
    }
    return loss, stats


def reference_penalty(
    kl: Float[Array, " N"], members: Float[Array, " N"], valid: Bool[Array, " N"], normaliser: Float[Array, ""]
) -> Float[Array, ""]:
    """The mean KL to the reference over members' chunks: a node counts once for each member that shares it.

    Args:
        kl: of each node's chunk; members: how many share it; valid, normaliser: as for `grpo_loss`.
    """
    return jnp.sum(jnp.where(valid, members * kl, 0.0)) / normaliser
