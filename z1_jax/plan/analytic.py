"""What π0.5 costs on paper: operations and bytes from the shapes alone. Closed formulas; nothing is traced.

Operations are those of matrix products, a multiply-add counted as two: norms, softmax and activations are left out.
"""

from __future__ import annotations

import dataclasses

from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.pi05 import Pi05Config, itemsize
from z1_jax.models.siglip import SiglipConfig

_OPTIMIZER_NUMBERS = 7  # AdamW reads parameter, gradient and both moments, and writes all but the gradient: float32


def vision_flops(config: SiglipConfig, out_width: int) -> int:
    """Operations for one image: patches, encoder, head."""
    tokens, width = config.tokens, config.width
    patches = 2 * tokens * 3 * config.patch**2 * width
    projections = 4 * 2 * tokens * width**2  # query, key, value, output
    attention = 2 * 2 * tokens**2 * width  # logits, weighted sum
    mlp = 2 * 2 * tokens * width * config.mlp
    return patches + config.depth * (projections + attention + mlp) + 2 * tokens * width * out_width


def language_flops(config: GemmaConfig, tokens: int) -> int:
    """Operations for one prefix of that many tokens; of the last layer only keys and values are computed."""
    keys_values = 2 * tokens * config.width * 2 * config.kv_heads * config.head_dim
    return (config.depth - 1) * _gemma_layer(config, tokens, tokens) + keys_values


def _gemma_layer(config: GemmaConfig, tokens: int, keys: int) -> int:
    queries = config.heads * config.head_dim
    projections = 2 * tokens * config.width * (2 * queries + 2 * config.kv_heads * config.head_dim)
    attention = 2 * 2 * tokens * keys * queries
    return projections + attention + 3 * 2 * tokens * config.width * config.mlp


def prefix_flops(config: Pi05Config, cameras: int | None = None, prompt_length: int | None = None) -> int:
    """Operations to encode one observation; fewer cameras or prompt tokens than the model has slots may be given."""
    cameras = config.cameras if cameras is None else cameras
    prompt_length = config.prompt_length if prompt_length is None else prompt_length
    tokens = cameras * config.vision.tokens + prompt_length
    return cameras * vision_flops(config.vision, config.language.width) + language_flops(config.language, tokens)


def velocity_flops(config: Pi05Config, prefix_tokens: int | None = None) -> int:
    """Operations of one evaluation of the velocity, for one chunk and one time."""
    expert, width = config.expert, config.expert.width
    keys = (config.prefix_length if prefix_tokens is None else prefix_tokens) + config.horizon
    time = 2 * 2 * width**2
    modulation = 2 * width * 3 * width
    layers = expert.depth * (_gemma_layer(expert, config.horizon, keys) + 2 * modulation) + modulation
    return layers + time + 2 * 2 * config.horizon * config.action_dim * width


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of one call, over all devices."""

    flops: int
    weight_bytes: int = 0  # weights read again and again because too little is computed with each
    optimizer_bytes: int = 0


def training_work(
    config: Pi05Config, observations: int, chunks: int, *, trainable: int, encoded: bool, trains_vlm: bool
) -> Work:
    """One optimiser step: a backward pass costs twice its forward pass, nothing is recomputed.

    Args:
        observations: in the step; chunks: velocities evaluated for each (flow times, or denoising steps).
        trainable: parameters that the optimiser updates.
        encoded: the step runs the prefix; false where its cache is there already.
        trains_vlm: the prefix has a backward pass.
    """
    prefix = prefix_flops(config) * (3 if trains_vlm else 1) if encoded else 0
    flops = observations * (prefix + 3 * chunks * velocity_flops(config))
    return Work(flops, optimizer_bytes=_OPTIMIZER_NUMBERS * 4 * trainable)


def decision_work(
    config: Pi05Config, batch: int, steps: int, cameras: int | None = None, prompt_length: int | None = None
) -> Work:
    """Encode `batch` observations once, then denoise one chunk of each in `steps` steps.

    A step on few chunks takes as long as reading the expert's weights: `weight_bytes` counts them once a step.
    """
    cameras = config.cameras if cameras is None else cameras
    prompt_length = config.prompt_length if prompt_length is None else prompt_length
    tokens = cameras * config.vision.tokens + prompt_length
    flops = prefix_flops(config, cameras, prompt_length) + steps * velocity_flops(config, tokens)
    return Work(batch * flops, weight_bytes=steps * expert_parameters(config) * itemsize(config.dtype))


def expert_parameters(config: Pi05Config) -> int:
    """Parameters that a denoising step reads: the expert, its modulation, the action and time projections."""
    expert, width = config.expert, config.expert.width
    attention = width * expert.head_dim * (2 * expert.heads + 2 * expert.kv_heads)
    modulation = width * 3 * width + 3 * width
    layer = attention + 3 * width * expert.mlp + 2 * modulation
    projections = config.action_dim * width + width + width * config.action_dim + config.action_dim
    return expert.depth * layer + modulation + projections + 2 * (width**2 + width)
