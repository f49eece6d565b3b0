"""Seeds of random inputs: fresh in each run of the tests, and drawn again by `pytest --seed=N`."""

from __future__ import annotations

import hashlib
import secrets


class _Run:
    seed: int | None = None


def run_seed(given: int | None = None) -> int:
    """The seed of this run of the tests: `given`, or else a fresh one, drawn once."""
    if given is not None:
        _Run.seed = given
    elif _Run.seed is None:
        _Run.seed = secrets.randbelow(10**9)
    return _Run.seed


def fresh_seed(*where: object) -> int:
    """A seed below 2**31 of the run's seed and of `where` it is used.

    It depends on neither the order of the tests nor on what else runs: one test alone draws what it drew in the suite.
    """
    text = repr((run_seed(), *where))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
    print(f"seed {seed} (pytest --seed={run_seed()})")
    return seed
