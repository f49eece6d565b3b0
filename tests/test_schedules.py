"""Schedules by hand."""

import pytest

from z1_jax.rl.schedules import scheduled


def test_by_hand():
    assert [scheduled("constant", 3.0, 1.0, i, 5) for i in range(5)] == [3.0] * 5
    assert [scheduled("linear", 3.0, 1.0, i, 5) for i in range(5)] == [3.0, 2.5, 2.0, 1.5, 1.0]
    # 1 + 2·(1 + cos(π·i/4))/2: cos 45° = 0.70710678
    cosine = [scheduled("cosine", 3.0, 1.0, i, 5) for i in range(5)]
    assert cosine == pytest.approx([3.0, 2.70710678, 2.0, 1.29289322, 1.0])
    assert scheduled("linear", 3.0, 1.0, 0, 1) == 3.0
    with pytest.raises(ValueError, match="expected one of constant, linear, cosine"):
        scheduled("steps", 1.0, 0.0, 0, 2)
