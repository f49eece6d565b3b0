"""π0.5: SigLIP and Gemma encode an observation once; the action expert turns noise into action chunks.

Functional at its boundary: `split_model` gives plain pytrees, and jitted functions merge them inside `jax.jit`.
Knows neither losses, samplers, checkpoints nor environments.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from z1_jax.models.attention import IMPLEMENTATIONS
from z1_jax.models.gemma import ActionExpert, GemmaConfig, LanguageModel
from z1_jax.models.layers import REMAT_POLICIES
from z1_jax.models.siglip import Siglip, SiglipConfig
from z1_jax.sharding import constrain, param_sharding
from z1_jax.types import Observation, PrefixCache

DTYPES = ("float32", "bfloat16")
SCOPES = ("expert", "joint")
Part = Literal["vision", "language", "expert"]


@dataclasses.dataclass(frozen=True)
class Pi05Config:
    """Shape and compute settings of a π0.5 model. Parameters are float32."""

    vision: SiglipConfig
    language: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    cameras: int  # camera slots of an observation
    prompt_length: int  # tokens
    action_dim: int  # A, padding included
    horizon: int  # H, predicted control steps
    dtype: str = "bfloat16"  # of the computation
    remat: str = "none"  # activations kept for the backward pass: none (all) | dots | full (recompute all)
    unroll: bool = False  # write the layers out instead of looping: faster for a few small layers on a CPU
    attention: str = "einsum"  # of vision and prefix: einsum | xla | cudnn

    def __post_init__(self):
        for name in ("vocab_size", "cameras", "prompt_length", "action_dim", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name, allowed in (("dtype", DTYPES), ("remat", tuple(REMAT_POLICIES)), ("attention", IMPLEMENTATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("depth", "heads", "kv_heads", "head_dim"):
            language, expert = getattr(self.language, name), getattr(self.expert, name)
            if language != expert:
                raise ValueError(f"language model and expert must agree on {name}; got {language} and {expert}")
        if self.expert.width % 2:
            raise ValueError(f"expert width must be even (sines and cosines of the time); got {self.expert.width}")

    @property
    def prefix_length(self) -> int:
        """Tokens of a full prefix: every camera slot and the whole prompt."""
        return self.cameras * self.vision.tokens + self.prompt_length


class Pi05(nnx.Module):
    """The policy network: `encode_prefix` once per observation, then `velocity` for any number of chunks and times."""

    def __init__(self, config: Pi05Config):
        self.config = config
        common = {"dtype": config.dtype, "remat": config.remat, "unroll": config.unroll}
        prefix = {**common, "implementation": config.attention}
        self.vision = Siglip(config.vision, config.language.width, **prefix)
        self.language = LanguageModel(config.language, config.vocab_size, **prefix)
        self.expert = ActionExpert(config.expert, config.action_dim, **common)

    def image_tokens(self, images: Array) -> Float[Array, "B C P W"]:
        """Tokens of every camera slot of `images` [B, C, S, S, 3], by one pass of the vision tower.

        uint8 images are mapped from 0..255 to [-1, 1]; float images are taken to be there already.
        """
        size = self.config.vision.image_size
        if images.ndim != 5 or images.shape[2:] != (size, size, 3):
            raise ValueError(f"images must be [batch, cameras, {size}, {size}, 3]; got {images.shape}")
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255.0 * 2.0 - 1.0
        batch, cameras = images.shape[:2]
        tokens = self.vision(constrain(images.reshape(batch * cameras, size, size, 3), "batch"))
        return constrain(tokens.reshape(batch, cameras, *tokens.shape[1:]), "batch")

    def prefix_tokens(self, obs: Observation) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
        """The prefix and its mask: the image tokens of each camera slot in order, then the prompt.

        The numbers of cameras and of prompt tokens are those of `obs`: masked slots that no sample uses may be left
        out, which changes no velocity and saves their whole cost.
        """
        images = self.image_tokens(obs.images)
        batch, cameras, patches, width = images.shape
        prompt = self.language.embed(obs.tokens)
        tokens = jnp.concatenate([images.reshape(batch, cameras * patches, width), prompt], axis=1)
        mask = jnp.concatenate([jnp.repeat(obs.image_mask, patches, axis=1), obs.token_mask], axis=1)
        return constrain(tokens, "batch"), mask

    def encode_prefix(self, obs: Observation) -> PrefixCache:
        """Runs vision and language model: the keys and values that the action expert attends to."""
        tokens, mask = self.prefix_tokens(obs)
        k, v = self.language.keys_values(tokens, mask)
        return PrefixCache(constrain(k, None, "batch"), constrain(v, None, "batch"), mask)

    def velocity(
        self, cache: PrefixCache, x_t: Float[Array, "B M H A"], t: Float[Array, "B M"]
    ) -> Float[Array, "B M H A"]:
        """Velocity (noise minus data) of M independent noisy chunks per observation, in float32.

        `t` is the flow time of each chunk: 1 is noise, 0 is data. The M chunks of an observation share its cache row
        without copying it. Gradients flow through `cache`, so that training needs no other pass.
        """
        expected = (cache.mask.shape[0], t.shape[-1], x_t.shape[-2], self.config.action_dim)
        if t.ndim != 2 or x_t.shape != expected or t.shape != expected[:2]:
            raise ValueError(
                f"velocity needs x_t [B, M, H, {self.config.action_dim}] and t [B, M] for a cache of "
                f"B = {expected[0]}; got {x_t.shape} and {t.shape}"
            )
        return self.expert(cache, x_t, t)


def init_model(config: Pi05Config, seed: int | Array, mesh: Mesh | None = None) -> Pi05:
    """A freshly initialised model; `seed` is an int or a JAX key. With `mesh`, parameters are created sharded."""
    graphdef, abstract = nnx.split(abstract_model(config))
    words = np.asarray(seed if isinstance(seed, int) else jax.random.key_data(seed)).ravel().tolist()
    filled = []
    for path, variable in nnx.to_flat_state(abstract):
        value = _initial_value(variable, [*words, *"/".join(map(str, path)).encode()])
        sharding = None if mesh is None else param_sharding(variable, mesh).get_value()
        filled.append((path, variable.replace(jax.device_put(value, sharding))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _initial_value(variable: nnx.Variable, seed: list[int]) -> np.ndarray:
    # Drawn on the host: compiling a generator for every shape would take a small model half a minute. Seeded by the
    # parameter's path: the value depends neither on the order of declarations nor on devices.
    shape, init = variable.get_value().shape, variable.get_metadata("init")
    if init.std == 0:
        return np.full(shape, init.mean, np.float32)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= init.std
    return values if init.mean == 0 else values + np.float32(init.mean)


def abstract_model(config: Pi05Config) -> Pi05:
    """The model with `jax.ShapeDtypeStruct`s for parameters: nothing is allocated."""
    return Pi05(config)


def count_parameters(model: Pi05 | nnx.State) -> int:
    """Number of parameter entries of a model or state (abstract ones too)."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def part_of(path: tuple) -> Part:
    """Which part of the model a parameter path belongs to; "expert" includes action and time projections."""
    part = str(path[0])
    if part not in ("vision", "language", "expert"):
        raise ValueError(f"path {path} does not start at a part of the model: vision, language or expert")
    return part


