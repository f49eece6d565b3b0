import jax
import numpy as np
import pytest
import scipy.ndimage

from z1_jax.data.augment import augment, colour, move

SEED = int(np.random.default_rng().integers(2**31))


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


def test_colour_by_hand():
    image = np.zeros((2, 2, 3), np.float32)  # value 0.5 everywhere
    image[0, 0] = [1.0, -1.0, -1.0]  # pure red: (1, 0, 0), grey 0.299
    brighter = colour(image, 1.2, 1.0, 1.0)
    np.testing.assert_allclose(brighter[1, 1], 0.5 * 1.2 * 2 - 1, atol=1e-6)
    np.testing.assert_allclose(brighter[0, 0], [1.0, -1.0, -1.0], atol=1e-6)  # clipped
    grey = colour(image, 1.0, 1.0, 0.0)
    np.testing.assert_allclose(grey[0, 0], 0.299 * 2 - 1, atol=1e-6)
    mean = (3 * 0.5 + 0.299) / 4
    flat = colour(image, 1.0, 0.5, 1.0)
    np.testing.assert_allclose(flat[1, 1], (mean + 0.5 * (0.5 - mean)) * 2 - 1, atol=1e-6)


def test_augment_is_random_per_image_and_moves_only_its_slots(rng):
    stripes = np.where(np.arange(32) % 8 < 4, -0.5, 0.5).astype(np.float32)  # grey rows, equal along each row
    images = np.broadcast_to(stripes[:, None, None], (4, 2, 32, 32, 3))
    key = jax.random.key(SEED)
    out = np.asarray(augment(key, images))
    assert out.shape == images.shape and np.abs(out).max() <= 1
    assert np.ptp(out[:, 1], axis=2).max() < 1e-5 < np.ptp(out[:, 0], axis=2).max()  # the wrist's rows stay rows
    assert len({float(view.mean()) for view in out.reshape(8, -1)}) == 8
    np.testing.assert_array_equal(out, augment(key, images))
    assert np.abs(out - augment(jax.random.key(SEED + 1), images)).max() > 0.01
