"""Attention over the prefix, and of M action chunks over one shared prefix. Queries arrive rotated and scaled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

IMPLEMENTATIONS = ("einsum", "xla", "cudnn")
MASKED_LOGIT = -2.3819763e38  # near the lowest float32; finite, so that a fully masked row stays free of NaN


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B S"] | None,
    implementation: str = "einsum",
) -> Float[Array, "B T N D"]:
    """Bidirectional attention; `N` is a multiple of `K`, and keys where `mask` is false are ignored.

    "einsum" is the reference, with float32 logits; "xla" and "cudnn" go through `jax.nn.dot_product_attention`
    (cudnn: GPU and bfloat16 only).
    """
    if implementation != "einsum":
        full_mask = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=full_mask, scale=1.0, implementation=implementation)
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, None, :], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def attend_shared_prefix(
    q: Float[Array, "B M H N D"],
    k: Float[Array, "B M H K D"],
    v: Float[Array, "B M H K D"],
    prefix_k: Float[Array, "B T K D"],
    prefix_v: Float[Array, "B T K D"],
    prefix_mask: Bool[Array, "B T"],
) -> Float[Array, "B M H N D"]:
    """M independent chunks per observation, each attending to itself and to the observation's prefix.

    The prefix is read where it lies, never repeated M times; one softmax runs over prefix and chunk together.
    """
    batch, chunks, horizon, heads, width = q.shape
    kv_heads, prefix_length = k.shape[3], prefix_k.shape[1]
    grouped = q.reshape(batch, chunks, horizon, kv_heads, heads // kv_heads, width)
    to_prefix = jnp.einsum(
        "bmhkgd,btkd->bkmght", grouped, prefix_k.astype(q.dtype), preferred_element_type=jnp.float32
    )
    to_prefix = jnp.where(prefix_mask[:, None, None, None, None, :], to_prefix, MASKED_LOGIT)
    to_chunk = jnp.einsum("bmhkgd,bmskd->bkmghs", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_chunk], axis=-1), axis=-1).astype(v.dtype)
    over_prefix, over_chunk = weights[..., :prefix_length], weights[..., prefix_length:]
    out = jnp.einsum("bkmght,btkd->bmhkgd", over_prefix, prefix_v.astype(v.dtype))
    return (out + jnp.einsum("bkmghs,bmskd->bmhkgd", over_chunk, v)).reshape(q.shape)
