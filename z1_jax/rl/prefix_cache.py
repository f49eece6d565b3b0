"""The prefix caches of one iteration's observations, kept in host memory for its updates.

While the VLM is frozen they are the same in the rollout and in every update, so the update runs the action expert
alone. They are of one policy version's VLM: a new iteration makes a new store.
"""

from __future__ import annotations

import jax
import numpy as np

from z1_jax.types import PrefixCache


class PrefixStore:
    """Rows of keys and values by observation, [O, …] over all batches that the rollout encoded."""

    def __init__(self, caches: list[tuple[PrefixCache, int]]):
        """Args: `caches`: batches with their number of real rows; the rest of each is padding."""
        k = np.concatenate([np.asarray(cache.k)[:, :rows] for cache, rows in caches], axis=1)
        v = np.concatenate([np.asarray(cache.v)[:, :rows] for cache, rows in caches], axis=1)
        mask = np.concatenate([np.asarray(cache.mask)[:rows] for cache, rows in caches])
        self._all = PrefixCache(k, v, mask)

    def take(self, rows: np.ndarray) -> PrefixCache:
        """The caches of observations `rows` (NumPy)."""
        return self._all.take(rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in jax.tree.leaves(self._all))
