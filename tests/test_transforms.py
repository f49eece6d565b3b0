import pathlib

import numpy as np
import pytest
from seeds import fresh_seed

from envs.base import EnvObservation
from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
from z1_jax.data.transforms import InputProcessor, parse_image, resize_with_pad

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "misc.npz")
TOKENIZER = PromptTokenizer(train_small_tokenizer(kitchen_instructions()), 48)
SEED = fresh_seed(__name__)


@pytest.fixture
def rng() -> np.random.Generator:
    print("seed", SEED)
    return np.random.default_rng(SEED)


def make_processor(cameras=("left", "wrist"), **kwargs) -> InputProcessor:
    """State in [-2, 2] x 3; actions: dimension 0 in [0, 10], 1 constant -1, 2 in [-1, 1]."""
    state = NormStats(mean=np.zeros(3), std=np.ones(3), q01=np.full(3, -2.0), q99=np.full(3, 2.0))
    actions = NormStats(mean=[5.0, -1.0, 0.0], std=[3.0, 0.0, 0.5], q01=[0.0, -1.0, -1.0], q99=[10.0, -1.0, 1.0])
    return InputProcessor(TOKENIZER, {"state": state, "actions": actions}, cameras, 8, 5, **kwargs)


def make_observation(rng, size=8, state=(0.0, 1.0, -3.0)) -> EnvObservation:
    images = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("left", "right", "wrist")}
    return EnvObservation(images, np.asarray(state, np.float32), "open the left drawer")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_resize_matches_openpi(case):
    image, (height, width) = REFERENCE[f"resize/{case}/in_uint8"][0], REFERENCE[f"resize/{case}/target"]
    got = resize_with_pad(image, int(height), int(width))
    np.testing.assert_array_equal(got, REFERENCE[f"resize/{case}/pil_uint8"][0])
    assert np.abs(got.astype(int) - REFERENCE[f"resize/{case}/jax_uint8"][0]).max() <= 1


@pytest.mark.parametrize("case", [0, 1, 2])
def test_float_resize_matches_openpi(case):
    image, (height, width) = REFERENCE[f"resize/{case}/in_uint8"][0], REFERENCE[f"resize/{case}/target"]
    got = resize_with_pad(image.astype(np.float32) / 255 * 2 - 1, int(height), int(width))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, REFERENCE[f"resize/{case}/jax_float"][0], atol=1e-5)


def test_resize_of_any_size_keeps_a_plane_and_its_aspect(rng):
    """A plane stays a plane under bilinear resampling, away from the border: where each pixel came from is known."""
    height, width, target_h, target_w = (int(x) for x in rng.integers(20, 90, 4))
    ratio = max(width / target_w, height / target_h)
    inner_h, inner_w = int(height / ratio), int(width / ratio)
    rows, columns = np.mgrid[:height, :width]
    slopes = rng.uniform(-1, 1, (2, 3)) / 100
    image = (rows[..., None] * slopes[0] + columns[..., None] * slopes[1]).astype(np.float32) / 2
    got = resize_with_pad(image, target_h, target_w)
    top, left = (target_h - inner_h) // 2, (target_w - inner_w) // 2
    rows = (np.arange(inner_h) + 0.5) * height / inner_h - 0.5
    columns = (np.arange(inner_w) + 0.5) * width / inner_w - 0.5
    expected = (rows[:, None, None] * slopes[0] + columns[None, :, None] * slopes[1]) / 2
    inner = got[top : top + inner_h, left : left + inner_w]
    edge = int(np.ceil(2 / min(ratio, 1)))
    away = np.s_[edge : inner_h - edge, edge : inner_w - edge]
    np.testing.assert_allclose(inner[away], expected[away], atol=0.02)
    padding = np.ones((target_h, target_w), bool)
    padding[top : top + inner_h, left : left + inner_w] = False
    assert (got[padding] == -1).all()


