"""Low-rank adapters (LoRA): y + (α/r)·(x·a)·b beside a frozen kernel, and folding them into it.

The two arrays of an adapter are parameters of their own, so that an optimiser can train them alone. Their metadata say
how to fold them into the kernel, so that a state can be folded without its module.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from z1_jax.models.params import ZEROS, Init, Pattern, param
from z1_jax.sharding import constrain

SUFFIX = "_lora"  # the adapter of parameter `kernel` is `kernel_lora`, beside it


class Adapter(nnx.Module):
    """The low-rank change of one kernel; b starts at zero, and with it the change.

    Args:
        pattern: the einsum that applies the kernel to an input, such as "...d,ckdh->c...kh". A dimension of the kernel
            that stands before the tokens in the output (c) counts several kernels: each has an adapter of its own.
        kernel: the parameter, perhaps stacked over layers.
    """

    def __init__(self, pattern: str, kernel: nnx.Param, rank: int, alpha: float):
        if rank < 1:
            raise ValueError(f"an adapter's rank must be positive; got {rank}")
        letters, contracted, several, produced = dataclasses.astuple(Pattern.parse(pattern))
        shape, axes = kernel.get_value().shape, kernel.get_metadata("logical_axes")
        stacked = len(shape) - len(letters)  # 1: the kernel has a leading layers axis
        size = dict(zip(letters, shape[stacked:], strict=True))
        axis = dict(zip(letters, axes[stacked:], strict=True))

        def declare(names: str, init: Init, pattern: str) -> nnx.Param:
            dims = tuple(size.get(name, rank) for name in names)
            layers = shape[0] if stacked else None
            return param(dims, tuple(axis.get(name) for name in names), init, layers=layers, pattern=pattern)

        fan_in = math.prod(size[name] for name in contracted)
        self.down = f"...{contracted},{several}{contracted}r->{several}...r"
        self.up = f"{several}...r,{several}r{produced}->{several}...{produced}"
        self.several, self.scale = len(several), alpha / rank
        self.a = declare(f"{several}{contracted}r", Init(fan_in**-0.5), self.down)
        self.b = declare(f"{several}r{produced}", ZEROS, self.up)
        layer = "L" * stacked
        fold = f"{layer}{several}{contracted}r,{layer}{several}r{produced}->{layer}{letters}"
        self.b.set_metadata("fold", fold)
        self.b.set_metadata("scale", self.scale)

    def __call__(self, x: Float[Array, "..."]) -> Array:
        """The change of the kernel's output for its input `x`, in the dtype of `x`."""
        low = jnp.einsum(self.down, x, self.a[...].astype(x.dtype))
        low = constrain(low, *(None,) * self.several, "batch")
        return jnp.einsum(self.up, low, self.b[...].astype(x.dtype)) * self.scale


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether a parameter path belongs to an adapter."""
    return any(str(name).endswith(SUFFIX) for name in path)


def has_adapters(state: nnx.State) -> bool:
    """Whether a state holds adapters that are not folded in."""
    return any(is_adapter(path) for path, _ in nnx.to_flat_state(state))


def fold(state: nnx.State) -> nnx.State:
    """The state without adapters: each is added to its kernel, which becomes float32 and stays on its shards.

    The network computes the same, up to rounding; in bfloat16 a change smaller than a weight's rounding is lost when
    the folded weight is cast.
    """
    flat = dict(nnx.to_flat_state(state))
    adapters = [path[:-1] for path in flat if is_adapter(path) and path[-1] == "b"]
    if not adapters:
        return state
    targets = [(*path[:-1], str(path[-1]).removesuffix(SUFFIX)) for path in adapters]
    recipes = [(flat[(*path, "b")].get_metadata("fold"), flat[(*path, "b")].get_metadata("scale")) for path in adapters]
    parts = [
        (flat[target].get_value(), flat[(*path, "a")].get_value(), flat[(*path, "b")].get_value())
        for target, path in zip(targets, adapters, strict=True)
    ]

    def add(parts: list[tuple[Array, Array, Array]]) -> list[Array]:
        return [
            kernel.astype(jnp.float32) + scale * jnp.einsum(pattern, a, b)
            for (kernel, a, b), (pattern, scale) in zip(parts, recipes, strict=True)
        ]

    folded = jax.jit(add, out_shardings=[kernel.sharding for kernel, _, _ in parts])(parts)
    for target, value in zip(targets, folded, strict=True):
        flat[target] = flat[target].replace(value)
    return nnx.from_flat_state([(path, variable) for path, variable in flat.items() if not is_adapter(path)])
