"""The arrays that travel between modules: shapes and units, nothing else."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """Model inputs of a batch. `C` camera slots, `S` pixels, `L` prompt tokens."""

    images: Array  # [B, C, S, S, 3]; uint8 0..255, or float32 already in [-1, 1]
    image_mask: Bool[Array, "B C"]  # false where the camera is missing
    tokens: Int[Array, "B L"]  # prompt (with the discretised state), padded with 0
    token_mask: Bool[Array, "B L"]  # true at real tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the VLM for a batch of observations: all that the action expert needs of them."""

    k: Float[Array, "layers B T K D"]  # rotated keys; K kv heads of width D
    v: Float[Array, "layers B T K D"]
    mask: Bool[Array, "B T"]  # true at tokens that may be attended to

    def take(self, rows: Int[Array, " N"]) -> PrefixCache:
        """The cache of observations `rows`, in that order (repeats allowed)."""
        return PrefixCache(self.k[:, rows], self.v[:, rows], self.mask[rows])
