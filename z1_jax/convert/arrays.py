"""Where each tensor of a π0.5 stands in each format: ours, openpi's JAX one, openpi's and LeRobot's PyTorch.

A *piece* is the largest unit that is one contiguous block in all of them: one weight of one layer. Converting moves
pieces one by one. Knows names, indices and axes; nothing of files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from flax import nnx
from jaxtyping import Shaped

from z1_jax.convert.openpi_names import openpi_names
from z1_jax.models.pi05 import Pi05Config, abstract_model

Style = Literal["ours", "openpi", "torch"]

_PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = f"{_PALIGEMMA}model.vision_tower.vision_model."
LANGUAGE = f"{_PALIGEMMA}model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
EMBEDDING = f"{_PALIGEMMA}lm_head.weight"
TIED_EMBEDDING = f"{LANGUAGE}embed_tokens.weight"  # the same weights again, where a file holds both names
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"  # the expert predicts no tokens


@dataclasses.dataclass(frozen=True)
class Layout:
    """How our axes stand in a PyTorch tensor: split into `view`, whose axes are permuted, neighbours merged.

    Attributes:
        axes: the view's axis that becomes each of ours.
        groups: the view's axes that each axis of the PyTorch tensor merges.
    """

    axes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    def view(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The PyTorch tensor's shape with its merged axes split, for a shape of ours."""
        return tuple(shape[self.axes.index(axis)] for axis in range(len(shape)))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The PyTorch tensor's shape, for a shape of ours."""
        view = self.view(shape)
        return tuple(math.prod(view[axis] for axis in group) for group in self.groups)

    def to_ours(self, tensor: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> np.ndarray:
        """A view of the PyTorch tensor with our axes."""
        return tensor.reshape(self.view(shape)).transpose(self.axes)

    def to_torch(self, array: Shaped[np.ndarray, "..."]) -> np.ndarray:
        """A view of our array with the PyTorch tensor's axes, merged ones still apart."""
        return array.transpose(np.argsort(self.axes))


_TRANSPOSED = Layout((1, 0), ((0,), (1,)))
_CONVOLUTION = Layout((2, 3, 1, 0), ((0,), (1,), (2,), (3,)))
_POSITION = Layout((0, 1, 2), ((0, 1), (2,)))
_VISION_HEADS = Layout((2, 0, 1), ((0, 1), (2,)))  # ours [D, N, H]
_VISION_BIAS = Layout((0, 1), ((0, 1),))
_GEMMA_HEADS = Layout((0, 2, 1), ((0, 1), (2,)))  # ours [N, D, H]
_FROM_HEADS = Layout((1, 2, 0), ((0,), (1, 2)))  # ours [N, H, D]

# Our path within a part -> (PyTorch name, layout). {} is the layer; None: the same axes.
_Rule = tuple[str, Layout | None]
_VISION: dict[str, _Rule] = {
    "patch_kernel": ("embeddings.patch_embedding.weight", _CONVOLUTION),
    "patch_bias": ("embeddings.patch_embedding.bias", None),
    "position": ("embeddings.position_embedding.weight", _POSITION),
    "norm/scale": ("post_layernorm.weight", None),
    "norm/bias": ("post_layernorm.bias", None),
    "layers/norm_attention/scale": ("encoder.layers.{}.layer_norm1.weight", None),
    "layers/norm_attention/bias": ("encoder.layers.{}.layer_norm1.bias", None),
    "layers/norm_mlp/scale": ("encoder.layers.{}.layer_norm2.weight", None),
    "layers/norm_mlp/bias": ("encoder.layers.{}.layer_norm2.bias", None),
    **{f"layers/{x}/kernel": (f"encoder.layers.{{}}.self_attn.{x}_proj.weight", _VISION_HEADS) for x in "qkv"},
    **{f"layers/{x}/bias": (f"encoder.layers.{{}}.self_attn.{x}_proj.bias", _VISION_BIAS) for x in "qkv"},
    "layers/out/kernel": ("encoder.layers.{}.self_attn.out_proj.weight", _FROM_HEADS),
    "layers/out/bias": ("encoder.layers.{}.self_attn.out_proj.bias", None),
    "layers/mlp/up/kernel": ("encoder.layers.{}.mlp.fc1.weight", _TRANSPOSED),
    "layers/mlp/up/bias": ("encoder.layers.{}.mlp.fc1.bias", None),
    "layers/mlp/down/kernel": ("encoder.layers.{}.mlp.fc2.weight", _TRANSPOSED),
    "layers/mlp/down/bias": ("encoder.layers.{}.mlp.fc2.bias", None),
}
_HEAD: dict[str, _Rule] = {
    "head/kernel": (f"{_PALIGEMMA}model.multi_modal_projector.linear.weight", _TRANSPOSED),
    "head/bias": (f"{_PALIGEMMA}model.multi_modal_projector.linear.bias", None),
}
_GEMMA: dict[str, _Rule] = {
    "layers/q/kernel": ("layers.{}.self_attn.q_proj.weight", _GEMMA_HEADS),
    "layers/out/kernel": ("layers.{}.self_attn.o_proj.weight", _FROM_HEADS),
    "layers/mlp/down": ("layers.{}.mlp.down_proj.weight", _TRANSPOSED),
}
_GEMMA_PAIRS: dict[str, tuple[_Rule, _Rule]] = {  # two PyTorch tensors, stacked in ours
    "layers/kv/kernel": (
        ("layers.{}.self_attn.k_proj.weight", _GEMMA_HEADS),
        ("layers.{}.self_attn.v_proj.weight", _GEMMA_HEADS),
    ),
    "layers/mlp/gate_up": (
        ("layers.{}.mlp.gate_proj.weight", _TRANSPOSED),
        ("layers.{}.mlp.up_proj.weight", _TRANSPOSED),
    ),
}
_NORMS = {
    "layers/norm_attention": "layers.{}.input_layernorm",
    "layers/norm_mlp": "layers.{}.post_attention_layernorm",
    "norm": "norm",
}
_PROJECTIONS = {
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "time_in": "time_mlp_in",
    "time_out": "time_mlp_out",
}


def _rules() -> dict[str, tuple[_Rule, ...]]:
    """Our path -> its PyTorch tensors with their full names; `language/last` is the stack's last layer."""
    rules: dict[str, tuple[_Rule, ...]] = {"language/embedding": ((EMBEDDING, None),)}
    for path, (name, layout) in _VISION.items():
        rules[f"vision/{path}"] = ((VISION + name, layout),)
    for path, rule in _HEAD.items():
        rules[f"vision/{path}"] = (rule,)
    for part, prefix in (("language", LANGUAGE), ("expert", EXPERT)):
        for path, pair in {**{k: (v,) for k, v in _GEMMA.items()}, **_GEMMA_PAIRS}.items():
            rules[f"{part}/{path}"] = tuple((prefix + name, layout) for name, layout in pair)
    for path, name in _NORMS.items():
        rules[f"language/{path}/scale"] = ((f"{LANGUAGE}{name}.weight", None),)
        rules[f"expert/{path}/modulation/kernel"] = ((f"{EXPERT}{name}.dense.weight", _TRANSPOSED),)
        rules[f"expert/{path}/modulation/bias"] = ((f"{EXPERT}{name}.dense.bias", None),)
    for path, name in _PROJECTIONS.items():
        rules[f"expert/{path}/kernel"] = ((f"{name}.weight", _TRANSPOSED),)
        rules[f"expert/{path}/bias"] = ((f"{name}.bias", None),)
    return rules


@dataclasses.dataclass(frozen=True)
class Piece:
    """One weight of one layer, and where it stands: an array's name and an index into its leading axes."""

    part: str  # vision, language or expert
    shape: tuple[int, ...]  # in our axes
    ours: tuple[str, tuple[int, ...]]
    openpi: tuple[str, tuple[int, ...]]
    torch: tuple[str, tuple[int, ...]]
    layout: Layout | None  # of the PyTorch tensor; None: our axes
    keep_float32: bool  # computes in float32, so it is not stored in less unless that is asked for

    def place(self, style: Style) -> tuple[str, tuple[int, ...]]:
        """Array and index in a format."""
        return getattr(self, style)

    def shape_in(self, style: Style) -> tuple[int, ...]:
        """Shape of the piece itself in a format."""
        return self.shape if style != "torch" or self.layout is None else self.layout.torch_shape(self.shape)

    def float32_in(self, style: Style) -> bool:
        """Whether a bfloat16 checkpoint of a format holds this in float32 all the same."""
        # openpi's PyTorch model casts the vision tower's layer norms like its kernels.
        return self.keep_float32 and not (style == "torch" and "norm" in self.torch[0] and self.part == "vision")


def pieces(config: Pi05Config) -> list[Piece]:
    """All pieces of a model; those of one array of ours follow each other in its memory's order."""
    return list(_pieces(config))


def _pieces(config: Pi05Config) -> Iterator[Piece]:
    rules, openpi = _rules(), openpi_names()
    for path, variable in nnx.to_flat_state(nnx.state(abstract_model(config))):
        name = "/".join(map(str, path))
        stacked = name.replace("language/last/", "language/layers/")
        shape = tuple(variable.get_value().shape)
        # adaRMS modulation is part of a norm, and openpi keeps it in float32 as such.
        keep = bool(variable.get_metadata("keep_float32")) or "modulation" in name
        make = functools.partial(Piece, part=str(path[0]), keep_float32=keep)
        dotted = ".".join(map(str, path))
        layers: range | tuple[None] = range(shape[0]) if "/layers/" in name else (None,)
        for layer in layers:
            number = config.language.depth - 1 if stacked != name else layer
            for j, (torch, layout) in enumerate(rules[stacked]):
                inner = () if len(rules[stacked]) == 1 else (j,)
                index = (() if layer is None else (layer,)) + inner
                yield make(
                    shape=shape[len(index) :],
                    ours=(dotted, index),
                    openpi=(openpi[stacked], (() if number is None else (number,)) + inner),
                    torch=(torch.format(number), ()),
                    layout=layout,
                )


def shapes(all_pieces: list[Piece], style: Style) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array that a checkpoint of these pieces holds."""
    counts: dict[str, list[int]] = {}
    inner: dict[str, tuple[int, ...]] = {}
    for piece in all_pieces:
        name, index = piece.place(style)
        inner[name] = piece.shape_in(style)
        known = counts.setdefault(name, [0] * len(index))
        counts[name] = [max(k, i + 1) for k, i in zip(known, index, strict=True)]
    return {name: (*counts[name], *inner[name]) for name in inner}


def parameters(shape_of: Mapping[str, tuple[int, ...]]) -> int:
    """Entries of all arrays."""
    return sum(math.prod(shape) for shape in shape_of.values())