def test_images_of_every_kind_give_the_same_pixels(rng):
    """LeRobot's floats come channels first; a float is scaled and truncated as in openpi."""
    image = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    assert parse_image(image) is image
    for kind in (np.int64, np.uint16, np.int32):
        np.testing.assert_array_equal(parse_image(image.astype(kind)), image)
        np.testing.assert_array_equal(parse_image(image.astype(kind).transpose(2, 0, 1)), image)
    for kind in (np.float64, np.float32):
        floats = ((image + 0.5) / 256).astype(kind)
        np.testing.assert_array_equal(parse_image(floats), (255 * floats).astype(np.uint8))
        np.testing.assert_array_equal(parse_image(floats.transpose(2, 0, 1)), (255 * floats).astype(np.uint8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 4), np.uint8), "expected \\[height, width, 3\\]"),
        (np.zeros((4, 4, 4), np.uint8), "expected \\[height, width, 3\\]"),
        (np.zeros((0, 4, 3), np.uint8), "expected \\[height, width, 3\\]"),
        (np.full((4, 4, 3), 300), "values 300..300; expected 0..255"),
        (np.full((4, 4, 3), -0.5), "values -0.5..-0.5; expected 0..1"),
        (np.full((4, 4, 3), 17.0), "expected 0..1"),
        (np.full((4, 4, 3), np.nan, np.float32), "expected 0..1"),
        (np.zeros((4, 4, 3), bool), "image is bool"),
    ],
)
def test_other_images_are_refused_with_their_camera(bad, message, rng):
    observation = make_observation(rng)
    observation.images["wrist"] = bad
    with pytest.raises(ValueError, match=f"camera 'wrist': .*{message}"):
        make_processor().observation([observation])


def test_resize_leaves_a_fitting_image_alone(rng):
    image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    assert resize_with_pad(image, 12, 16) is image


def test_resize_pads_with_black_around_the_centre():
    out = resize_with_pad(np.full((10, 20, 3), 255, np.uint8), 8, 8)
    assert (out[2:6] == 255).all() and not out[:2].any() and not out[6:].any()


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float64), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), "u1")]
)
def test_resize_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="expected uint8"):
        resize_with_pad(bad, 8, 8)


def test_observation_fills_the_used_slots_in_order(rng):
    """A slot without a camera is left out: masked, it would change no velocity (tests/test_models.py)."""
    raw = [make_observation(rng), make_observation(rng)]
    processor = make_processor(("wrist", None, "left"))
    batch = processor.observation(raw)
    assert batch.images.shape == (2, 2, 8, 8, 3) and batch.images.dtype == np.uint8
    for row, observation in zip(batch.images, raw, strict=True):
        np.testing.assert_array_equal(row[0], observation.images["wrist"])
        np.testing.assert_array_equal(row[1], observation.images["left"])
    assert batch.image_mask.shape == (2, 2) and batch.image_mask.all()
    assert processor.used_slots == (0, 2) and processor.moved_slots == (0,)
    assert make_processor((None, "wrist")).moved_slots == ()  # no base camera


def test_observation_resizes(rng):
    raw = make_observation(rng, size=20)
    batch = make_processor().observation([raw])
    np.testing.assert_array_equal(batch.images[0, 0], resize_with_pad(raw.images["left"], 8, 8))


def test_prompt_holds_the_normalised_state(rng):
    batch = make_processor().observation([make_observation(rng, state=(0.0, 1.0, -3.0))])
    ids = TOKENIZER.number_ids()
    found = [int(np.flatnonzero(ids == token)[0]) - 1 for token in batch.tokens[0] if token in ids]
    # state / 2 to within openpi's 1e-6 of the span: just below 0 -> 127, just below 0.5 -> 191, -1.5 -> -1
    assert found == [127, 191, -1]


def test_state_may_stay_out_of_the_prompt(rng):
    batch = make_processor(state_in_prompt=False).observation([make_observation(rng)])
    assert not np.isin(batch.tokens[0], TOKENIZER.number_ids()).any()
    np.testing.assert_array_equal(batch.tokens[0], TOKENIZER.encode("open the left drawer", None)[0])


