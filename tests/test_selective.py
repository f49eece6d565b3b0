"""The decision of selective training against scipy's regression, by simulation, and at its edges."""

import numpy as np
import pytest
from scipy import stats

from z1_jax.rl.selective import decide, trend


@pytest.mark.parametrize("n", [3, 4, 5, 12, 40])
def test_trend_equals_scipys(rng, n):
    success = rng.random(n)
    line, expected = trend(success), stats.linregress(np.arange(n), success, alternative="greater")
    assert line.slope == pytest.approx(expected.slope, rel=1e-9)
    assert line.error == pytest.approx(expected.stderr, rel=1e-9)
    assert line.p_value == pytest.approx(expected.pvalue, rel=1e-7, abs=1e-12)


def test_perfect_lines():
    assert trend([0.5] * 6).p_value == 1.0 and trend([0.1] * 7).p_value == 1.0
    assert trend([0.1, 0.2, 0.3]).p_value == pytest.approx(0.0, abs=1e-6)
    assert trend([0.3, 0.2, 0.1]).p_value == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 3 iterations, got 2"):
        trend([0.1, 0.2])


def test_the_stated_confidence_is_kept(rng):
    """Flat success of 64 episodes: a trend is claimed in one of ten probes at 90 %, not more."""
    probes = rng.binomial(64, 0.4, (4000, 20)) / 64
    claimed = np.mean([decide(probe, 0.9, 0.95, "joint").scope == "expert" for probe in probes])
    assert claimed == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 4000))


def test_reasons_are_one_line_with_the_numbers():
    flat = decide([0.25, 0.3, 0.25, 0.3, 0.25], 0.9, 0.95, "wider")
    assert (
        flat.scope == "wider"
        and "scope wider from here on" in flat.reason
        and "+0.00 points" in flat.reason
        and "not rising at 90.0% confidence" in flat.reason
    )
    rising = decide([0.1, 0.21, 0.29, 0.42], 0.9, 0.95, "joint")
    assert rising.scope == "expert" and "+10.40 points an iteration over 4 iterations" in rising.reason
    top = decide([0.9, 0.97, 0.96, 0.97], 0.9999, 0.95, "joint")
    assert top.scope == "expert" and "enough" in top.reason and top.mean_success == pytest.approx(0.965)
    assert all("\n" not in decision.reason for decision in (flat, rising, top))
