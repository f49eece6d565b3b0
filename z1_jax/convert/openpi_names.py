"""Names of the parameters in other projects' checkpoints, mapped to ours and back. Arrays in, arrays out: no files.

Our kernels have openpi's layouts, so only names have to be mapped. The one exception is the language model: openpi
stacks all of its layers, and ours keeps the last one apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from z1_jax.models.lora import has_adapters
from z1_jax.models.pi05 import Pi05Config, abstract_model

_SIGLIP_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_VISION = {
    "patch_kernel": "embedding/kernel",
    "patch_bias": "embedding/bias",
    "position": "pos_embedding",
    "norm/scale": "Transformer/encoder_norm/scale",
    "norm/bias": "Transformer/encoder_norm/bias",
    "head/kernel": "head/kernel",
    "head/bias": "head/bias",
}
_VISION_LAYERS = {
    "norm_attention": "LayerNorm_0",
    "norm_mlp": "LayerNorm_1",
    "q": "MultiHeadDotProductAttention_0/query",
    "k": "MultiHeadDotProductAttention_0/key",
    "v": "MultiHeadDotProductAttention_0/value",
    "out": "MultiHeadDotProductAttention_0/out",
    "mlp/up": "MlpBlock_0/Dense_0",
    "mlp/down": "MlpBlock_0/Dense_1",
}
_GEMMA_LAYERS = {  # {} is the suffix of the stack: "" for the language model, "_1" for the expert
    "q/kernel": "attn/q_einsum{}/w",
    "kv/kernel": "attn/kv_einsum{}/w",
    "out/kernel": "attn/attn_vec_einsum{}/w",
    "mlp/gate_up": "mlp{}/gating_einsum",
    "mlp/down": "mlp{}/linear",
}
_GEMMA_NORMS = {"layers/norm_attention": "layers/pre_attention_norm", "layers/norm_mlp": "layers/pre_ffw_norm"}
_PROJECTIONS = {
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "time_in": "time_mlp_in",
    "time_out": "time_mlp_out",
}


def openpi_names() -> dict[str, str]:
    """Our parameter path -> openpi's. `language/layers/…` stands for the whole stack, `language/last/…` included."""
    names = {f"vision/{ours}": f"PaliGemma/img/{theirs}" for ours, theirs in _VISION.items()}
    for ours, theirs in _VISION_LAYERS.items():
        for leaf in ("scale", "bias") if "norm" in ours else ("kernel", "bias"):
            names[f"vision/layers/{ours}/{leaf}"] = f"{_SIGLIP_BLOCK}/{theirs}/{leaf}"
    names["language/embedding"] = "PaliGemma/llm/embedder/input_embedding"
    for part, suffix in (("language", ""), ("expert", "_1")):
        for ours, theirs in _GEMMA_LAYERS.items():
            names[f"{part}/layers/{ours}"] = f"PaliGemma/llm/layers/{theirs.format(suffix)}"
    for ours, theirs in {**_GEMMA_NORMS, "norm": "final_norm"}.items():
        names[f"language/{ours}/scale"] = f"PaliGemma/llm/{theirs}/scale"
        for leaf in ("kernel", "bias"):
            names[f"expert/{ours}/modulation/{leaf}"] = f"PaliGemma/llm/{theirs}_1/Dense_0/{leaf}"
    for ours, theirs in _PROJECTIONS.items():
        for leaf in ("kernel", "bias"):
            names[f"expert/{ours}/{leaf}"] = f"{theirs}/{leaf}"
    return names


def openpi_shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """openpi's path -> shape of every array that its checkpoint of this size holds."""
    names, shapes = openpi_names(), {}
    for path, variable in _flatten(nnx.state(abstract_model(config))).items():
        if path.startswith("language/last/"):
            continue
        shape = tuple(variable.get_value().shape)
        if path.startswith("language/layers/"):
            shape = (shape[0] + 1, *shape[1:])
        shapes[names[path]] = shape
    return shapes


def from_openpi(flat: Mapping[str, Shaped[np.ndarray, "..."]], config: Pi05Config) -> nnx.State:
    """Our state from openpi's arrays (paths joined by "/", layers stacked).

    Strict: raises one ValueError that lists every missing, surplus and wrongly shaped array. Arrays keep their dtype
    and stay on the host (views where possible): place them with `sharding.shard` or `jax.device_put`.
    """
    _check(flat, openpi_shapes(config))
    names = openpi_names()
    state = nnx.state(abstract_model(config))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        ours = "/".join(map(str, path))
        if ours.startswith("language/last/"):
            value = flat[names[ours.replace("/last/", "/layers/", 1)]][-1]
        elif ours.startswith("language/layers/"):
            value = flat[names[ours]][:-1]
        else:
            value = flat[names[ours]]
        filled.append((path, variable.replace(np.asarray(value))))
    return nnx.from_flat_state(filled)


def to_openpi(state: nnx.State) -> dict[str, np.ndarray]:
    """openpi's arrays from a complete state of ours (parameters, or gradients of the same structure).

    Raises ValueError for a state that is only a part of the model, or has adapters: openpi has no names for them.
    """
    if has_adapters(state):
        raise ValueError("the state has adapters that are not folded in: export what Policy.with_params returns")
    ours = {path: np.asarray(jax.device_get(variable.get_value())) for path, variable in _flatten(state).items()}
    flat = {}
    for path, theirs in openpi_names().items():
        if path not in ours:
            raise ValueError(f"the state lacks {path}: merge trainable and frozen parts before exporting")
        value = ours[path]
        if path.startswith("language/layers/"):
            value = np.concatenate([value, ours[path.replace("/layers/", "/last/", 1)][None]])
        flat[theirs] = value
    return flat


def _flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _check(flat: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in flat]
    problems += [f"unexpected {name} {tuple(np.shape(flat[name]))}" for name in flat if name not in expected]
    problems += [
        f"shape of {name} is {tuple(np.shape(flat[name]))}, expected {shape}"
        for name, shape in expected.items()
        if name in flat and tuple(np.shape(flat[name])) != shape
    ]
    if problems:
        raise ValueError(
            f"the arrays do not fit the model ({len(problems)} problems); check that the preset is that of the "
            "checkpoint:\n  " + "\n  ".join(sorted(problems))
        )
