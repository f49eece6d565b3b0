"""Which records a batch holds: orders without end that follow from a seed. NumPy only."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

SAMPLING = ("proportional", "balanced")


class Batches:
    """Batch number -> record indices of `rows` of that batch: one permutation after the other, one an epoch.

    Grain's own shuffle takes 25 us an index, more than the gather of a whole batch.
    """

    def __init__(self, records: int, batch_size: int, seed: int, rows: slice):
        self._records, self._batch_size, self._seed, self._rows = records, batch_size, seed, rows
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, batch: int) -> Int[np.ndarray, " B"]:
        return self._at(batch * self._batch_size + np.arange(self._batch_size)[self._rows])

    def _at(self, positions: np.ndarray) -> np.ndarray:
        """The records at positions of the endless order, ascending."""
        epochs, places = np.divmod(positions, self._records)
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(epoch)[places[chosen]]
        return indices

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._records)


class BalancedBatches(Batches):
    """The same with one record of each part in turn, whatever the parts' sizes; each part has epochs of its own."""

    def __init__(self, parts: Sequence[Int[np.ndarray, " n"]], batch_size: int, seed: int, rows: slice):
        """Args: `parts`: the records of each, at least one."""
        super().__init__(sum(map(len, parts)), batch_size, seed, rows)
        self._parts = parts
        self._shuffled = functools.lru_cache(maxsize=2 * len(parts))(self._draw_part)

    def _at(self, positions: np.ndarray) -> np.ndarray:
        count = len(self._parts)
        rounds, turns = np.divmod(positions, count)
        indices = np.empty_like(positions)
        for at, (number, turn) in enumerate(zip(rounds.tolist(), turns.tolist(), strict=True)):
            epoch, place = divmod(number, len(self._parts[turn]))
            indices[at] = self._shuffled(turn, epoch)[place]
        return indices

    def _draw_part(self, part: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch, part + 1]).permutation(self._parts[part])
