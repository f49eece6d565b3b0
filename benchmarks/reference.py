"""Largest relative error of every array of the model against openpi's reference numbers (float32, CPU).

    python benchmarks/reference.py

Forward arrays: max |difference| by max |reference|. Gradients: L2 of the difference by the global norm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import pi05_reference  # noqa: E402
from figures import result_line  # noqa: E402


def main() -> None:
    rows = pi05_reference.all_comparisons(pi05_reference.load_case())
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.error:9.2e}  {'ok' if row.ok else 'TOO LARGE'}")
    worst = max(row.error for row in rows)
    met, spread = worst <= pi05_reference.TOLERANCE, [min(row.error for row in rows), worst]
    name, goal = "reference/largest_relative_error", pi05_reference.TOLERANCE
    print(result_line(name, worst, "relative", baseline=0.0, goal=goal, met=met, n=len(rows), spread=spread))


if __name__ == "__main__":
    main()
