"""openpi's image augmentation for SFT, on the device: crop, rotation and colour jitter, a draw for each image.

The formulas are those of augmax 0.4.1, which openpi trains with: the numbers of tests/reference/augment.npz.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

CROP = 0.95  # side of the random crop, as a share of the image
ROTATION_DEG = 5.0
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5  # largest amounts, either way
HUE = 0.1  # of a full turn: openpi does not name it, augmax does it by default
COLOUR_SHARE = 0.5  # of the images have their colours changed; augmax's default too


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

    Bilinear, in one resampling; outside of the image everything is black.
    """
    size = image.shape[0]
    grid = (jnp.arange(size) + 0.5) / size * side - side / 2  # from the crop's centre, pixels
    rows, columns = jnp.meshgrid(grid, grid, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source_rows = cos * rows - sin * columns + top + side / 2 - 0.5
    source_columns = sin * rows + cos * columns + left + side / 2 - 0.5
    framed = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    return _bilinear(framed, source_rows + 1, source_columns + 1)


def _bilinear(
    image: Float[Array, "S S 3"], rows: Float[Array, "T T"], columns: Float[Array, "T T"]
) -> Float[Array, "T T 3"]:
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
    image: Float[Array, "S S 3"],
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    hue: Float[Array, ""],
    saturation: Float[Array, ""],
) -> Float[Array, "S S 3"]:
    """Changes each pixel's hue, saturation and value by amounts around 0.

    Brightness fades the value towards 0 (amount < 0) or 1 (> 0), contrast bends it about one half, the hue turns. The
    saturation is scaled as openpi's setting says; augmax computes that and then discards it.
    """
    hues, saturations, values = _hsv((image + 1.0) / 2.0)
    values = _bend(_fade(values, brightness), contrast)
    rgb = _rgb(hues + hue, jnp.clip(saturations * (1 + saturation), 0.0, 1.0), values)
    return jnp.clip(rgb, 0.0, 1.0) * 2.0 - 1.0


def _fade(x: Array, amount: Array) -> Array:
    return jnp.where(amount < 0, x * (1 + amount), x * (1 - amount) + amount)


def _bend(x: Array, contrast: Array) -> Array:
    """Piecewise linear through (0, 0), (1/2, 1/2), (1, 1): slope `steep` in the middle, its inverse at both ends."""
    steep = jnp.tan((contrast + 1.0) * (jnp.pi / 4))
    low = steep / (2 * (1 + steep))
    ends = jnp.where(x < low, x / steep, (x - 1) / steep + 1)
    return jnp.where((x < low) | (x > 1 - low), ends, steep * (x - 0.5) + 0.5)


def _hsv(rgb: Float[Array, "S S 3"]) -> tuple[Float[Array, "S S"], Float[Array, "S S"], Float[Array, "S S"]]:
    """Hue (turns), saturation and value; hue and saturation of a grey pixel are 0."""
    value = jnp.max(rgb, axis=-1)
    spread = value - jnp.min(rgb, axis=-1)
    divisor = jnp.where(spread == 0, 1.0, spread)
    red, green, blue = jnp.moveaxis(rgb, -1, 0)
    sextants = jnp.stack([(green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor])
    largest = jnp.argmax(rgb, axis=-1)
    hue = jnp.take_along_axis(sextants, largest[None], axis=0)[0] / 6
    grey, dark = spread == 0, value == 0
    return jnp.where(grey, 0.0, hue), jnp.where(dark, 0.0, spread / jnp.where(dark, 1.0, value)), value


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    place = jnp.mod(jnp.array([5.0, 3.0, 1.0]) + hue[..., None] * 6, 6)
    share = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * share)


def _random_move(key: Key[Array, ""], image: Float[Array, "S S 3"]) -> Float[Array, "S S 3"]:
    crop_key, angle_key = jax.random.split(key)
    side = int(image.shape[0] * CROP)
    top, left = jax.random.uniform(crop_key, (2,), maxval=float(image.shape[0] - side))
    angle = jnp.deg2rad(jax.random.uniform(angle_key, (), minval=-ROTATION_DEG, maxval=ROTATION_DEG))
    return move(image, top, left, side, angle).astype(image.dtype)


def _random_colour(key: Key[Array, ""], image: Float[Array, "S S 3"]) -> Float[Array, "S S 3"]:
    share_key, amount_key = jax.random.split(key)
    widths = jnp.array([BRIGHTNESS, CONTRAST, HUE, SATURATION])
    amounts = widths * jax.random.uniform(amount_key, (4,), minval=-1.0, maxval=1.0)
    changed = jax.random.bernoulli(share_key, COLOUR_SHARE)
    return jnp.where(changed, colour(image, *amounts), image).astype(image.dtype)
