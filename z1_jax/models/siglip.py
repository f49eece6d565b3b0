"""The SigLIP vision tower: images to tokens of the language model's width."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from z1_jax.models import attention
from z1_jax.models.compute import Compute
from z1_jax.models.layers import Einsum, LayerNorm, Mlp, dense, scan_layers
from z1_jax.models.params import ZEROS, Init, param
from z1_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Size of the vision tower. `image_size` and `patch` in pixels."""

    width: int
    depth: int
    mlp: int
    heads: int
    patch: int
    image_size: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"vision {name} must be positive; got {value}")
        if self.width % self.heads:
            raise ValueError(f"vision width must be a multiple of heads; got width {self.width}, heads {self.heads}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch; got {self.image_size} and {self.patch}")

    @property
    def tokens(self) -> int:
        """Tokens that one image becomes."""
        return (self.image_size // self.patch) ** 2


class SiglipBlock(nnx.Module):
    """Pre-norm transformer block with biases; all tokens of an image attend to each other."""

    def __init__(self, config: SiglipConfig, layers: int):
        width, heads, head_dim = config.width, config.heads, config.width // config.heads

        def projection() -> Einsum:
            return Einsum(
                "...d,dnh->...nh",
                (width, heads, head_dim),
                ("embed", "heads", None),
                Init(width**-0.5),
                bias=((heads, head_dim), ("heads", None)),
                layers=layers,
            )

        self.norm_attention = LayerNorm(width, layers=layers)
        self.norm_mlp = LayerNorm(width, layers=layers)
        self.q, self.k, self.v = projection(), projection(), projection()
        self.out = Einsum(
            "...nh,nhd->...d",
            (heads, head_dim, width),
            ("heads", None, "embed"),
            Init(width**-0.5),
            bias=((width,), (None,)),
            layers=layers,
        )
        self.mlp = Mlp(width, config.mlp, layers=layers)
        self.query_scale = head_dim**-0.5

    def adapt(self, rank: int, alpha: float) -> None:
        """Adds low-rank adapters to the kernels of attention and MLP."""
        for linear in (self.q, self.k, self.v, self.out, self.mlp):
            linear.adapt(rank, alpha)

    def __call__(self, x: Float[Array, "B T W"], implementation: str) -> Float[Array, "B T W"]:
        h = self.norm_attention(x)
        q = constrain(self.q(h) * self.query_scale, "batch", None, "heads")
        k, v = constrain(self.k(h), "batch", None, "heads"), constrain(self.v(h), "batch", None, "heads")
        x = constrain(x + self.out(attention.attend(q, k, v, None, implementation)), "batch")
        return constrain(x + self.mlp(self.norm_mlp(x)), "batch")


def split_patches(images: Float[Array, "B S S 3"], patch: int) -> Float[Array, "B P 3pp"]:
    """Images cut into squares of `patch` pixels, in float32."""
    side = images.shape[1] // patch
    patches = images.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, side * side, 3 * patch**2).astype(jnp.float32)


class Siglip(nnx.Module):
    """Patches, position embedding, encoder, norm, and the linear head to `out_width`."""

    def __init__(
        self,
        config: SiglipConfig,
        out_width: int,
        compute: Compute,
    ):
        self.config, self.compute = config, compute
        patch_shape = (config.patch, config.patch, 3, config.width)
        patch_std = (3 * config.patch**2) ** -0.5
        patch_axes = (None, None, None, "embed")
        self.patch_kernel = param(
            patch_shape, patch_axes, Init(patch_std), keep_float32=True, pattern="...xyc,xycd->...d"
        )
        self.patch_bias = param((config.width,), (None,), ZEROS, keep_float32=True)
        position_shape, position_std = (1, config.tokens, config.width), config.width**-0.5
        self.position = param(position_shape, (None, None, "embed"), Init(position_std), keep_float32=True)
        self.layers = SiglipBlock(config, config.depth)
        self.norm = LayerNorm(config.width)
        self.head = dense(config.width, out_width, ("embed", None))

    def embed_patches(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        """Patches with their position embedding, in float32. Images in [-1, 1]."""
        patch = self.config.patch
        kernel = self.patch_kernel[...].reshape(3 * patch**2, self.config.width)
        x = split_patches(images, patch) @ kernel + self.patch_bias[...]
        return constrain(x + self.position[...], "batch")

    def encode(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        """The encoder's normalised output, before the head."""
        x = self.embed_patches(images).astype(self.compute.dtype)

        def step(layer: SiglipBlock, x: Array, _: None) -> tuple[Array, None]:
            return layer(x, self.compute.attention), None

        x, _ = scan_layers(self.layers, step, x, self.compute)
        return self.norm(x)

    def __call__(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B P D"]:
        """Image tokens of the language model's width, in the compute dtype."""
        return constrain(self.head(self.encode(images)), "batch")
