"""A model's sizes from its arrays' names and shapes. What shapes do not show comes from settings or is asked for."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from z1_jax.convert import arrays
from z1_jax.convert.arrays import Style
from z1_jax.convert.store import FormatError
from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS
from z1_jax.models.siglip import SiglipConfig

Shapes = Mapping[str, tuple[int, ...]]
# Heads of the attention by the name that openpi and LeRobot give the size.
VARIANT_HEADS = {"gemma_2b": 8, "gemma_2b_lora": 8, "gemma_300m": 8, "gemma_300m_lora": 8, "dummy": 8}
_FLAGS = {
    "heads": "--heads=N: the attention heads of language model and action expert",
    "vision_heads": "--vision-heads=N: the vision tower's attention heads",
    "horizon": "--horizon=N: the control steps of a chunk, as the policy was trained with (openpi: 50 for pi05_base, "
    "15 for pi05_droid, 10 for pi05_libero). No weight depends on it: a policy that is trained on may take another, "
    "that of its data (z1_jax.collect --chunk)",
}


def variant_heads(path: pathlib.Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Heads by the names of the sizes; both projects' PyTorch models have SigLIP So400m's vision tower.

    Raises:
        FormatError: a name that neither project has.
    """
    variants = {key: config[key] for key in ("paligemma_variant", "action_expert_variant") if key in config}
    for key, variant in variants.items():
        if variant not in VARIANT_HEADS:
            raise FormatError(f"{path} has {key}={variant!r}; expected one of {', '.join(VARIANT_HEADS)}")
    heads = {VARIANT_HEADS[variant] for variant in variants.values()}
    return {"heads": heads.pop(), "vision_heads": PRESETS["pi05"].vision.heads} if len(heads) == 1 else {}


def refuse_other_models(names: Iterable[str]) -> None:
    """Raises FormatError, with the reason, for what looks like π0.5 and is not."""
    names = list(names)
    if any("state_proj" in name or "action_time_mlp" in name for name in names):
        raise FormatError(
            "this is a π0 checkpoint, not π0.5: it feeds the state through state_proj and has no adaptive norms, so "
            "π0.5's network cannot hold its weights; give a π0.5 checkpoint"
        )
    if not any("action_in_proj" in name or "expert.action_in" in name for name in names):
        raise FormatError(
            "this checkpoint has no action expert (no action_in_proj): it is π0-FAST or a bare PaliGemma; "
            "give a π0.5 checkpoint"
        )


def style_of(names: Iterable[str]) -> Style:
    """Whose names these are. Raises FormatError for names that no known format has."""
    names = list(names)
    if any(name.startswith("paligemma_with_expert.") for name in names):
        return "torch"
    if any(name.startswith("PaliGemma/") for name in names):
        return "openpi"
    if any(name.startswith("language.last.") for name in names):
        return "ours"
    shown = ", ".join(sorted(names)[:3])
    raise FormatError(
        f"these are no π0.5 weights (arrays: {shown or 'none'}); expected openpi's names (PaliGemma/…, "
        "paligemma_with_expert.…) or LeRobot's (model.paligemma_with_expert.…)"
    )


