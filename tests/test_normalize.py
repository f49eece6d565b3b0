import json
import logging
import pathlib

import numpy as np
import pytest
from seeds import fresh_seed

from z1_jax.data.normalize import (
    NormStats,
    StatsAccumulator,
    held_line,
    load_norm_stats,
    save_norm_stats,
    stats_from_json,
    stats_to_json,
)

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "misc.npz")
SEED = fresh_seed(__name__)


@pytest.fixture
def rng() -> np.random.Generator:
    print("seed", SEED)
    return np.random.default_rng(SEED)


def reference_stats() -> NormStats:
    return NormStats(**{name: REFERENCE[f"norm/{name}"] for name in ("mean", "std", "q01", "q99")})


def stats_of(rows: np.ndarray) -> NormStats:
    accumulator = StatsAccumulator()
    accumulator.update(rows)
    return accumulator.result()


@pytest.mark.parametrize(("mode", "suffix"), [("quantile", "q"), ("z_score", "z")])
def test_matches_openpi(mode, suffix):
    stats = reference_stats()
    got = stats.normalise(REFERENCE["norm/data"][:10], mode)
    np.testing.assert_allclose(got, REFERENCE[f"norm/normalized_{suffix}"], rtol=0, atol=1e-12)
    wide = stats.unnormalise(REFERENCE["norm/unnorm_in"], mode)  # 32 dimensions, statistics of 7
    np.testing.assert_allclose(wide, REFERENCE[f"norm/unnorm_{suffix}"], rtol=0, atol=1e-12)


def test_accumulated_statistics_match_numpy_in_any_split(rng):
    data = rng.normal(3.0, [1.0, 1e-3, 50.0], size=(1009, 3)) + [0.0, 1e4, 0.0]
    accumulator = StatsAccumulator()
    for part in np.split(data, np.sort(rng.integers(0, len(data), size=7))):
        accumulator.update(part)
    stats = accumulator.result()
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, data.std(0), rtol=1e-7)
    np.testing.assert_allclose([stats.q01, stats.q99], np.quantile(data, [0.01, 0.99], axis=0), rtol=1e-12)


def test_leading_axes_count_as_rows(rng):
    chunks = rng.normal(size=(5, 8, 4))
    np.testing.assert_allclose(stats_of(chunks).std, chunks.reshape(40, 4).std(0))


def test_thinned_quantiles_stay_close_and_moments_stay_exact(rng):
    data = rng.uniform(-1, 1, size=(40_000, 1))
    accumulator = StatsAccumulator(max_rows=5_000)
    for part in np.array_split(data, 37):
        accumulator.update(part)
    stats = accumulator.result()
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-9, atol=1e-12)
    assert abs(stats.q01[0] + 0.98) < 0.02 and abs(stats.q99[0] - 0.98) < 0.02  # 2,500 rows: 5 sigma is 0.02


def test_thinning_keeps_the_same_rows_whatever_the_parts(rng):
    data = rng.normal(size=(5000, 2))
    results = []
    for parts in (1, 13, 250):
        accumulator = StatsAccumulator(max_rows=300)
        for part in np.array_split(data, parts):
            accumulator.update(part)
        results.append(accumulator.result())
        assert 130 < accumulator._kept <= 300
    for result in results:
        np.testing.assert_array_equal([result.q01, result.q99], [results[0].q01, results[0].q99])


