"""Attention within the prefix, and of M action chunks to one shared prefix. Queries come rotated and scaled."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from z1_jax.sharding import on_one_device

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
        full_mask = None
        if mask is not None:  # cuDNN wants a row of it for every query
            full_mask = jnp.broadcast_to(mask[:, None, None, :], (mask.shape[0], 1, q.shape[1], mask.shape[1]))
        return _library(q, k, v, full_mask, implementation)
    rows = q[:, None]  # one chunk
    return _ungroup(_over_blocks(_group(rows, k.shape[2]), (k,), (v,), mask), rows.shape)[:, 0]


def _library(q: Array, k: Array, v: Array, mask: Array | None, implementation: str) -> Array:
    name: Any = implementation
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, implementation=name)


def attend_in_order(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B X S"],
    implementation: str = "einsum",
) -> Float[Array, "B T N D"]:
    """`attend` with queries in token order: with a single key head nothing has to be moved before or after it.

    `mask` has a row for all queries (X = 1) or one for each (X = T).
    """
    batch, length, heads, width = q.shape
    if implementation != "einsum":
        wide = jnp.broadcast_to(mask[:, None], (batch, 1, length, k.shape[1]))
        return _library(q, k, v, wide, implementation)
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    logits = _in_float32("btkgd,bskd->bktgs", grouped, k)
    logits = jnp.where(mask[:, None, :, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bktgs,bskd->bktgd", weights, v)
    return jnp.moveaxis(out, 1, 2).reshape(q.shape)


def attend_in_rows(
    q: Float[Array, "T B N D"], k: Float[Array, "S B N D"], v: Float[Array, "S B N D"], implementation: str = "einsum"
) -> Float[Array, "T B N D"]:
    """`attend` without a mask and with a key head for each head, the batch behind the tokens.

    The heads of all samples then lie at one stride, so that a library's batched product takes them as they are.
    """
    if implementation != "einsum":
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
        return jnp.swapaxes(_library(q, k, v, None, implementation), 0, 1)
    weights = jax.nn.softmax(_in_float32("tbnd,sbnd->bnts", q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,sbnd->tbnd", weights, v)


def attend_in_parts(
    q: Float[Array, "B Q D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    mask: Bool[Array, "B X S"],
    heads: int,
    tokens: int,
    parts: int,
) -> Float[Array, "P B T N D"]:
    """Attention to a single key head, in P parts of the keys, which are to be added up.

    Queries stand in the order of `attend_in_order`, then rows of padding up to Q. `mask` has a row for all tokens
    (X = 1) or one for each (X = T); S is a multiple of P.
    """
    batch, _, width = q.shape
    logits = _in_float32("bxd,bsd->bxs", q, k)[:, : tokens * heads].reshape(batch, tokens, heads, -1)
    logits = jnp.where(mask[:, :, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(batch, tokens * heads, parts, -1)
    out = jnp.einsum("bxps,bpsd->pbxd", weights, v.reshape(batch, parts, -1, width))
    return out.reshape(parts, batch, tokens, heads, width)


def _in_float32(pattern: str, left: Array, right: Array) -> Array:
    """A product in float32, of bfloat16 factors as such whatever the default precision.

    Widened where it is differentiated, it would cost a GPU a twentieth of an SFT step, for digits that are dropped.
    """
    precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else None
    return jnp.einsum(pattern, left, right, precision=precision, preferred_element_type=jnp.float32)


def _after_prefix(prefix: Float[Array, "B T K D"], own: Float[Array, "B M H K D"]) -> Float[Array, "B S K D"]:
    """Keys or values of the prefix, then those of all chunks."""
    flat = own.reshape(own.shape[0], -1, *own.shape[3:])
    return jnp.concatenate([prefix.astype(own.dtype), flat], axis=1)


def chunk_mask(prefix: Bool[Array, "B T"], chunks: int, length: int, horizon: int, room: int) -> Bool[Array, "B X S"]:
    """Which keys the queries of M chunks may attend to: the prefix's, and those of their own chunk.

    Args:
        chunks: M; each has `length` queries, of which the first `horizon` are real.
        room: number of keys behind the prefix's: those of the chunks, one after the other, then padding that is masked.
    Returns:
        A row for each query; a single row if there is one chunk.
    """
    key = jnp.arange(room)
    chunk = jnp.arange(chunks * length if chunks > 1 else 1) // length
    own = (key // length == chunk[:, None]) & (key % length < horizon)
    batch = prefix.shape[0]
    prefix = jnp.broadcast_to(prefix[:, None], (batch, len(chunk), prefix.shape[1]))
    return jnp.concatenate([prefix, jnp.broadcast_to(own, (batch, *own.shape))], axis=2)


def _group(q: Float[Array, "B M H N D"], kv_heads: int) -> Float[Array, "B K X D"]:
    """Queries that share a key head, one after the other: one large product per key head.

    On one device they stand in token order (X = M x H x N/K): with a single key head, as π0.5 has, nothing is moved.
    Across devices the heads come before a chunk's tokens (X = M x N/K x H). Neither order crosses chunks.
    """
    batch, chunks, horizon, heads, width = q.shape
    q = jnp.moveaxis(q.reshape(batch, chunks, horizon, kv_heads, -1, width), 3, 1)
    return (q if on_one_device() else jnp.swapaxes(q, 3, 4)).reshape(batch, kv_heads, -1, width)


def _ungroup(x: Float[Array, "B K X D"], shape: tuple[int, ...]) -> Float[Array, "B M H N D"]:
    batch, chunks, horizon, heads, width = shape
    kv_heads = x.shape[1]
    if on_one_device():
        x = x.reshape(batch, kv_heads, chunks, horizon, -1, width)
    else:
        x = jnp.swapaxes(x.reshape(batch, kv_heads, chunks, -1, horizon, width), 3, 4)
    return jnp.moveaxis(x, 1, 3).reshape(shape)


def attend_shared_prefix(
    q: Float[Array, "B M H N D"],
    k: Float[Array, "B M H K D"],
    v: Float[Array, "B M H K D"],
    prefix_k: Float[Array, "B T K D"],
    prefix_v: Float[Array, "B T K D"],
    prefix_mask: Bool[Array, "B T"],
    implementation: str = "einsum",
) -> Float[Array, "B M H N D"]:
    """M independent chunks per observation, each attending to itself and to the observation's prefix.

    The prefix is never copied M times. "einsum" reads it in place, with one softmax over prefix and chunk together.
    "xla" and "cudnn" put all chunks into one call and mask the keys of other chunks (see `attend`).
    """
    batch, chunks, horizon, heads, width = q.shape
    if implementation != "einsum":
        keys, values = _after_prefix(prefix_k, k), _after_prefix(prefix_v, v)
        allowed = chunk_mask(prefix_mask, chunks, horizon, horizon, chunks * horizon)
        flat = q.reshape(batch, -1, heads, width)
        return attend_in_order(flat, keys, values, allowed, implementation).reshape(q.shape)
    flat = _group(q, k.shape[3])  # every query: the prefix is read once
    out = _over_blocks(flat, (prefix_k.astype(q.dtype), k), (prefix_v.astype(v.dtype), v), prefix_mask)
    return _ungroup(out, q.shape)


@jax.custom_vjp
def _over_blocks(
    q: Float[Array, "B K X D"],
    keys: tuple[Float[Array, "..."], ...],
    values: tuple[Float[Array, "..."], ...],
    mask: Bool[Array, "B S"] | None,
) -> Float[Array, "B K X D"]:
    """Attention with one softmax over blocks of keys that are never put together.

    A block [B, S, K, D] is for all queries, one [B, M, H, K, D] holds the own keys of M chunks of H queries each; the
    rows of a key head come chunk by chunk then. `mask` is the first block's.

    The backward pass is written out, with the sum over keys of weight times its gradient taken as that of output times
    its gradient (Dao et al. 2022, FlashAttention, appendix B.2): a sum over D numbers instead of all keys. Rows are
    divided by the softmax's sum where they have D numbers too.
    """
    return _forward(q, keys, values, mask)[0]


def _forward(q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], mask: Array | None) -> tuple[Array, Any]:
    logits = [_product("q,k->w", k, q, k) for k in keys]
    if mask is not None:
        logits[0] = jnp.where(mask[:, None, None, :], logits[0], MASKED_LOGIT)
    largest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in logits])
    exponentials = [jnp.exp(x - largest) for x in logits]
    total = _sum([jnp.sum(x, axis=-1, keepdims=True) for x in exponentials])
    weights = [x.astype(v.dtype) for x, v in zip(exponentials, values, strict=True)]
    out = _sum([_product("w,k->q", v, w, v) for w, v in zip(weights, values, strict=True)]) / total
    out = out.astype(q.dtype)
    return out, (q, keys, values, out, weights, total)


def _sum(parts: list[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _backward(kept: Any, gradient: Float[Array, "B K X D"]) -> tuple[Any, ...]:
    q, keys, values, out, weights, total = kept
    gradient = (gradient / total).astype(q.dtype)  # of weights before they are divided by their sum
    # Of the same rounded numbers as the products below, so that the two cancel.
    shift = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
    to_q, to_keys, to_values = [], [], []
    for k, v, w in zip(keys, values, weights, strict=True):
        to_values.append(_product("w,q->k", v, w, gradient).astype(v.dtype))
        to_logits = (w * (_product("q,k->w", v, gradient, v) - shift)).astype(q.dtype)
        to_q.append(_product("w,k->q", k, to_logits, k))
        to_keys.append(_product("w,q->k", k, to_logits, q).astype(k.dtype))
    return _sum(to_q).astype(q.dtype), tuple(to_keys), tuple(to_values), None


_over_blocks.defvjp(_forward, _backward)

# Dimensions of queries, of keys or values, and of weights, by how many a block has.
_LETTERS = {
    4: {"q": "bkxd", "k": "bskd", "w": "bkxs"},
    5: {"q": "bkmxd", "k": "bmskd", "w": "bkmxs"},
}


def _product(kinds: str, block: Array, left: Array, right: Array) -> Float[Array, "..."]:
    """A product over a block of keys in float32, such as "q,k->w" of queries and keys; rows are [B, K, X, …]."""

    def apart(kind: str, x: Array) -> Array:
        whole = kind == "k" or block.ndim == 4
        return x if whole else x.reshape(*x.shape[:2], block.shape[1], -1, x.shape[-1])

    first, second, result = kinds[0], kinds[2], kinds[-1]
    letters = _LETTERS[block.ndim]
    pattern = f"{letters[first]},{letters[second]}->{letters[result]}"
    out = _in_float32(pattern, apart(first, left), apart(second, right))
    return out if result == "k" else out.reshape(*out.shape[:2], -1, out.shape[-1])
