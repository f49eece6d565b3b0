"""π0.5: SigLIP and Gemma encode an observation once; the action expert turns noise into action chunks.

Functional at its boundary: `split_model` gives plain pytrees, and jitted functions merge them inside `jax.jit`.
Knows neither losses, samplers, checkpoints nor environments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from z1_jax.models.choices import DTYPES, SCOPES
from z1_jax.models.compute import Compute
from z1_jax.models.gemma import ActionExpert, GemmaConfig, LanguageModel
from z1_jax.models.lora import is_adapter
from z1_jax.models.params import initialise
from z1_jax.models.siglip import Siglip, SiglipConfig
from z1_jax.sharding import constrain
from z1_jax.types import Observation, PrefixCache

Part = Literal["vision", "language", "expert"]


@dataclasses.dataclass(frozen=True)
class Pi05Config(Compute):
    """Shape and compute settings of a π0.5 model. Parameters are float32."""

    vision: SiglipConfig
    language: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    cameras: int  # camera slots of an observation
    prompt_length: int  # tokens
    action_dim: int  # A, padding included
    horizon: int  # H, predicted control steps

    def __post_init__(self):
        for name in ("vocab_size", "cameras", "prompt_length", "action_dim", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        super().__post_init__()
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


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return jnp.dtype(dtype).itemsize


def cache_bytes(config: Pi05Config, cameras: int | None = None, prompt_length: int | None = None) -> int:
    """Bytes of the prefix cache of one observation: keys, values and the mask.

    Args:
        cameras, prompt_length: of the observation; default: all slots that the model has.
    """
    cameras = config.cameras if cameras is None else cameras
    tokens = cameras * config.vision.tokens + (config.prompt_length if prompt_length is None else prompt_length)
    language = config.language
    return tokens * (2 * language.depth * language.kv_heads * language.head_dim * itemsize(config.dtype) + 1)


class Pi05(nnx.Module):
    """The policy network: `encode_prefix` once per observation, then `velocity` for any number of chunks and times."""

    def __init__(self, config: Pi05Config):
        self.config = config
        self.vision = Siglip(config.vision, config.language.width, config.compute)
        self.language = LanguageModel(config.language, config.vocab_size, config.compute)
        self.expert = ActionExpert(config.expert, config.action_dim, config.compute)

    def image_tokens(self, images: Shaped[Array, "B C S S 3"]) -> Float[Array, "B C P W"]:
        """Tokens of every camera slot of `images` [B, C, S, S, 3], by one pass of the vision tower.

        uint8 images are mapped from 0..255 to [-1, 1]; float images are taken to be there already.
        """
        size = self.config.vision.image_size
        if images.ndim != 5 or images.shape[2:] != (size, size, 3):
            raise ValueError(f"images must be [batch, cameras, {size}, {size}, 3]; got {images.shape}")
        images = normalised_images(images)
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


def normalised_images(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """uint8 images mapped from 0..255 to [-1, 1]; float ones as they are."""
    return images.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if images.dtype == jnp.uint8 else images


def init_model(config: Pi05Config, seed: int | Key[Array, ""], mesh: Mesh | None = None) -> Pi05:
    """A freshly initialised model; `seed` is an int or a JAX key. With `mesh`, parameters are created sharded."""
    graphdef, abstract = nnx.split(abstract_model(config))
    return nnx.merge(graphdef, initialise(abstract, seed, mesh))


def abstract_model(config: Pi05Config) -> Pi05:
    """The model with `jax.ShapeDtypeStruct`s for parameters: nothing is allocated."""
    return Pi05(config)


def count_parameters(model: Pi05 | nnx.State) -> int:
    """Number of parameter entries of a model or state (abstract ones too)."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def part_of(path: tuple) -> Part:
    """Which part of the model a parameter path belongs to; "expert" includes action and time projections."""
    for part in get_args(Part):
        if path[0] == part:
            return part
    raise ValueError(f"path {path} does not start at a part of the model: vision, language or expert")


def reaches_actions(path: tuple) -> bool:
    """Whether any gradient can reach a parameter: of the language model's last layer only keys and values can."""
    if path[:2] == ("language", "last"):
        return path[2] in ("kv", "norm_attention")
    return path[:2] != ("language", "norm")


def add_adapters(model: Pi05, adapters: Mapping[Part, tuple[int, float]]) -> Pi05:
    """`model` with low-rank adapters, (rank, α) for each part that is named; declared but not filled.

    They change every kernel of attention and MLP, biases, norms, embeddings, projections and adaRMS modulation never.
    The model that is passed is changed too.
    """
    for part, (rank, alpha) in adapters.items():
        getattr(model, part).layers.adapt(rank, alpha)
        if part == "language":
            model.language.last.kv.adapt(rank, alpha)
    return model


def is_trained(path: tuple, scope: str, adapted: Collection[str] = ()) -> bool:
    """Whether `scope` trains the parameter at `path`; `adapted` names the parts that have adapters.

    expert: the action expert. joint: every part, but what no gradient reaches and the token embedding, a sixth of the
    model that RL need not move. lora: the adapters; and the expert whole when it has none, for then only the VLM is
    to be spared. everything: all there is.
    """
    if scope == "everything":
        return True
    if scope == "joint":
        return path != ("language", "embedding") and reaches_actions(path)
    if scope == "lora" and (part_of(path) != "expert" or "expert" in adapted):
        return is_adapter(path)
    return part_of(path) == "expert"


def vlm_is_frozen(trainable: nnx.State) -> bool:
    """Whether nothing that the prefix cache depends on is trained."""
    return all(part_of(path) == "expert" for path, _ in nnx.to_flat_state(trainable))


def split_model(model: Pi05, scope: str, frozen_dtype: str | None = None) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graphdef, trainable, frozen)` for a training scope (see `is_trained`); trainable parameters are float32.

    `frozen_dtype="bfloat16"` stores frozen weights in half the memory; norms, patch and position embeddings, which
    compute in float32, keep their dtype. `nnx.merge(graphdef, trainable, frozen)` puts the model together again.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    if frozen_dtype is not None and frozen_dtype not in DTYPES:
        raise ValueError(f"frozen_dtype must be None or one of {', '.join(DTYPES)}; got {frozen_dtype!r}")
    adapted = {part_of(path) for path, _ in nnx.to_flat_state(nnx.state(model)) if is_adapter(path)}
    if scope == "lora" and not adapted:
        raise ValueError("scope lora needs adapters; add them to the model first")
    graphdef, trainable, frozen = nnx.split(model, lambda path, _: is_trained(tuple(path), scope, adapted), ...)  # type: ignore[misc]
    trainable = _cast(trainable, "float32", lambda variable: True)
    return graphdef, trainable, frozen if frozen_dtype is None else cast_state(frozen, frozen_dtype)


def cast_state(state: nnx.State, dtype: str) -> nnx.State:
    """`state` (abstract ones too) with every parameter in `dtype` but those declared to stay in float32."""
    return _cast(state, dtype, lambda variable: not variable.get_metadata("keep_float32"))


def _cast(state: nnx.State, dtype: str, chosen: Callable[[nnx.Variable], bool]) -> nnx.State:
    def cast(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if not chosen(variable) or value.dtype == jnp.dtype(dtype):
            return variable
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        return variable.replace(value.update(dtype=jnp.dtype(dtype)) if abstract else value.astype(dtype))

    return jax.tree.map(cast, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def smooth_number_embedding(
    embedding: Float[Array, "V W"], token_ids: Int[Array, " N"], key: Key[Array, ""]
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
