"""Attention of a denoising step in one GPU kernel: rotation, logits, softmax and the weighted sum.

A step on few chunks is a row of kernels of some microseconds each. Here a program takes a few tokens of a chunk with
all their heads, walks over the prefix's keys and the chunk's own, and keeps a running softmax (as in FlashAttention,
arXiv 2205.14135): nothing is written but the result. Written in Pallas, compiled by Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from z1_jax.models.attention import MASKED_LOGIT

# Tokens of a chunk for one program: as many as leave a large GPU (132 multiprocessors) something to do, at least two:
# with eight heads the 16 rows that a tensor core wants.
TOKENS = (8, 4, 2)
PROGRAMS = 128
KEYS = 64  # that a program looks at at once


def takes(heads: int, cache: tuple[int, ...]) -> bool:
    """Whether the kernel is written for such sizes; `cache`: shape of the prefix cache's keys."""
    kv_heads, width = cache[-2:]
    return kv_heads == 1 and TOKENS[-1] * heads >= 16 and heads & (heads - 1) == 0 and width & (width - 1) == 0


def chunk_attention(
    qkv: Float[Array, "B R X D"],
    tables: tuple[Float[Array, "B R 1 D/2"], Float[Array, "B R 1 D/2"]],
    prefix_k: Float[Array, "layers B T 1 D"],
    prefix_v: Float[Array, "layers B T 1 D"],
    prefix_mask: Bool[Array, "B T"],
    *,
    layer: int,
    length: int,
    horizon: int,
) -> Float[Array, "B R N D"]:
    """Each token of each chunk attends to the prefix and to its own chunk. On a CPU it is interpreted, for tests.

    Args:
        qkv: N query heads, one key head and one value head of each token, not rotated; R tokens: chunks of `length`,
            of which the first `horizon` are real. N and D are powers of two.
        tables: of `rope_tables`, [B, R, 1, D/2].
        layer: of the prefix cache.
    """
    batch, rows, heads, width = qkv.shape
    sin, cos = (table[:, :, 0] for table in tables)
    fitting = [count for count in TOKENS if length % count == 0]
    tokens = next((count for count in fitting if batch * rows // count >= PROGRAMS), fitting[-1])
    kernel = functools.partial(
        _kernel, tokens, heads=heads - 2, layer=layer, prefix=prefix_k.shape[2], length=length, horizon=horizon
    )

    def call(interpret: bool, *arrays: Array) -> Array:
        return pl.pallas_call(
            kernel,
            grid=(batch, rows // tokens),
            out_shape=jax.ShapeDtypeStruct((batch, rows, heads - 2, width), qkv.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=8 if tokens * heads > 64 else 4, num_stages=2),
            interpret=interpret,
            name="chunk_attention",
        )(*arrays)

    arrays = qkv, sin, cos, prefix_k, prefix_v, prefix_mask.astype(jnp.int32)
    return jax.lax.platform_dependent(
        *arrays, cpu=functools.partial(call, True), default=functools.partial(call, False)
    )


def _kernel(
    count: int, qkv: Any, sin: Any, cos: Any, prefix_k: Any, prefix_v: Any, mask: Any, out: Any, *,
    heads: int, layer: int, prefix: int, length: int, horizon: int,
) -> None:  # fmt: skip
    b, first = pl.program_id(0), pl.program_id(1) * count
    only, key_head, value_head = jnp.int32(0), jnp.int32(heads), jnp.int32(heads + 1)
    width = out.shape[-1]
    half = width // 2
    chunk = first // length * length  # where the program's chunk begins

    def rotated(start: Any, number: int, head: Any, known: Array | None = None) -> tuple[Array, Array]:
        """The halves of rotated heads, in the dtype of the computation; zeros where tokens are not known."""
        tokens = pl.ds(start, number)
        given: dict[str, Any] = {} if known is None else {"mask": known[:, None], "other": 0.0}
        x, y = (plgpu.load(qkv.at[b, tokens, head, pl.ds(at, half)], **given).astype(jnp.float32) for at in (0, half))
        s, c = (plgpu.load(table.at[b, tokens, :], **given) for table in (sin, cos))
        if x.ndim == 3:
            s, c = s[:, None], c[:, None]
        return (x * c - y * s).astype(qkv.dtype), (y * c + x * s).astype(qkv.dtype)

    q = [(part * width**-0.5).reshape(count * heads, half) for part in rotated(first, count, pl.ds(0, heads))]

    def look(carry: tuple[Array, Array, Array], keys: tuple[Array, ...], values: Array, allowed: Array) -> Any:
        total, largest, weight = carry
        logits = plgpu.dot(q[0], keys[0], trans_b=True) + plgpu.dot(q[1], keys[1], trans_b=True)
        logits = jnp.where(allowed[None, :], logits, MASKED_LOGIT)
        now = jnp.maximum(largest, jnp.max(logits, axis=1))
        shrunk, weights = jnp.exp(largest - now), jnp.exp(logits - now[:, None])
        total = total * shrunk[:, None] + plgpu.dot(weights.astype(values.dtype), values)
        return total, now, weight * shrunk + jnp.sum(weights, axis=1)

    def at_prefix(i: Any, carry: Any) -> Any:
        tokens, there = pl.ds(i * KEYS, KEYS), i * KEYS + jnp.arange(KEYS) < prefix
        wide = there[:, None]
        keys = tuple(
            plgpu.load(prefix_k.at[jnp.int32(layer), b, tokens, only, pl.ds(at, half)], mask=wide, other=0.0)
            for at in (0, half)
        )
        values = plgpu.load(prefix_v.at[jnp.int32(layer), b, tokens, only, :], mask=wide, other=0.0)
        allowed = plgpu.load(mask.at[b, tokens], mask=there, other=0) != 0
        return look(carry, keys, values, allowed)

    def at_chunk(i: Any, carry: Any) -> Any:
        allowed = i * KEYS + jnp.arange(KEYS) < horizon
        keys = rotated(chunk + i * KEYS, KEYS, key_head, allowed)
        values = plgpu.load(qkv.at[b, pl.ds(chunk + i * KEYS, KEYS), value_head, :], mask=allowed[:, None], other=0.0)
        return look(carry, keys, values, allowed)

    rows = count * heads
    carry = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), MASKED_LOGIT, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, pl.cdiv(horizon, KEYS), at_chunk, carry)  # first: a row that may look at something
    total, _, weight = jax.lax.fori_loop(0, pl.cdiv(prefix, KEYS), at_prefix, carry)
    attended = (total / weight[:, None]).astype(out.dtype).reshape(count, heads, width)
    plgpu.store(out.at[b, pl.ds(first, count), :, :], attended)