def test_states_are_binned_before_they_are_rounded(rng):
    """On the edge of a bin, double precision decides: openpi bins what it normalised, before any float32."""
    q01 = -rng.integers(30, 60, 50).astype(float)
    stats = NormStats(mean=np.zeros(50), std=np.full(50, 20.0), q01=q01, q99=-q01)
    processor = InputProcessor(
        PromptTokenizer(TOKENIZER.model_bytes, 80), {"state": stats, "actions": make_processor().stats["actions"]},
        ("left",), 8, 5,
    )  # fmt: skip
    states = (-q01 * 0.5)[None].astype(np.float32)  # a hair below 0.5, by openpi's 1e-6 of the span
    normalised = (states - q01) / (-2 * q01 + 1e-6) * 2 - 1
    assert (normalised < 0.5).all() and (normalised.astype(np.float32) == 0.5).any()
    tokens, _ = processor.prompts(["open the drawer"], states)
    np.testing.assert_array_equal(tokens[0][np.isin(tokens[0], TOKENIZER.number_ids())], TOKENIZER.number_ids()[192])


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_actions_of_any_shape_survive_the_round_trip(rng, mode):
    """Raw → model → raw, for random widths and padding; the padding is zero."""
    width = int(rng.integers(1, 20))
    padded = width + int(rng.integers(0, 13))
    data = rng.normal(size=(300, width)) * rng.uniform(0.01, 100, width) + rng.normal(size=width) * 10
    stats = NormStats(data.mean(0), data.std(0), *np.quantile(data, [0.01, 0.99], axis=0))
    processor = InputProcessor(TOKENIZER, {"state": stats, "actions": stats}, ("left",), 8, padded, norm_mode=mode)
    raw = data[rng.integers(0, 300, tuple(rng.integers(1, 5, int(rng.integers(1, 4)))))]
    model = processor.model_actions(raw)
    assert model.shape == (*raw.shape[:-1], padded) and model.dtype == np.float32 and not model[..., width:].any()
    error = np.abs(processor.env_actions(model) - raw) / (np.abs(data).max(0) + data.std(0))
    assert error.max() < 1e-6
    np.testing.assert_allclose(processor.model_states(raw.reshape(-1, width)), model[..., :width].reshape(-1, width))


def test_actions_roundtrip_padded_with_zeros(rng):
    processor = make_processor()
    raw = np.stack([rng.uniform(-2, 12, (4, 6)), np.full((4, 6), -1.0), rng.normal(size=(4, 6))], axis=-1)
    model = processor.model_actions(raw)
    assert model.shape == (4, 6, 5) and model.dtype == np.float32
    np.testing.assert_allclose(model[..., 0], raw[..., 0] / 5 - 1, atol=1e-5)
    assert (model[..., 1] == -1).all() and not model[..., 3:].any()
    np.testing.assert_allclose(processor.env_actions(model), raw, atol=1e-5)


def test_constant_dimensions_are_held_and_not_counted(rng):
    processor = make_processor()
    np.testing.assert_array_equal(processor.counted_dims, [True, False, True, False, False])
    noisy = processor.env_actions(rng.normal(size=(3, 6, 5)) * 10)
    assert noisy.shape == (3, 6, 3) and noisy.dtype == np.float32
    np.testing.assert_array_equal(noisy[..., 1], -1.0)


def test_uncounted_dimensions_never_reach_the_environment(rng):
    processor = make_processor()
    model = rng.normal(size=(2, 6, 5))
    other = np.where(processor.counted_dims, model, rng.normal(size=model.shape))
    np.testing.assert_array_equal(processor.env_actions(model), processor.env_actions(other))


def test_clip_bounds_raw_actions(rng):
    model = rng.normal(size=(20, 6, 5)) * 3
    free, clipped = make_processor().env_actions(model), make_processor(clip=(-1.0, 1.0)).env_actions(model)
    assert np.abs(free).max() > 1
    np.testing.assert_array_equal(clipped, np.clip(free, -1, 1))


def test_z_score_mode(rng):
    processor = make_processor(norm_mode="z_score")
    raw = np.array([[[8.0, -1.0, 0.25]]])
    np.testing.assert_allclose(processor.model_actions(raw)[0, 0], [1.0, 0.0, 0.5, 0, 0], atol=1e-5)
    np.testing.assert_allclose(processor.env_actions(processor.model_actions(raw)), raw, atol=1e-5)


def test_bad_input_is_named(rng):
    with pytest.raises(ValueError, match=r"no camera 'top'; got \['left', 'right', 'wrist'\]"):
        make_processor(("top",)).observation([make_observation(rng)])
    with pytest.raises(ValueError, match=r"states have shape \[1, 2\]; expected \[batch, 3\]"):
        make_processor().observation([make_observation(rng, state=(0.0, 1.0))])
    with pytest.raises(ValueError, match=r"states of rows \[1\] are not finite"):
        make_processor().observation([make_observation(rng), make_observation(rng, state=(0.0, np.nan, 0.0))])
    with pytest.raises(ValueError, match="actions have width 4"):
        make_processor().model_actions(np.zeros((1, 6, 4)))
    with pytest.raises(ValueError, match="names no camera"):
        make_processor((None, None))
    with pytest.raises(ValueError, match=r"lack \['actions'\]"):
        InputProcessor(TOKENIZER, {"state": make_processor().stats["state"]}, ("left",), 8, 5)
    with pytest.raises(ValueError, match="action_dim=2 is less"):
        InputProcessor(TOKENIZER, make_processor().stats, ("left",), 8, 2)
