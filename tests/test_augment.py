import pathlib

import jax
import numpy as np
import pytest
import scipy.ndimage
from seeds import fresh_seed

from z1_jax.data.augment import augment, colour, move
from z1_jax.sft import augmented, normal
from z1_jax.types import Observation

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "augment.npz")  # augmax 0.4.1, as openpi calls it

SEED = fresh_seed(__name__)


@pytest.fixture
def rng() -> np.random.Generator:
    print("seed", SEED)
    return np.random.default_rng(SEED)


def test_nothing_moved_is_the_image(rng):
    image = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(move(image, 0.0, 0.0, 16, 0.0), image, atol=1e-5)


def test_a_quarter_turn_is_rot90(rng):
    image = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(move(image, 0.0, 0.0, 16, np.pi / 2), np.rot90(image, -1), atol=1e-4)


def test_crop_and_turn_match_scipy(rng):
    size, side, top, left, angle = 20, 15, *rng.uniform(1, 4, 2), 0.08
    image = rng.uniform(-1, 1, (size, size, 3)).astype(np.float32)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * side / size
    centre = np.array([top, left]) + side / 2 - 0.5
    offset = centre - turn @ np.full(2, (size - 1) / 2)
    for channel in range(3):
        expected = scipy.ndimage.affine_transform(image[..., channel], turn, offset, order=1, mode="nearest")
        got = move(image, top, left, side, angle)[..., channel]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_outside_is_black():
    turned = np.asarray(move(np.ones((32, 32, 3), np.float32), 0.0, 0.0, 32, np.pi / 4))
    assert (turned[0, 0] == -1).all() and (turned[16, 16] == 1).all()


@pytest.mark.parametrize("case", range(4))
def test_crop_and_turn_are_openpis(case):
    """augmax's RandomCrop, Resize and Rotate; its images are 0..1, and its angles count the other way."""
    top, left, side, angle = REFERENCE[f"move/{case}/top_left_side_angle"]
    got = np.asarray(move(REFERENCE["image"] * 2 - 1, top, left, int(side), -angle))
    np.testing.assert_allclose(got / 2 + 0.5, REFERENCE[f"move/{case}/out"], atol=1e-5)


@pytest.mark.parametrize("case", range(5))
def test_colours_are_openpis(case):
    """augmax's ColorJitter, which leaves saturation alone; grey, black and white pixels are in the image."""
    amounts = REFERENCE[f"colour/{case}/brightness_contrast_hue"]
    got = np.asarray(colour(REFERENCE["image"] * 2 - 1, *amounts, 0.0))
    np.testing.assert_allclose(got / 2 + 0.5, REFERENCE[f"colour/{case}/out"], atol=1e-5)


def test_saturation_by_hand():
    image = np.zeros((1, 2, 3), np.float32)
    image[0, 0] = [0.6, -0.2, 0.2]  # 0.8, 0.4, 0.6: saturation 0.5
    image[0, 1] = 0.5  # grey stays grey
    less = colour(image, 0.0, 0.0, 0.0, -0.5)  # saturation 0.25: what misses to 0.8 halves
    np.testing.assert_allclose(less[0, 0], [0.6, 0.2, 0.4], atol=1e-6)
    more = colour(image, 0.0, 0.0, 0.0, 0.5)  # saturation 0.75
    np.testing.assert_allclose(more[0, 0], [0.6, -0.6, 0.0], atol=1e-6)
    np.testing.assert_allclose([less[0, 1], more[0, 1]], np.full((2, 3), 0.5), atol=1e-6)


def test_augment_is_random_per_image_and_moves_only_its_slots(rng):
    stripes = np.where(np.arange(32) % 8 < 4, -0.5, 0.5).astype(np.float32)  # grey rows, equal along each row
    images = np.broadcast_to(stripes[:, None, None], (64, 2, 32, 32, 3))
    key = jax.random.key(SEED)
    out = np.asarray(augment(key, images))
    assert out.shape == images.shape and np.abs(out).max() <= 1
    assert np.ptp(out[:, 1], axis=2).max() < 1e-5 < np.ptp(out[:, 0], axis=2).max()  # the wrist's rows stay rows
    changed = [view for view in out[:, 1] if np.abs(view - images[0, 0]).max() > 0]
    assert 12 <= len(changed) <= 52  # half of 64, by 5 standard deviations
    assert len({float(view.mean()) for view in changed}) == len(changed)
    np.testing.assert_array_equal(out, augment(key, images))
    assert np.abs(out - augment(jax.random.key(SEED + 1), images)).max() > 0.01


def test_sft_changes_the_images_and_nothing_else(rng):
    images = rng.integers(0, 256, (64, 2, 32, 32, 3), dtype=np.uint8)
    observation = Observation(images, np.ones((64, 2), bool), np.zeros((64, 3), np.int32), np.ones((64, 3), bool))
    key = jax.random.key(SEED)
    out = augmented(observation, key, (0,))
    expected = augment(key, images.astype(np.float32) / 255 * 2 - 1)
    np.testing.assert_allclose(out.images, expected, atol=1e-6)
    assert out.tokens is observation.tokens and out.image_mask is observation.image_mask


@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (7,)])
def test_noise_is_that_of_jax_bit_for_bit(rng, shape):
    key = jax.random.key(int(rng.integers(2**31)))
    ours, theirs = (np.asarray(draw(key, shape)).view(np.uint32) for draw in (normal, jax.random.normal))
    np.testing.assert_array_equal(ours, theirs)
