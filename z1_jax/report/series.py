"""Curves from a run's records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from z1_jax.report import charts

SMOOTHING = 10  # iterations in the running mean of the training success


def series(
    records: Sequence[dict[str, Any]], stage: str, key: str, name: str, style: str = "line", colour: int = 0
) -> charts.Series:
    """A number of a stage over its steps, where the records have it."""
    points = [(record["step"], record[key]) for record in records if record.get("stage") == stage and key in record]
    return charts.Series(
        name, [x for x, _ in points], [None if y is None else float(y) for _, y in points], style, colour
    )


def running_mean(one: charts.Series) -> charts.Series:
    """The mean of the newest values at each point, at most SMOOTHING."""
    means: list[float | None] = []
    for end in range(1, len(one.ys) + 1):
        known = [y for y in one.ys[max(0, end - SMOOTHING) : end] if y is not None]
        means.append(sum(known) / len(known) if known else None)
    return charts.Series(f"mean of the last {SMOOTHING}", one.xs, means)


def at(one: charts.Series, xs: list[float]) -> list[float | None]:
    """The curve's values at other places, None where it has none."""
    known = dict(zip(one.xs, one.ys, strict=True))
    return [known.get(x) for x in xs]
