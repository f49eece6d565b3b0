"""Parameters prepared for acting, and decisions made with them: the same numbers from fewer and larger GPU kernels.

A decision on few observations consists of many small products. Between them a GPU waits while weights are sliced out of
the stacks, moved and modulated. The prepared form, made once from any policy, avoids that:

* one array for each layer, laid out as the products read it, in the dtype of the computation;
* q, k and v in one array, gate and up in one;
* the expert's adaRMS modulation for each denoising step, which depends on the time alone, as a table.

The layers are unrolled, rotations are tabulated once a call, and keys and values are written where attention reads
them. Where a product has few rows, its inner dimension is cut into parts, which whatever reads the product adds up: a
library would cut it too, and add up by a kernel of its own.

`Pi05.encode_prefix` and `Pi05.velocity` are the reference: results are equal up to rounding.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from z1_jax.models import attention
from z1_jax.models.gemma import GemmaBlock, prefix_positions
from z1_jax.models.layers import Einsum, layer_normalise, rms_normalise, rope_tables
from z1_jax.models.pi05 import Pi05, Pi05Config, normalised_images
from z1_jax.models.siglip import SiglipBlock, split_patches
from z1_jax.sharding import constrain, on_one_device, partition_spec
from z1_jax.types import Observation, PrefixCache

Prepared = dict[str, Any]  # a tree of arrays
# Logical axes by name, see sharding; every device holds the other arrays whole. Queries, keys and values of the Gemma
# stacks share one array, so they are not split over heads: a device would get parts of two kinds.
AXES: dict[str, tuple[str | None, ...]] = {
    "qkv": ("embed",),
    "kv": ("embed",),
    "three": ("embed", None, "heads"),
    "three_bias": (None, "heads"),
    "out": ("heads", None, "embed"),
    "gate_up": ("embed", None, "mlp"),
    "up": ("embed", "mlp"),
    "up_bias": ("mlp",),
    "down": ("mlp", "embed"),
    "head": ("embed",),
}
ROWS = 8  # products of bfloat16 want multiples of this many rows; XLA would pad each by a kernel of its own
# A product is cut into parts until it has ENOUGH tiles to fill half of a large GPU's multiprocessors, each part at
# least SHORTEST long.
TILE, ENOUGH, SHORTEST = 128, 64, 256
FEW_KEYS = 4096  # of all observations: so many keys and values are copied faster than a kernel starts


# --- preparing ------------------------------------------------------------------------------------------------------


def prepare_prefix(model: Pi05) -> Prepared:
    """The parameters that `encode_prefix` reads, except the token embedding, which stays as it is. No adapters."""
    vision, language, dtype = model.vision, model.language, jnp.dtype(model.config.dtype)
    tower, last, bias = vision.config, language.last, vision.head.bias
    assert bias is not None, "the vision tower's head has one"
    return {
        "patch_kernel": vision.patch_kernel[...].reshape(3 * tower.patch**2, tower.width),
        "position": vision.position[0] + vision.patch_bias[...],
        "vision": [_vision_layer(vision.layers, i, dtype) for i in range(tower.depth)],
        "vision_norm": (vision.norm.scale[...], vision.norm.bias[...]),
        "head": vision.head.kernel[...].astype(dtype),
        "head_bias": bias[...].astype(dtype),
        "language": [
            _gemma_layer(language.layers, i, dtype) | _scales(language.layers, i)
            for i in range(language.config.depth - 1)
        ],
        "last": {"norm": last.norm_attention.scale[...], "kv": _by_input(last.kv.kernel[...], dtype)},
    }


def prepare_expert(model: Pi05, times: Float[Array, " K"]) -> Prepared:
    """The parameters that `denoiser` reads when it acts at these times. The model has no adapters."""
    expert, dtype = model.expert, jnp.dtype(model.config.dtype)
    condition = expert.condition(times[None])[0].astype(dtype)  # [K, W]

    def table(modulation: Einsum) -> Float[Array, "K L 3W"]:
        kernel, bias = modulation.kernel[...].astype(dtype), modulation.bias[...].astype(dtype)  # type: ignore[index]
        kernel, bias = kernel.reshape(-1, *kernel.shape[-2:]), bias.reshape(-1, bias.shape[-1])
        return constrain(jnp.einsum("kd,ldf->klf", condition, kernel) + bias)

    norms = expert.layers.norm_attention, expert.layers.norm_mlp, expert.norm
    return {
        "action_in": (expert.action_in.kernel[...], expert.action_in.bias[...]),  # type: ignore[index]
        "action_out": (expert.action_out.kernel[...], expert.action_out.bias[...]),  # type: ignore[index]
        "layers": [_gemma_layer(expert.layers, i, dtype) for i in range(expert.config.depth)],
        "modulation": jnp.concatenate([table(norm.modulation) for norm in norms], axis=1),
    }


def place(shapes: Prepared, mesh: Mesh) -> Prepared:
    """The tree of shapes with shardings."""

    def of(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
        sharding = NamedSharding(mesh, partition_spec(leaf.shape, AXES.get(name, ()), mesh.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(of, shapes)


def _vision_layer(block: SiglipBlock, i: int, dtype: Any) -> Prepared:
    def taken(parameter: Any) -> Array:
        return parameter[i].astype(dtype)

    three = block.q, block.k, block.v
    return {
        "norm_attention": (block.norm_attention.scale[i], block.norm_attention.bias[i]),
        "norm_mlp": (block.norm_mlp.scale[i], block.norm_mlp.bias[i]),
        "three": jnp.stack([taken(x.kernel) for x in three], axis=1),  # [W, 3, N, D]
        "three_bias": jnp.stack([taken(x.bias) for x in three]),
        "out": taken(block.out.kernel),
        "out_bias": taken(block.out.bias),
        "up": taken(block.mlp.up.kernel),
        "up_bias": taken(block.mlp.up.bias),
        "down": taken(block.mlp.down.kernel),
        "down_bias": taken(block.mlp.down.bias),
    }


def _scales(block: GemmaBlock, i: int) -> Prepared:
    return {"norm_attention": block.norm_attention.scale[i], "norm_mlp": block.norm_mlp.scale[i]}


def _gemma_layer(block: GemmaBlock, i: int, dtype: Any) -> Prepared:
    q = jnp.moveaxis(block.q.kernel[i].astype(dtype), 0, 1)
    return {
        "qkv": jnp.concatenate([q, _by_input(block.kv.kernel[i], dtype)], axis=1),  # [W, N + 2 K, D]
        "out": block.out.kernel[i].astype(dtype),  # [N, D, W]
        "gate_up": jnp.moveaxis(block.mlp.gate_up[i].astype(dtype), 0, 1),  # [W, 2, F]
        "down": block.mlp.down[i].astype(dtype),
    }


def _by_input(kv: Float[Array, "2 K W D"], dtype: Any) -> Float[Array, "W 2K D"]:
    kv = kv.astype(dtype)
    return jnp.moveaxis(kv.reshape(-1, *kv.shape[2:]), 0, 1)


# --- the prefix -----------------------------------------------------------------------------------------------------


def encode_prefix(
    config: Pi05Config, params: Prepared, embedding: Float[Array, "V W"], obs: Observation
) -> PrefixCache:
    """As `Pi05.encode_prefix`; `embedding` is the table of token embeddings."""
    images = _image_tokens(config, params, obs.images)
    batch, cameras, patches, width = images.shape
    rows = embedding[obs.tokens].astype(jnp.float32)
    prompt = (rows * width**0.5).astype(images.dtype)
    x = constrain(jnp.concatenate([images.reshape(batch, cameras * patches, width), prompt], axis=1), "batch")
    mask = jnp.concatenate([jnp.repeat(obs.image_mask, patches, axis=1), obs.token_mask], axis=1)
    tables = _rotation_tables(prefix_positions(mask), config.language.head_dim, mask.shape[1])
    keys, values = [], []
    for layer in params["language"]:
        h = _rms_norm(x, layer["norm_attention"])
        q, k, v = _rotated(config, _product(h, layer["qkv"]), tables)
        k, v = jax.lax.optimization_barrier((k, v))  # else every layer's product would be kept for the stack below
        attended = attention.attend_in_order(q, k, v, mask[:, None], config.attention)
        x = constrain(x + _product(attended, layer["out"], 2), "batch")
        x = constrain(x + _gated_mlp(_rms_norm(x, layer["norm_mlp"]), layer), "batch")
        keys.append(k)
        values.append(v)
    kv = _product(_rms_norm(x, params["last"]["norm"]), params["last"]["kv"])
    keys.append(constrain(_rotate(kv[:, :, : config.language.kv_heads], tables), "batch"))
    values.append(constrain(kv[:, :, config.language.kv_heads :], "batch"))
    return PrefixCache(constrain(jnp.stack(keys), None, "batch"), constrain(jnp.stack(values), None, "batch"), mask)


def _image_tokens(config: Pi05Config, params: Prepared, images: Array) -> Float[Array, "B C P W"]:
    """Rows stand in the order patch, image: so the heads of all images lie at one stride, and nothing is moved."""
    batch, cameras = images.shape[:2]
    flat = constrain(normalised_images(images).reshape(-1, *images.shape[2:]), "batch")
    patches = jnp.swapaxes(split_patches(flat, config.vision.patch), 0, 1)
    x = _product(patches, params["patch_kernel"]) + params["position"][:, None]
    x = constrain(x, None, "batch").astype(config.dtype)
    scale = (config.vision.width // config.vision.heads) ** -0.5
    for layer in params["vision"]:
        h = _layer_norm(x, layer["norm_attention"])
        three, bias = layer["three"], layer["three_bias"]
        if on_one_device():  # the library adds a vector by itself
            qkv = _product(h, three.reshape(len(three), -1)) + bias.reshape(-1)
            qkv = qkv.reshape(*qkv.shape[:2], *bias.shape)
        else:  # heads lie on several
            qkv = _product(h, three) + bias
        q, k, v = (constrain(qkv[:, :, i], None, "batch", "heads") for i in range(3))
        attended = attention.attend_in_rows(q * scale, k, v, config.attention)
        x = constrain(x + (_product(attended, layer["out"], 2) + layer["out_bias"]), None, "batch")
        hidden = _product(_layer_norm(x, layer["norm_mlp"]), layer["up"]) + layer["up_bias"]
        hidden = jax.nn.gelu(hidden, approximate=True)
        x = constrain(x + (_product(hidden, layer["down"]) + layer["down_bias"]), None, "batch")
    tokens = _product(_layer_norm(x, params["vision_norm"]), params["head"]) + params["head_bias"]
    tokens = constrain(jnp.swapaxes(tokens, 0, 1), "batch")
    return constrain(tokens.reshape(batch, cameras, *tokens.shape[1:]), "batch")


# --- denoising ------------------------------------------------------------------------------------------------------

Step = Callable[[Any, Array, Array], tuple[Array, Any]]
# Of a layer: its index, the product of `qkv` [B, R, N + 2 K, D] and what the layer holds -> attended [S, B, R, N, D] in
# S parts to be added up, what the layer holds then.
Attend = Callable[[int, Array, Any], tuple[Array, Any]]


def denoiser(config: Pi05Config, params: Prepared, cache: PrefixCache, chunks: int) -> tuple[Step, Any]:
    """The velocity of M = `chunks` chunks of each observation, as `Pi05.velocity` gives it.

    Returns:
        A function of what the step before handed on, x_t [B, M, H, A] and the row of `params["modulation"]` of its
        time, to the velocity [B, M, H, A] and what it hands on; and what the first step is handed.
    """
    horizon, depth = config.horizon, config.expert.depth
    padded = _round_up(horizon)
    attend, held = (_by_copies if _is_small(config, cache, chunks) else _by_buffers)(config, cache, chunks)

    def step(held: list[Any], x_t: Array, modulation: Array) -> tuple[Array, list[Any]]:
        batch = x_t.shape[0]
        rows = jnp.pad(x_t.astype(jnp.float32), [(0, 0), (0, 0), (0, padded - horizon), (0, 0)])
        x = _affine(rows.reshape(batch, chunks * padded, -1), *params["action_in"]).astype(config.dtype)
        handed = []
        for i, (layer, kept) in enumerate(zip(params["layers"], held, strict=True)):
            h, gate = _modulated(x, modulation[i])
            attended, kept = attend(i, _product_in_parts(h[None], layer["qkv"]), kept)
            # The residual is added up twice, within the kernels of the norm and of the next sum: XLA, were it to see
            # that both are one, would add it up in a kernel of its own.
            parts = _cut_product(attended, layer["out"], 2)
            both = parts, jax.lax.optimization_barrier(parts)
            x, again = (constrain(x + _summed(one, x) * gate, "batch") for one in both)
            h, gate = _modulated(again, modulation[depth + i])
            x = constrain(x + _product_in_parts(_hidden(h, layer)[None], layer["down"]) * gate, "batch")
            handed.append(kept)
        x, _ = _modulated(x, modulation[2 * depth])
        kernel, bias = params["action_out"]
        velocity = constrain(_product_in_parts(x.astype(jnp.float32)[None], kernel) + bias, "batch")
        return velocity.reshape(batch, chunks, padded, -1)[:, :, :horizon], handed

    return step, held


def _is_small(config: Pi05Config, cache: PrefixCache, chunks: int) -> bool:
    """Whether `_by_copies` suits: as many queries as keys at most, and few of both."""
    queries, keys = chunks * _round_up(config.horizon) * config.expert.heads, _key_room(config, cache, chunks)
    simple = config.attention == "einsum" and config.expert.kv_heads == 1 and on_one_device()
    return simple and queries <= keys and cache.mask.shape[0] * keys <= FEW_KEYS


def _key_room(config: Pi05Config, cache: PrefixCache, chunks: int) -> int:
    """Keys of the prefix and all chunks, with padding: two parts of whole rows."""
    return _round_up(cache.mask.shape[1] + chunks * _round_up(config.horizon), 2 * ROWS)


def _chunk_tables(config: Pi05Config, cache: PrefixCache, chunks: int) -> tuple[Array, Array]:
    padded = _round_up(config.horizon)
    positions = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)[:, None] + jnp.tile(jnp.arange(padded), chunks)
    return _rotation_tables(positions, config.expert.head_dim, cache.mask.shape[1] + padded)


def _by_copies(config: Pi05Config, cache: PrefixCache, chunks: int) -> tuple[Attend, list[Any]]:
    """Each step writes queries, all keys and all values at once: arrays of one shape, which one kernel can fill."""
    length, total = cache.mask.shape[1], _key_room(config, cache, chunks)
    tables, heads = _chunk_tables(config, cache, chunks), config.expert.heads
    allowed = attention.chunk_mask(cache.mask, chunks, _round_up(config.horizon), config.horizon, total - length)
    is_prefix = (jnp.arange(total) < length)[:, None]

    def padded(x: Float[Array, "B R D"], before: int) -> Float[Array, "B S D"]:
        return jnp.pad(x, [(0, 0), (before, total - before - x.shape[1]), (0, 0)])

    def attend(i: int, qkv: Array, held: tuple[()]) -> tuple[Array, tuple[()]]:
        batch, rows, _, width = qkv.shape
        q, k, v = _rotated(config, qkv, tables)
        prefix = (padded(stack[i, :, :, 0].astype(qkv.dtype), 0) for stack in (cache.k, cache.v))
        own = (padded(x[:, :, 0], length) for x in (k, v))
        keys, values = (jnp.where(is_prefix, before, after) for before, after in zip(prefix, own, strict=True))
        parts = min(2, _parts(batch * rows * heads, total, width))
        q = padded(q.reshape(batch, -1, width), 0)
        return attention.attend_in_parts(q, keys, values, allowed, heads, rows, parts), held

    return attend, [()] * config.expert.depth


def _by_buffers(config: Pi05Config, cache: PrefixCache, chunks: int) -> tuple[Attend, list[Any]]:
    """Each layer has a buffer with the prefix's keys and values, then the chunks', which each step overwrites.

    Lengths are multiples of `ROWS`.
    """
    length = cache.mask.shape[1]
    padded = _round_up(config.horizon)
    room = _round_up(length + chunks * padded) - length
    tables = _chunk_tables(config, cache, chunks)
    allowed = attention.chunk_mask(cache.mask, chunks, padded, config.horizon, room)

    def buffers(stacked: Float[Array, "layers B T K D"]) -> list[Array]:
        widths = [(0, 0), (0, room), (0, 0), (0, 0)]
        return [constrain(jnp.pad(layer.astype(config.dtype), widths), "batch") for layer in stacked]

    def attend(i: int, qkv: Array, held: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = _rotated(config, qkv, tables)
        keys = jax.lax.dynamic_update_slice_in_dim(held[0], k, length, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(held[1], v, length, axis=1)
        return attention.attend_in_order(q, keys, values, allowed, config.attention)[None], (keys, values)

    return attend, list(zip(buffers(cache.k), buffers(cache.v), strict=True))


def _round_up(count: int, unit: int = ROWS) -> int:
    return -(-count // unit) * unit


# --- parts of a layer -----------------------------------------------------------------------------------------------


def _product(x: Array, kernel: Array, contracted: int = 1) -> Array:
    """The product over the last dimensions of `x` and the first of the kernel."""
    return jnp.tensordot(x, kernel, contracted)


def _product_in_parts(x: Float[Array, "S B T ..."], kernel: Array, contracted: int = 1) -> Array:
    """`_product` of the sum of `x` over its first dimension, in the dtype of `x`; sums are float32 if there are any."""
    return _summed(_cut_product(x, kernel, contracted), x)


def _summed(parts: Float[Array, "P ..."], like: Array) -> Array:
    return constrain(functools.reduce(operator.add, list(parts)).astype(like.dtype), "batch")


def _cut_product(x: Float[Array, "S B T ..."], kernel: Array, contracted: int = 1) -> Float[Array, "P B T ..."]:
    """`_product_in_parts` before its P parts are added up; those of `x` become rows: the kernel is read once."""
    several, batch, rows = x.shape[:3]
    outputs = kernel.shape[contracted:]
    inner, columns = math.prod(kernel.shape[:contracted]), math.prod(outputs)
    parts = _parts(several * batch * rows, inner, columns)
    if several * parts == 1:
        return _product(x, kernel, contracted)
    cut, kernel = x.reshape(several * batch, rows, parts, -1), kernel.reshape(parts, -1, columns)
    found = jnp.einsum("btpk,pkf->pbtf", cut, kernel, preferred_element_type=jnp.float32)
    return found.reshape(parts * several, batch, rows, *outputs)


def _parts(rows: int, inner: int, columns: int) -> int:
    """Into how many parts a product's inner dimension is cut; 1 where a device holds only a share of the product."""
    tiles, parts = -(-rows // TILE) * -(-columns // TILE), 1
    if on_one_device():
        while tiles * parts < ENOUGH and inner >= 2 * SHORTEST * parts and inner % (2 * ROWS * parts) == 0:
            parts *= 2
    return parts


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    return constrain(_product(x, kernel) + bias, "batch")


def _rotated(config: Pi05Config, qkv: Float[Array, "B T X D"], tables: tuple[Array, Array]) -> tuple[Array, ...]:
    """Rotated and scaled queries, rotated keys, and values, out of one product."""
    heads, kv_heads = config.language.heads, config.language.kv_heads
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
    q = constrain(_rotate(q, tables) * config.language.head_dim**-0.5, "batch", None, "heads")
    return q, constrain(_rotate(k, tables), "batch"), constrain(v, "batch")


def _rotation_tables(
    positions: Array, width: int, longest: int
) -> tuple[Float[Array, "B T 1 2 D/2"], Float[Array, "B T 1 2 D/2"]]:
    """Cosines and signed sines for both halves, for `_rotate`; `longest` as for `rope_tables`."""
    sin, cos = rope_tables(positions, width, longest)
    return jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)


