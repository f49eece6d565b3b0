"""Tiny π0.5 weights in openpi's two layouts, made by the formulas of its converter: shared by the tests of conversion.

Written out by hand, one assignment a tensor, so that it is independent of the tables that the project converts with.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

WIDTH, DEPTH, MLP, HEADS = 12, 3, 20, 3  # vision
LANGUAGE, EXPERT, LANGUAGE_MLP, EXPERT_MLP = 20, 16, 28, 24
N, K, H, LAYERS = 4, 2, 6, 3  # heads x head dimension equals no width, and there are two key-value heads
VOCABULARY, ACTIONS, HORIZON, PATCH, SIDE = 300, 7, 5, 4, 3
FLAGS = ("--heads=4", "--vision-heads=3", "--horizon=5", "--prompt-length=48", "--state-in-prompt")

_VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."


def jax_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """openpi's JAX arrays: path -> float32."""
    block, llm, d = "PaliGemma/img/Transformer/encoderblock", "PaliGemma/llm", WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "PaliGemma/img/embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "PaliGemma/img/embedding/bias": (WIDTH,),
        "PaliGemma/img/pos_embedding": (1, SIDE**2, WIDTH),
        "PaliGemma/img/Transformer/encoder_norm/scale": (WIDTH,),
        "PaliGemma/img/Transformer/encoder_norm/bias": (WIDTH,),
        "PaliGemma/img/head/kernel": (WIDTH, LANGUAGE),
        "PaliGemma/img/head/bias": (LANGUAGE,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (DEPTH, WIDTH, MLP),
        f"{block}/MlpBlock_0/Dense_0/bias": (DEPTH, MLP),
        f"{block}/MlpBlock_0/Dense_1/kernel": (DEPTH, MLP, WIDTH),
        f"{block}/MlpBlock_0/Dense_1/bias": (DEPTH, WIDTH),
        f"{block}/MultiHeadDotProductAttention_0/out/kernel": (DEPTH, HEADS, d, WIDTH),
        f"{block}/MultiHeadDotProductAttention_0/out/bias": (DEPTH, WIDTH),
        f"{llm}/embedder/input_embedding": (VOCABULARY, LANGUAGE),
        f"{llm}/final_norm/scale": (LANGUAGE,),
        f"{llm}/layers/pre_attention_norm/scale": (LAYERS, LANGUAGE),
        f"{llm}/layers/pre_ffw_norm/scale": (LAYERS, LANGUAGE),
        f"{llm}/final_norm_1/Dense_0/kernel": (EXPERT, 3 * EXPERT),
        f"{llm}/final_norm_1/Dense_0/bias": (3 * EXPERT,),
    }
    for n in (0, 1):
        shapes |= {f"{block}/LayerNorm_{n}/scale": (DEPTH, WIDTH), f"{block}/LayerNorm_{n}/bias": (DEPTH, WIDTH)}
    for name in ("query", "key", "value"):
        shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/kernel"] = (DEPTH, WIDTH, HEADS, d)
        shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/bias"] = (DEPTH, HEADS, d)
    for suffix, width, mlp in (("", LANGUAGE, LANGUAGE_MLP), ("_1", EXPERT, EXPERT_MLP)):
        shapes |= {
            f"{llm}/layers/attn/q_einsum{suffix}/w": (LAYERS, N, width, H),
            f"{llm}/layers/attn/kv_einsum{suffix}/w": (LAYERS, 2, K, width, H),
            f"{llm}/layers/attn/attn_vec_einsum{suffix}/w": (LAYERS, N, H, width),
            f"{llm}/layers/mlp{suffix}/gating_einsum": (LAYERS, 2, width, mlp),
            f"{llm}/layers/mlp{suffix}/linear": (LAYERS, mlp, width),
        }
    for norm in ("pre_attention_norm_1", "pre_ffw_norm_1"):
        shapes[f"{llm}/layers/{norm}/Dense_0/kernel"] = (LAYERS, EXPERT, 3 * EXPERT)
        shapes[f"{llm}/layers/{norm}/Dense_0/bias"] = (LAYERS, 3 * EXPERT)
    for name, a, b in (
        ("action_in_proj", ACTIONS, EXPERT),
        ("action_out_proj", EXPERT, ACTIONS),
        ("time_mlp_in", EXPERT, EXPERT),
        ("time_mlp_out", EXPERT, EXPERT),
    ):
        shapes |= {f"{name}/kernel": (a, b), f"{name}/bias": (b,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def torch_weights(jax: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of the same model (with the expert's head, which nothing uses)."""
    out = {
        f"{_VISION}embeddings.patch_embedding.weight": jax["PaliGemma/img/embedding/kernel"].transpose(3, 2, 0, 1),
        f"{_VISION}embeddings.patch_embedding.bias": jax["PaliGemma/img/embedding/bias"],
        f"{_VISION}embeddings.position_embedding.weight": jax["PaliGemma/img/pos_embedding"][0],
        f"{_VISION}post_layernorm.weight": jax["PaliGemma/img/Transformer/encoder_norm/scale"],
        f"{_VISION}post_layernorm.bias": jax["PaliGemma/img/Transformer/encoder_norm/bias"],
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight": jax["PaliGemma/img/head/kernel"].T,
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.bias": jax["PaliGemma/img/head/bias"],
        "paligemma_with_expert.paligemma.lm_head.weight": jax["PaliGemma/llm/embedder/input_embedding"],
        "paligemma_with_expert.gemma_expert.lm_head.weight": np.ones((VOCABULARY, EXPERT), np.float32),
        f"{_LANGUAGE}norm.weight": jax["PaliGemma/llm/final_norm/scale"],
        f"{_EXPERT}norm.dense.weight": jax["PaliGemma/llm/final_norm_1/Dense_0/kernel"].T,
        f"{_EXPERT}norm.dense.bias": jax["PaliGemma/llm/final_norm_1/Dense_0/bias"],
    }
    for i in range(DEPTH):
        out |= _vision_layer(jax, i)
    for i in range(LAYERS):
        for prefix, suffix in ((_LANGUAGE, ""), (_EXPERT, "_1")):
            out |= _gemma_layer(jax, f"{prefix}layers.{i}.", suffix, i)
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        out |= {f"{name}.weight": jax[f"{name}/kernel"].T, f"{name}.bias": jax[f"{name}/bias"]}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def _vision_layer(jax: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    block, to = "PaliGemma/img/Transformer/encoderblock", f"{_VISION}encoder.layers.{i}."
    attention = f"{block}/MultiHeadDotProductAttention_0"
    out = {f"{to}self_attn.out_proj.weight": jax[f"{attention}/out/kernel"][i].reshape(WIDTH, WIDTH).T}
    out[f"{to}self_attn.out_proj.bias"] = jax[f"{attention}/out/bias"][i]
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        out[f"{to}self_attn.{short}_proj.weight"] = jax[f"{attention}/{name}/kernel"][i].reshape(WIDTH, WIDTH).T
        out[f"{to}self_attn.{short}_proj.bias"] = jax[f"{attention}/{name}/bias"][i].reshape(-1)
    for n in (0, 1):
        out[f"{to}layer_norm{n + 1}.weight"] = jax[f"{block}/LayerNorm_{n}/scale"][i]
        out[f"{to}layer_norm{n + 1}.bias"] = jax[f"{block}/LayerNorm_{n}/bias"][i]
        out[f"{to}mlp.fc{n + 1}.weight"] = jax[f"{block}/MlpBlock_0/Dense_{n}/kernel"][i].T
        out[f"{to}mlp.fc{n + 1}.bias"] = jax[f"{block}/MlpBlock_0/Dense_{n}/bias"][i]
    return out


def _gemma_layer(jax: Mapping[str, np.ndarray], to: str, suffix: str, i: int) -> dict[str, np.ndarray]:
    layers = "PaliGemma/llm/layers"
    q, kv = (jax[f"{layers}/attn/{name}_einsum{suffix}/w"][i] for name in ("q", "kv"))
    width = q.shape[1]
    gate, up = jax[f"{layers}/mlp{suffix}/gating_einsum"][i]
    out = {
        f"{to}self_attn.q_proj.weight": q.transpose(0, 2, 1).reshape(N * H, width),
        f"{to}self_attn.k_proj.weight": kv[0].transpose(0, 2, 1).reshape(K * H, width),
        f"{to}self_attn.v_proj.weight": kv[1].transpose(0, 2, 1).reshape(K * H, width),
        f"{to}self_attn.o_proj.weight": jax[f"{layers}/attn/attn_vec_einsum{suffix}/w"][i].reshape(N * H, width).T,
        f"{to}mlp.gate_proj.weight": gate.T,
        f"{to}mlp.up_proj.weight": up.T,
        f"{to}mlp.down_proj.weight": jax[f"{layers}/mlp{suffix}/linear"][i].T,
    }
    for theirs, name in (("input_layernorm", "pre_attention_norm"), ("post_attention_layernorm", "pre_ffw_norm")):
        if suffix:
            out[f"{to}{theirs}.dense.weight"] = jax[f"{layers}/{name}_1/Dense_0/kernel"][i].T
            out[f"{to}{theirs}.dense.bias"] = jax[f"{layers}/{name}_1/Dense_0/bias"][i]
        else:
            out[f"{to}{theirs}.weight"] = jax[f"{layers}/{name}/scale"][i]
    return out


def statistics(rng: np.random.Generator) -> dict[str, dict[str, list[float]]]:
    """norm_stats.json's content, with every bit of a float64 in use."""

    def one(dim: int) -> dict[str, list[float]]:
        values = {"mean": rng.normal(size=dim), "std": rng.random(dim) + 0.1}
        values |= {"q01": values["mean"] - rng.random(dim) - 0.1, "q99": values["mean"] + rng.random(dim) + 0.1}
        return {name: value.tolist() for name, value in values.items()}

    return {"state": one(6), "actions": one(5)}


def save_openpi(folder: pathlib.Path, weights: Mapping[str, np.ndarray], stats: Any, leaf: bool = True) -> None:
    """As openpi's training saves a step: Orbax params under "params", each path ending in "value"; assets."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = {"value": value} if leaf else value
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "params", {"params": tree})
    save_assets(folder, stats)


def save_assets(folder: pathlib.Path, stats: Any, name: str = "tiny_robot") -> None:
    """assets/<name>/norm_stats.json."""
    (folder / "assets" / name).mkdir(parents=True)
    (folder / "assets" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))


def load_openpi(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """As openpi's restore_params reads it, with Orbax: path -> array."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder.absolute() / "params")
        item = {"params": (getattr(metadata, "item_metadata", None) or metadata)["params"]}
        arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), item)
        restore = ocp.args.PyTreeRestore(item=item, restore_args=arguments)
        tree = checkpointer.restore(folder.absolute() / "params", restore)["params"]
    found = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name.removesuffix("/value"): np.asarray(value) for name, value in found.items()}
