"""The two Gemma stacks of π0.5: the language model that encodes the prefix, and the action expert.

They have the same depth and attention shape. The expert attends to the language model's keys and values. These do not
depend on the actions, so the language model runs once per observation and hands over nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from z1_jax.models import attention
from z1_jax.models.compute import Compute
from z1_jax.models.layers import (
    AdaRMSNorm,
    Einsum,
    GatedMlp,
    RMSNorm,
    dense,
    rope_tables,
    rotate,
    scan_layers,
    time_embedding,
)
from z1_jax.models.params import Init, param
from z1_jax.sharding import constrain
from z1_jax.types import PrefixCache

Tables = tuple[Float[Array, "B ... 1 D/2"], Float[Array, "B ... 1 D/2"]]  # of `rope_tables`
Attend = Callable[[Array, Array, Array], Array]  # rotated and scaled queries, rotated keys, values -> outputs


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Size of one Gemma stack."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"gemma {name} must be positive; got {value}")
        if self.depth < 2:
            raise ValueError(f"gemma depth must be at least 2; got {self.depth}")
        if self.heads % self.kv_heads:
            raise ValueError(f"gemma heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"gemma head_dim must be even (rotary halves); got {self.head_dim}")


class GemmaBlock(nnx.Module):
    """Attention and gated MLP; with `adaptive`, norms and residual gates follow a condition."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool, layers: int | None = None):
        width, heads, kv_heads, head_dim = config.width, config.heads, config.kv_heads, config.head_dim
        norm: Any = AdaRMSNorm if adaptive else RMSNorm
        self.norm_attention = norm(width, layers=layers)
        self.norm_mlp = norm(width, layers=layers)
        by_input = Init(width**-0.5)
        q_shape, q_axes = (heads, width, head_dim), ("heads", "embed", None)
        self.q = Einsum("...d,ndh->...nh", q_shape, q_axes, by_input, layers=layers)
        kv_shape, kv_axes = (2, kv_heads, width, head_dim), (None, "kv_heads", "embed", None)
        self.kv = Einsum("...d,ckdh->c...kh", kv_shape, kv_axes, by_input, layers=layers)
        out_shape, out_axes = (heads, head_dim, width), ("heads", None, "embed")
        by_heads = Init((heads * head_dim) ** -0.5)
        self.out = Einsum("...nh,nhd->...d", out_shape, out_axes, by_heads, layers=layers)
        self.mlp = GatedMlp(width, config.mlp, layers=layers)
        self.query_scale = head_dim**-0.5

    def adapt(self, rank: int, alpha: float) -> None:
        """Adds low-rank adapters to the kernels of attention and MLP."""
        for linear in (self.q, self.kv, self.out, self.mlp):
            linear.adapt(rank, alpha)

    def keys_values(self, h: Float[Array, "B ... W"], tables: Tables) -> tuple[Array, Array]:
        """Rotated keys and values `[B, ..., K, D]` of normalised inputs."""
        k, v = self.kv(h)
        return constrain(rotate(k, tables), "batch"), constrain(v, "batch")

    def __call__(
        self,
        x: Float[Array, "B ... W"],
        tables: Tables,
        attend: Attend,
        condition: Float[Array, "B M W"] | None = None,
    ) -> tuple[Float[Array, "B ... W"], tuple[Array, Array]]:
        """The block's output, and its own rotated keys and values."""
        middle = (None,) * (x.ndim - 2)
        h, gate = self.norm_attention(x, condition)
        q = constrain(rotate(self.q(h), tables) * self.query_scale, "batch", *middle, "heads")
        k, v = self.keys_values(h, tables)
        x = _add_residual(x, self.out(attend(q, k, v)), gate)
        h, gate = self.norm_mlp(x, condition)
        return _add_residual(x, self.mlp(h), gate), (k, v)


def _add_residual(x: Array, y: Array, gate: Array | None) -> Array:
    return constrain(x + constrain(y, "batch") * (1 if gate is None else gate), "batch")


