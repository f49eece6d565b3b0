"""Quantities that change over the iterations of a run. Pure functions."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def scheduled(kind: str, start: float, end: float, iteration: int, iterations: int) -> float:
    """The value at `iteration` of 0 … iterations − 1.

    `constant`: start. `linear`, `cosine`: start at the first iteration, end at the last; a single iteration has start.

    Raises:
        ValueError: another kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: got {kind!r}, expected one of {', '.join(SCHEDULES)}")
    if kind == "constant" or iterations <= 1:
        return start
    progress = iteration / (iterations - 1)
    if kind == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return start + (end - start) * iteration / (iterations - 1)