def _rotate(x: Float[Array, "B T N D"], tables: tuple[Array, Array]) -> Float[Array, "B T N D"]:
    """As `layers.rotate`, halves exchanged instead of put together: XLA puts them together by a kernel apart."""
    cos, sin = tables
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)


def _gated_mlp(h: Array, layer: Prepared) -> Array:
    return constrain(_product(_hidden(h, layer), layer["down"]), "batch")


def _hidden(h: Array, layer: Prepared) -> Array:
    gate_up = _product(h, layer["gate_up"])
    return jax.nn.gelu(gate_up[..., 0, :], approximate=True) * gate_up[..., 1, :]


def _rms_norm(x: Array, scale: Array) -> Array:
    return (rms_normalise(x) * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def _modulated(x: Float[Array, "B T W"], row: Float[Array, " 3W"]) -> tuple[Array, Array]:
    """The norm of `AdaRMSNorm`, its condition applied already; and the gate."""
    scale, shift, gate = jnp.split(row, 3)
    y = rms_normalise(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return y.astype(x.dtype), gate


def _layer_norm(x: Array, parameters: tuple[Array, Array]) -> Array:
    scale, bias = (p.astype(jnp.float32) for p in parameters)
    return (layer_normalise(x) * scale + bias).astype(x.dtype)