class LanguageModel(nnx.Module):
    """Gemma as π0.5 uses it: embeds the prompt, and turns prefix tokens into keys and values.

    The last layer is kept apart from the stack: only its keys and values can reach the actions, so nothing else of it
    is computed. Its other weights and the final norm are kept so that checkpoints are complete; their gradients are 0.
    """

    def __init__(
        self,
        config: GemmaConfig,
        vocab_size: int,
        compute: Compute,
    ):
        self.config, self.compute = config, compute
        self.embedding = param((vocab_size, config.width), ("vocab", "embed"), Init(config.width**-0.5))
        self.layers = GemmaBlock(config, adaptive=False, layers=config.depth - 1)
        self.last = GemmaBlock(config, adaptive=False)
        self.norm = RMSNorm(config.width)

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L W"]:
        """Embedded tokens, scaled by sqrt(width), in the compute dtype."""
        rows = self.embedding[...][tokens].astype(jnp.float32)
        return constrain((rows * self.config.width**0.5).astype(self.compute.dtype), "batch")

    def keys_values(
        self, x: Float[Array, "B T W"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "layers B T K D"], Float[Array, "layers B T K D"]]:
        """Rotated keys and values of every layer. Those of masked tokens are meaningless and must not be read."""
        tables = rope_tables(prefix_positions(mask), self.config.head_dim, mask.shape[1])

        def attend(q: Array, k: Array, v: Array) -> Array:
            return attention.attend(q, k, v, mask, self.compute.attention)

        def step(layer: GemmaBlock, x: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            return layer(x, tables, attend)

        x, (k, v) = scan_layers(self.layers, step, x, self.compute)
        last_k, last_v = self.last.keys_values(self.last.norm_attention(x)[0], tables)
        return jnp.concatenate([k, last_k[None]]), jnp.concatenate([v, last_v[None]])


def prefix_positions(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each prefix token: valid ones count up from 0, masked ones do not count."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1


class ActionExpert(nnx.Module):
    """Velocity of noisy action chunks, given the prefix cache and the flow time."""

    def __init__(
        self,
        config: GemmaConfig,
        action_dim: int,
        compute: Compute,
    ):
        width = config.width
        self.config, self.compute = config, compute
        self.action_in = dense(action_dim, width, (None, "embed"), keep_float32=True)
        self.time_in = dense(width, width, ("embed", None), keep_float32=True)
        self.time_out = dense(width, width, ("embed", None), keep_float32=True)
        self.layers = GemmaBlock(config, adaptive=True, layers=config.depth)
        self.norm = AdaRMSNorm(width)
        small = Init(0.1 * width**-0.5)  # a fresh policy starts near zero velocity
        self.action_out = dense(width, action_dim, ("embed", None), init=small, keep_float32=True)

    def condition(self, t: Float[Array, "B M"]) -> Float[Array, "B M W"]:
        """The adaRMS condition of the flow time, in float32."""
        h = constrain(jax.nn.swish(self.time_in(time_embedding(t, self.config.width))), "batch")
        return constrain(jax.nn.swish(self.time_out(h)), "batch")

    def __call__(
        self, cache: PrefixCache, x_t: Float[Array, "B M H A"], t: Float[Array, "B M"]
    ) -> Float[Array, "B M H A"]:
        """Velocity in float32; see `Pi05.velocity`."""
        condition = self.condition(t)
        prefix_length = jnp.sum(cache.mask.astype(jnp.int32), axis=1)
        positions = prefix_length[:, None, None] + jnp.arange(x_t.shape[2], dtype=jnp.int32)
        tables = rope_tables(positions, self.config.head_dim, cache.mask.shape[1] + x_t.shape[2])
        x = constrain(self.action_in(x_t.astype(jnp.float32)).astype(self.compute.dtype), "batch")

        def step(layer: GemmaBlock, x: Array, prefix: tuple[Array, Array]) -> tuple[Array, None]:
            def attend(q: Array, k: Array, v: Array) -> Array:
                return attention.attend_shared_prefix(q, k, v, *prefix, cache.mask, self.compute.attention)

            return layer(x, tables, attend, condition)[0], None

        x, _ = scan_layers(self.layers, step, x, self.compute, (cache.k, cache.v))
        x, _ = self.norm(x, condition)
        return constrain(self.action_out(x.astype(jnp.float32)), "batch")