def read_architecture(shapes: Shapes, style: Style, settings: Mapping[str, Any]) -> Pi05Config:
    """The configuration of the model whose arrays these are.

    Args:
        settings: what shapes do not show: heads, vision_heads, horizon, prompt_length, camera_slots, compute. Where
            heads or horizon are absent and nothing else tells them, an error asks for the flag. An action_dim or
            image_size must agree with the shapes.

    Raises:
        FormatError: an array is missing, a setting does not fit the shapes, or one is needed.
    """
    sizes = (_torch_sizes if style == "torch" else _jax_sizes)(_Shapes(shapes))
    known = PRESETS["pi05"]
    given = dict(settings)
    if sizes["gemma"] == _gemma_sizes(known):  # the published sizes, all of them: there is one such model
        sizes.setdefault("heads", known.language.heads)
    if sizes["vision"] == _vision_sizes(known):
        sizes.setdefault("vision_heads", known.vision.heads)
    vision, gemma = sizes["vision"], sizes["gemma"]
    heads = _heads("heads", gemma["q"], sizes, given)
    vision_heads = _heads("vision_heads", vision["width"], sizes, given)
    head_dim = gemma["q"] // heads
    if gemma["kv"] % head_dim or heads % (gemma["kv"] // head_dim):
        raise FormatError(
            f"heads={heads} gives head dimension {head_dim}, which does not fit keys of width {gemma['kv']}; "
            f"expected {_FLAGS['heads']}"
        )
    side = math.isqrt(vision["tokens"])
    if side * side != vision["tokens"]:
        raise FormatError(f"the position embedding has {vision['tokens']} tokens; expected a square number")
    for name, size in (("action_dim", gemma["action_dim"]), ("image_size", side * vision["patch"])):
        if given.get(name, size) != size:
            raise FormatError(f"the config beside the weights says {name}={given[name]}, the arrays say {size}")
    if "horizon" not in given:
        raise FormatError(
            f"neither shapes nor a config beside them tell the horizon; give {_FLAGS['horizon']}"
            f"{_horizon_hint(given.get('assets', ()))}"
        )
    attention = {"heads": heads, "kv_heads": gemma["kv"] // head_dim, "head_dim": head_dim}
    try:
        return Pi05Config(
            vision=SiglipConfig(
                width=vision["width"],
                depth=vision["depth"],
                mlp=vision["mlp"],
                heads=vision_heads,
                patch=vision["patch"],
                image_size=side * vision["patch"],
            ),
            language=GemmaConfig(gemma["width"], gemma["depth"], gemma["mlp"], **attention),
            expert=GemmaConfig(gemma["expert_width"], gemma["expert_depth"], gemma["expert_mlp"], **attention),
            vocab_size=gemma["vocabulary"],
            cameras=given.get("camera_slots", known.cameras),
            prompt_length=given.get("prompt_length", known.prompt_length),
            action_dim=gemma["action_dim"],
            horizon=given["horizon"],
            **given.get("compute", {}),
        )
    except ValueError as error:
        raise FormatError(f"these shapes make no π0.5: {error}") from None


def _horizon_hint(assets: Iterable[str]) -> str:
    """Which horizon the names of the statistics beside the weights suggest, as part of an error."""
    known = {"droid": 15, "physical-intelligence/libero": 10}
    named = {name: known[name] for name in assets if name in known}
    told = [f"its statistics are of {name}: --horizon={steps}" for name, steps in named.items()]
    return f"; {told[0]}" if len(told) == 1 else ""


def check_tensors(shapes: Shapes, expected: Shapes, unused: Iterable[str], where: str) -> None:
    """Raises one FormatError that counts and names missing, surplus and wrongly shaped arrays."""
    unused = set(unused)
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
    extra = [f"unknown {name} {list(shapes[name])}" for name in shapes if name not in expected and name not in unused]
    wrong = [
        f"{name} has shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = missing + extra + wrong
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise FormatError(
            f"{where} is not a whole π0.5 ({len(missing)} arrays missing, {len(extra)} unknown, {len(wrong)} of a "
            f"wrong shape): {'; '.join(problems[:4])}{more}"
        )


class _Shapes:
    """Shapes by name, with an error that names what is missing."""

    def __init__(self, shapes: Shapes):
        self._shapes = shapes

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self._shapes:
            raise FormatError(f"the checkpoint lacks {name}; fetch or convert it anew")
        shape = self._shapes[name]
        if len(shape) != rank:
            raise FormatError(f"{name} has shape {list(shape)}; expected {rank} axes")
        return shape

    def layers(self, pattern: str) -> int:
        """How many layers there are: {} in `pattern` is the number."""
        before, after = pattern.split("{}")
        numbers = {
            name[len(before) : len(name) - len(after)]
            for name in self._shapes
            if name.startswith(before) and name.endswith(after)
        }
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def _torch_sizes(shape: _Shapes) -> dict[str, Any]:
    vision, language, expert = arrays.VISION, arrays.LANGUAGE, arrays.EXPERT
    width, _, patch, _ = shape(f"{vision}embeddings.patch_embedding.weight", 4)
    vocabulary, language_width = shape(arrays.EMBEDDING, 2)
    q_width, expert_width = shape(f"{expert}layers.0.self_attn.q_proj.weight", 2)
    return {
        "vision": {
            "width": width,
            "depth": shape.layers(f"{vision}encoder.layers.{{}}.mlp.fc1.weight"),
            "mlp": shape(f"{vision}encoder.layers.0.mlp.fc1.weight", 2)[0],
            "patch": patch,
            "tokens": shape(f"{vision}embeddings.position_embedding.weight", 2)[0],
        },
        "gemma": {
            "width": language_width,
            "depth": shape.layers(f"{language}layers.{{}}.mlp.down_proj.weight"),
            "mlp": shape(f"{language}layers.0.mlp.down_proj.weight", 2)[1],
            "expert_width": expert_width,
            "expert_depth": shape.layers(f"{expert}layers.{{}}.mlp.down_proj.weight"),
            "expert_mlp": shape(f"{expert}layers.0.mlp.down_proj.weight", 2)[1],
            "q": q_width,
            "kv": shape(f"{expert}layers.0.self_attn.k_proj.weight", 2)[0],
            "vocabulary": vocabulary,
            "action_dim": shape("action_in_proj.weight", 2)[1],
        },
    }


def _jax_sizes(shape: _Shapes) -> dict[str, Any]:
    block, llm = "PaliGemma/img/Transformer/encoderblock", "PaliGemma/llm/layers"
    patch, _, _, width = shape("PaliGemma/img/embedding/kernel", 4)
    depth, _, vision_heads, _ = shape(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    vocabulary, _ = shape("PaliGemma/llm/embedder/input_embedding", 2)
    language_depth, language_mlp, language_width = shape(f"{llm}/mlp/linear", 3)
    expert_depth, expert_mlp, expert_width = shape(f"{llm}/mlp_1/linear", 3)
    _, heads, _, head_dim = shape(f"{llm}/attn/q_einsum_1/w", 4)
    return {
        "vision": {
            "width": width,
            "depth": depth,
            "mlp": shape(f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2],
            "patch": patch,
            "tokens": shape("PaliGemma/img/pos_embedding", 3)[1],
        },
        "gemma": {
            "width": language_width,
            "depth": language_depth,
            "mlp": language_mlp,
            "expert_width": expert_width,
            "expert_depth": expert_depth,
            "expert_mlp": expert_mlp,
            "q": heads * head_dim,
            "kv": shape(f"{llm}/attn/kv_einsum_1/w", 5)[2] * head_dim,
            "vocabulary": vocabulary,
            "action_dim": shape("action_in_proj/kernel", 2)[0],
        },
        "heads": heads,
        "vision_heads": vision_heads,
    }


def _vision_sizes(config: Pi05Config) -> dict[str, int]:
    sizes = dataclasses.asdict(config.vision)
    return {**{name: sizes[name] for name in ("width", "depth", "mlp", "patch")}, "tokens": config.vision.tokens}


def _gemma_sizes(config: Pi05Config) -> dict[str, int]:
    language, expert = config.language, config.expert
    return {
        "width": language.width,
        "depth": language.depth,
        "mlp": language.mlp,
        "expert_width": expert.width,
        "expert_depth": expert.depth,
        "expert_mlp": expert.mlp,
        "q": language.heads * language.head_dim,
        "kv": language.kv_heads * language.head_dim,
        "vocabulary": config.vocab_size,
        "action_dim": config.action_dim,
    }


def _heads(name: str, width: int, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Heads of a projection of this width: from the shapes where they show them, else from the settings."""
    flag = _FLAGS[name]
    if name in sizes:
        if given.get(name, sizes[name]) != sizes[name]:
            raise FormatError(f"{name}={given[name]} was given, the shapes say {sizes[name]}; leave the flag out")
        return sizes[name]
    if name not in given:
        raise FormatError(
            f"{width} is heads times head dimension, and nothing beside the weights tells which; give {flag}"
        )
    heads = given[name]
    if heads < 1 or width % heads:
        raise FormatError(f"{name}={heads} does not divide the projections' width {width}; give {flag}")
    return heads
