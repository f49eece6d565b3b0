"""openpi's image augmentation for SFT, on the device: crop, rotation and colour jitter, a draw for each image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

CROP = 0.95  # side of the random crop, as a share of the image
ROTATION_DEG = 5.0
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5  # half-widths of the factors around 1
_LUMA = (0.299, 0.587, 0.114)


@functools.partial(jax.jit, static_argnames="moved_slots")
def augment(
    key: Key[Array, ""], images: Float[Array, "B C S S 3"], moved_slots: tuple[int, ...] = (0,)
) -> Float[Array, "B C S S 3"]:
    """Images in [-1, 1], each with its own random change of colour; those of `moved_slots` also cropped and rotated.

    openpi moves the base camera only: a wrist camera's view is part of the geometry of the grasp.
    """
    batch, slots = images.shape[:2]
    keys = jax.random.split(key, (slots, 2, batch))
    out = []
    for slot in range(slots):
        view = images[:, slot]
        if slot in moved_slots:
            view = jax.vmap(_random_move)(keys[slot, 0], view)
        out.append(jax.vmap(_random_colour)(keys[slot, 1], view))
    return jnp.stack(out, axis=1)


def move(
    image: Float[Array, "S S 3"], top: Float[Array, ""], left: Float[Array, ""], side: float, angle: Float[Array, ""]
) -> Float[Array, "S S 3"]:
    """The crop of `side` pixels at (top, left), turned clockwise by `angle` radians about its centre and enlarged to S.

    Bilinear, in one resampling; what lies outside of the image is black.
    """
    size = image.shape[0]
    grid = (jnp.arange(size) + 0.5) / size * side - side / 2  # from the crop's centre, pixels
    rows, columns = jnp.meshgrid(grid, grid, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source_rows = cos * rows - sin * columns + top + side / 2 - 0.5
    source_columns = sin * rows + cos * columns + left + side / 2 - 0.5
    inside = (jnp.abs(source_rows - (size - 1) / 2) <= size / 2) & (
        jnp.abs(source_columns - (size - 1) / 2) <= size / 2
    )
    return jnp.where(inside[..., None], _bilinear(image, source_rows, source_columns), -1.0)


def _bilinear(
    image: Float[Array, "S S 3"], rows: Float[Array, "S S"], columns: Float[Array, "S S"]
) -> Float[Array, "S S 3"]:
    """The image at fractional pixels; the border repeats. All channels of a pixel are gathered together."""
    size = image.shape[0]
    rows, columns = jnp.clip(rows, 0, size - 1), jnp.clip(columns, 0, size - 1)
    top, left = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, size - 1), jnp.minimum(left + 1, size - 1)
    down, along = (rows - top)[..., None], (columns - left)[..., None]
    upper = image[top, left] * (1 - along) + image[top, right] * along
    lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
    return upper * (1 - down) + lower * down


def colour(
    image: Float[Array, "S S 3"], brightness: Float[Array, ""], contrast: Float[Array, ""], saturation: Float[Array, ""]
) -> Float[Array, "S S 3"]:
    """Scales brightness, then contrast about the mean grey, then saturation about each pixel's grey; clips."""
    value = (image + 1.0) / 2.0 * brightness
    mean = jnp.mean(value @ jnp.asarray(_LUMA, value.dtype))
    value = mean + contrast * (value - mean)
    grey = (value @ jnp.asarray(_LUMA, value.dtype))[..., None]
    value = grey + saturation * (value - grey)
    return jnp.clip(value, 0.0, 1.0) * 2.0 - 1.0


def _random_move(key: Key[Array, ""], image: Float[Array, "S S 3"]) -> Float[Array, "S S 3"]:
    crop_key, angle_key = jax.random.split(key)
    side = int(image.shape[0] * CROP)
    top, left = jax.random.uniform(crop_key, (2,), maxval=float(image.shape[0] - side))
    angle = jnp.deg2rad(jax.random.uniform(angle_key, (), minval=-ROTATION_DEG, maxval=ROTATION_DEG))
    return move(image, top, left, side, angle).astype(image.dtype)


def _random_colour(key: Key[Array, ""], image: Float[Array, "S S 3"]) -> Float[Array, "S S 3"]:
    widths = jnp.array([BRIGHTNESS, CONTRAST, SATURATION])
    factors = 1.0 + widths * jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
    return colour(image, *factors).astype(image.dtype)
