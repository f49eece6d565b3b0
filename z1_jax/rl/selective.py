"""Selective joint training: whether a probe with the expert alone was enough. Pure functions.

The decision sees the training success of the probe's iterations and nothing else; held-out seeds cannot reach it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy  # scipy.stats, half a second, is imported where it is used


@dataclasses.dataclass(frozen=True)
class Trend:
    """The least-squares line through the success of successive iterations."""

    slope: float  # success per iteration
    error: float  # standard error of the slope; 0 where the line fits exactly
    p_value: float  # one-sided: of a slope this large or larger where the true one is zero


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the probe led to."""

    scope: str
    trend: Trend
    mean_success: float  # of the later half of the probe
    reason: str  # one line


def trend(success: Sequence[float]) -> Trend:
    """Slope of `success` over its index, with the t-test of least squares (n − 2 degrees of freedom).

    Raises:
        ValueError: fewer than three values.
    """
    y = np.asarray(success, float)
    if len(y) < 3:
        raise ValueError(f"a trend needs at least 3 iterations, got {len(y)}")
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    freedom = len(y) - 2
    error = math.sqrt(float(residual @ residual) / freedom / float(x @ x))
    if error < 1e-12:  # a perfect line; rounding must not make a significant slope of a constant
        return Trend(slope, 0.0, 0.0 if slope > 1e-12 else 1.0)
    return Trend(slope, error, float(scipy.stats.t.sf(slope / error, freedom)))


def decide(success: Sequence[float], confidence: float, enough: float, then: str) -> Decision:
    """Stay with the expert, or train with scope `then` (method: section 6).

    Stays when the trend of training success is above zero at one-sided `confidence`, or when the mean success over the
    later half of the probe is at least `enough`: a policy that succeeds this often need not rise further.
    """
    line = trend(success)
    later = float(np.mean(np.asarray(success, float)[len(success) // 2 :]))
    facts = (
        f"training success moved by {100 * line.slope:+.2f} points an iteration over {len(success)} iterations "
        f"(one-sided p = {line.p_value:.3g}, mean of the later half {later:.1%})"
    )
    if later >= enough:
        reason = f"{facts}: at least {enough:.1%}, the expert alone is enough"
        return Decision("expert", line, later, reason)
    if line.p_value < 1.0 - confidence:
        reason = f"{facts}: rising at {confidence:.1%} confidence, the expert alone goes on"
        return Decision("expert", line, later, reason)
    return Decision(then, line, later, f"{facts}: not rising at {confidence:.1%} confidence, scope {then} from here on")