def split_model(model: Pi05, scope: str, frozen_dtype: str | None = None) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graphdef, trainable, frozen)` for scope "expert" (vision and language frozen) or "joint" (nothing frozen).

    `frozen_dtype="bfloat16"` stores frozen weights in half the memory; norms, patch and position embeddings, which
    compute in float32, keep their dtype. `nnx.merge(graphdef, trainable, frozen)` puts the model together again.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    if frozen_dtype is not None and frozen_dtype not in DTYPES:
        raise ValueError(f"frozen_dtype must be None or one of {', '.join(DTYPES)}; got {frozen_dtype!r}")

    def is_trainable(path: tuple, _: object) -> bool:
        return scope == "joint" or part_of(path) == "expert"

    graphdef, trainable, frozen = nnx.split(model, is_trainable, ...)
    return graphdef, trainable, frozen if frozen_dtype is None else cast_state(frozen, frozen_dtype)


def cast_state(state: nnx.State, dtype: str) -> nnx.State:
    """`state` (abstract ones too) with every parameter in `dtype` but those declared to stay in float32."""

    def cast(variable: nnx.Variable) -> nnx.Variable:
        if variable.get_metadata("keep_float32"):
            return variable
        value = variable.get_value()
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        return variable.replace(value.update(dtype=jnp.dtype(dtype)) if abstract else value.astype(dtype))

    return jax.tree.map(cast, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def smooth_number_embedding(
    embedding: Float[Array, "V W"], token_ids: Int[Array, " N"], key: Array
) -> Float[Array, "V W"]:
    """`embedding` with the rows of consecutive numbers replaced by random Fourier features of their value.

    `token_ids` are the ids of -1, 0, …, 255 in order (the bins of the discretised state). Length scales are spread
    geometrically from 8 to 256 bins and the rows keep the table's root mean square, so that neighbouring bins start
    alike: a small policy trained from scratch need not learn each of them alone.
    """
    token_ids = jnp.asarray(token_ids)
    width = embedding.shape[1]
    scale_key, phase_key = jax.random.split(key)
    exponent = jax.random.uniform(scale_key, (width,), minval=np.log(8.0), maxval=np.log(256.0))
    phase = jax.random.uniform(phase_key, (width,), maxval=2 * np.pi)
    values = jnp.arange(token_ids.shape[0], dtype=jnp.float32) - 1.0
    features = jnp.sqrt(2.0) * jnp.sin(values[:, None] / jnp.exp(exponent) + phase)
    rms = jnp.sqrt(jnp.mean(jnp.square(embedding)))
    features *= rms / jnp.sqrt(jnp.mean(jnp.square(features)))
    return embedding.at[token_ids].set(features.astype(embedding.dtype))
