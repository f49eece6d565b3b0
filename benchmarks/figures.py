"""The line that every benchmark prints for each of its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def result_line(
    name: str,
    value: float,
    unit: str,
    *,
    baseline: Any = None,
    goal: Any = None,
    met: bool | None = None,
    n: int,
    spread: Sequence[float] | None = None,
    **more: Any,
) -> str:
    """`RESULT {…}`: what programs read.

    Args:
        baseline: what the value is to be compared with: a number or a name.
        met: whether the goal is; None without one.
        n, spread: how many values stand behind this one, and the range that they cover.
        more: further facts of the figure.
    """
    figure = {"name": name, "value": value, "unit": unit, "baseline": baseline, "goal": goal, "met": met, "n": n}
    return "RESULT " + json.dumps({**figure, "spread": spread, **more})
