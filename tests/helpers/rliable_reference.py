"""Writes tests/reference/rliable.json: what rliable and statsmodels say of random scores and p-values.

`pip install rliable==1.2.0 statsmodels==0.15.0` in an environment of its own, then
`python tests/helpers/rliable_reference.py tests/reference/rliable.json`.
"""

import importlib.metadata
import json
import pathlib
import sys

import numpy as np
from rliable import library, metrics
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

REPS, EPISODES = 6_000, 256


def scores(rng: np.random.Generator, runs: int, tasks: int) -> dict:
    """One matrix [runs, tasks] of success rates, its aggregates, and their stratified bootstrap intervals."""
    rates = np.clip(rng.uniform(0.05, 1.0, tasks) + rng.normal(0, 0.05, (runs, tasks)), 0, 1)
    successes = rng.binomial(EPISODES, rates)
    matrix = {"ours": successes / EPISODES}
    found = {"successes": successes.tolist(), "episodes": EPISODES}
    for name, aggregate in (("iqm", metrics.aggregate_iqm), ("mean", metrics.aggregate_mean)):
        point, interval = library.get_interval_estimates(
            matrix,
            lambda x, aggregate=aggregate: np.array([aggregate(x)]),
            method="percentile",
            reps=REPS,
            confidence_interval_size=0.95,
            random_state=np.random.RandomState(int(rng.integers(2**31))),
        )
        found[name] = [float(point["ours"][0]), *map(float, interval["ours"].ravel())]
    return found


def corrected(rng: np.random.Generator, count: int) -> dict:
    """P-values and Holm's correction of them; some are equal, some are 1."""
    values = np.round(rng.beta(0.4, 2.0, count), 4)
    values[: count // 6] = values[-1]
    values[count // 2] = 1.0
    return {"p": values.tolist(), "holm": multipletests(values, method="holm")[1].tolist()}


def paired(rng: np.random.Generator) -> dict:
    """Pairs that were gained and lost, and the exact McNemar test of them."""
    gained, lost = (int(rng.integers(0, 40)) for _ in range(2))
    table = [[100, lost], [gained, 50]]
    return {"gained": gained, "lost": lost, "p": float(mcnemar(table, exact=True).pvalue)}


def rate(rng: np.random.Generator) -> dict:
    """A rate and its Wilson interval."""
    count = int(rng.integers(0, EPISODES + 1))
    return {"successes": count, "wilson": list(map(float, proportion_confint(count, EPISODES, 0.05, "wilson")))}


def main() -> None:
    rng = np.random.default_rng(19)
    versions = {name: importlib.metadata.version(name) for name in ("rliable", "arch", "statsmodels", "numpy")}
    shapes = [(3, 12), (3, 24), (5, 7), (10, 4), (2, 3)]
    reference = {
        "made_by": "tests/helpers/rliable_reference.py",
        "versions": versions,
        "reps": REPS,
        "scores": [scores(rng, *shape) for shape in shapes],
        "holm": [corrected(rng, count) for count in (2, 12, 24)],
        "mcnemar": [paired(rng) for _ in range(8)],
        "rates": [rate(rng) for _ in range(8)],
    }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