def test_thinned_quantiles_have_the_rank_that_is_promised_also_in_periodic_data(rng):
    """Chunks of actions repeat with the period of the chunk: each position must be sampled alike."""
    period = 8
    data = rng.normal(size=(400_000, 3)) + 10.0 * (np.arange(400_000) % period == 5)[:, None]
    accumulator = StatsAccumulator(max_rows=40_000)
    for part in np.array_split(data, 211):
        accumulator.update(part)
    stats = accumulator.result()
    allowed = 5 * np.sqrt(0.01 * 0.99 / 20_000)
    np.testing.assert_allclose((data <= stats.q01).mean(axis=0), 0.01, atol=allowed)
    np.testing.assert_allclose((data <= stats.q99).mean(axis=0), 0.99, atol=allowed)
    assert (stats.q99 > 9.0).all()  # the rare position is in the sample


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_roundtrip(rng, mode):
    data = rng.normal(size=(200, 6)) * rng.uniform(0.1, 10, size=6)
    stats = stats_of(data)
    np.testing.assert_allclose(stats.unnormalise(stats.normalise(data, mode), mode), data, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_constant_dimension_is_held_for_the_model_and_in_the_world(rng, mode):
    data = rng.normal(size=(300, 3))
    data[:, 1] = -1.0
    stats = stats_of(data)
    seen = stats.normalise(np.array([[0.0, 0.7, 0.0]]), mode)  # 0.7 was never in the data
    assert stats.constant.tolist() == [False, True, False]
    # openpi's formula at q01 = q99 = x is 0 / 1e-6 * 2 - 1, and at mean = x it is 0
    assert seen[0, 1] == (-1.0 if mode == "quantile" else 0.0)
    np.testing.assert_array_equal(stats.unnormalise(rng.normal(size=(4, 3)) * 100, mode)[:, 1], -1.0)
    assert (
        held_line({"state": stats, "actions": stats_of(data[:, :1])})
        == "held constant at their mean (span): state 1 (0)"
    )
    assert held_line({"actions": stats_of(data[:, :1])}) == ""


@pytest.mark.parametrize("scale", [4e-4, 1e-3, 1.0])
def test_small_movements_get_the_labels_of_openpis_formula(scale, rng):
    """Steps of at most 0.4 mm, in metres: the quantiles differ by 784 times the guard."""
    stats = stats_of(rng.uniform(-scale, scale, (20_000, 3)))
    assert not stats.constant.any()
    raw = np.linspace(-scale, scale, 5)[:, None] * np.ones(3)
    labels = stats.normalise(raw)
    np.testing.assert_allclose(labels, np.linspace(-1, 1, 5)[:, None] * np.ones(3), atol=0.05)
    np.testing.assert_array_equal(labels, (raw - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1)
    np.testing.assert_array_equal(stats.normalise(raw, "z_score"), (raw - stats.mean) / (stats.std + 1e-6))
    np.testing.assert_allclose(stats.unnormalise(labels), raw, atol=1e-12)


def test_what_float32_rounds_does_not_move(rng):
    """An encoder that stands at 7,000 ticks, computed in float32, differs by more than any fixed span would allow."""
    data = np.array([7000.1, -0.3, 0.0]) * (1 + rng.uniform(-(2.0**-23), 2.0**-23, (500, 3)))
    stats = stats_of(data)
    assert stats.span[0] > 1e-3 and stats.constant.all()
    data[:, 0] += rng.uniform(0, 0.5, 500)
    assert stats_of(data).constant.tolist() == [False, True, True]


def test_a_policy_keeps_the_rule_that_it_was_trained_under(rng):
    """Old statistics name none: what moved less than 1e-3 was held. Those of policies from elsewhere hold nothing."""
    data = rng.uniform(-4e-4, 4e-4, (1000, 3))
    data[:, 1] = 0.0
    data[:, 2], data[:5, 2] = -1.0, 1.0
    new = stats_of(data)
    assert new.constant.tolist() == [False, True, False]
    written = stats_to_json({"actions": new})
    assert stats_from_json(written)["actions"].constant.tolist() == [False, True, False]
    old = {"actions": {key: value for key, value in written["actions"].items() if key != "rule"}}
    kept = stats_from_json(old)["actions"]
    assert kept.constant.tolist() == [True, True, False]
    np.testing.assert_array_equal(kept.unnormalise(rng.normal(size=(9, 3)))[:, 0], kept.mean[0])
    assert stats_from_json(stats_to_json({"actions": kept}))["actions"].rule == "millimetre"
    foreign = stats_from_json(old, "openpi")["actions"]
    values = rng.normal(size=(9, 3))
    expected = (values + 1) / 2 * (foreign.q99 - foreign.q01 + 1e-6) + foreign.q01
    np.testing.assert_allclose(foreign.unnormalise(values), expected, atol=2e-6)
    with pytest.raises(ValueError, match="rule is 'mine', expected one of guard, millimetre, openpi"):
        stats_from_json({"actions": {**old["actions"], "rule": "mine"}})


def test_a_dimension_that_hardly_moves_is_held_where_openpi_sees_its_mean(rng):
    data = rng.normal(size=(1000, 2))
    data[:, 1] = 5 + rng.uniform(0, 9e-5, 1000)  # at most 90 times the guard
    stats = stats_of(data)
    assert stats.constant.tolist() == [False, True]
    openpi = (stats.mean - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1
    normalised = stats.normalise(data)[:, 1]
    assert np.ptp(normalised) == 0 and normalised[0] == pytest.approx(openpi[1]) and abs(normalised[0]) < 0.2


def test_rare_dimension_is_widened_not_frozen(rng, caplog):
    data = rng.normal(size=(1000, 2))
    data[:, 0] = -1.0
    data[:5, 0] = 1.0  # closes in 0.5 % of the rows: both quantiles are -1
    stats = stats_of(data)
    assert not stats.constant.any()
    with caplog.at_level(logging.WARNING):
        normalised = stats.normalise(data)
    assert np.abs(normalised).max() < 20 and "equal 1% and 99% quantiles" in caplog.text
    np.testing.assert_allclose(stats.unnormalise(normalised), data, atol=1e-9)


def test_file_is_openpis(tmp_path, rng):
    stats = {"state": stats_of(rng.normal(size=(50, 16))), "actions": stats_of(rng.normal(size=(50, 12)))}
    save_norm_stats(tmp_path / "norm_stats.json", stats)
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    assert set(content["norm_stats"]["state"]) == {"mean", "std", "q01", "q99"}
    loaded = load_norm_stats(tmp_path / "norm_stats.json")
    for key, value in stats.items():
        np.testing.assert_array_equal(loaded[key].q99, value.q99)  # exact: JSON keeps every digit
        np.testing.assert_array_equal(loaded[key].mean, value.mean)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"norm_stats": {"state": {"mean": [0.0]}}}', '{"norm_stats": {"state": 3}}']
)
def test_bad_files_are_one_line(tmp_path, text):
    (tmp_path / "norm_stats.json").write_text(text)
    with pytest.raises(ValueError, match="norm_stats.json") as error:
        load_norm_stats(tmp_path / "norm_stats.json")
    assert "\n" not in str(error.value)


def test_bad_input_is_named(rng):
    with pytest.raises(ValueError, match="no file"):
        load_norm_stats("/nowhere/norm_stats.json")
    with pytest.raises(ValueError, match="width 9"):
        reference_stats().normalise(np.zeros((2, 9)))
    with pytest.raises(ValueError, match="minmax"):
        reference_stats().normalise(np.zeros((2, 7)), "minmax")
    with pytest.raises(ValueError, match="NaN"):
        StatsAccumulator().update(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="no data"):
        StatsAccumulator().result()
    with pytest.raises(ValueError, match="not finite at dimension 1"):
        NormStats(mean=[0, np.inf], std=[1, 1], q01=[0, 0], q99=[1, 1])
    with pytest.raises(ValueError, match="q01 has shape"):
        NormStats(mean=[0, 1], std=[1, 1], q01=[0], q99=[1, 1])


@pytest.mark.parametrize(
    ("change", "words"), [("quantiles", "q01 is above q99 at dimension 2"), ("std", "std is negative")]
)
def test_swapped_fields_are_refused_and_turn_no_action_round(change, words, tmp_path, rng):
    values = stats_to_json({"actions": stats_of(rng.normal(size=(100, 3)))})
    one = values["actions"]
    if change == "quantiles":
        one["q01"][2], one["q99"][2] = one["q99"][2], one["q01"][2]
    else:
        one["std"][1] *= -1
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": values}))
    with pytest.raises(ValueError, match=words):
        load_norm_stats(tmp_path / "norm_stats.json", "openpi")
