"""Deciding with parameters that are spread over several processes, each with environments of its own.

Every decision is a computation of all processes together. They agree on its size before each one, and a process whose
episodes are over goes on taking part, with rows that nobody looks at, until all are.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from z1_jax import distributed, processes
from z1_jax.data.transforms import InputProcessor
from z1_jax.rl import flow
from z1_jax.rl.actor import Actor, pad_rows
from z1_jax.sharding import batch_sharding
from z1_jax.types import Observation, PrefixCache

_IDLE = "idle"


def blank(processor: InputProcessor) -> Observation:
    """One row of model inputs that shows nothing."""
    cameras, length = len(processor.used_slots), processor.prompt_length
    return Observation(
        images=np.zeros((1, cameras, processor.image_size, processor.image_size, 3), np.uint8),
        image_mask=np.ones((1, cameras), bool),
        tokens=np.zeros((1, length), np.int32),
        token_mask=np.arange(length)[None] < 1,
    )


class LockstepActor(Actor):
    """An `Actor` whose calls are made by every process of a run; caches and chains hold a process's own rows.

    Between two calls of `finish` each process may call it as often as it has decisions to make, with `encode` and
    `sample` in turn.
    """

    def __init__(self, *args: Any, blank: Observation, **options: Any):
        """Args: `blank`: one row of inputs; the others as for `Actor`, `largest` over all processes."""
        super().__init__(*args, **options)
        self._blank = blank
        self._encode = jax.jit(self._encode, out_shardings=distributed.cache_sharding(self._mesh))
        self._sample = jax.jit(self._sample, out_shardings=batch_sharding(self._mesh))

    def encode(self, params: tuple[Any, Any], observation: Observation) -> tuple[PrefixCache, int]:
        count = observation.tokens.shape[0]
        _, (rows,) = self._agreed("encode", [count])
        return self._encoded(params, observation, self._local_size(rows)), count

    def sample(
        self,
        params: tuple[Any, Any],
        cache: PrefixCache,
        ids: Int[np.ndarray, "B M I"],
        noise_key: tuple[int, ...],
        stochastic: bool,
        noise_level: float | None = None,
    ) -> flow.Chain:
        noise, steps = self._drawn(ids, noise_key, stochastic)
        level = self._config.noise_level if noise_level is None else noise_level
        _, (most, _) = self._agreed("sample", [ids.shape[1], level])
        # Members part at other chunks in other processes: there may be more chains for an observation there.
        noise, steps = (np.pad(x, [(0, 0), (0, most - ids.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in (noise, steps))
        chain = self._sampled(params, cache, noise, steps, level)
        return jax.tree.map(lambda x: distributed.local_rows(x)[: ids.shape[0], : ids.shape[1]], chain)

    def finish(self, params: tuple[Any, Any]) -> None:
        """Takes part in the decisions of the others until none has any more to make."""
        while (agreed := self._agreed(_IDLE, []))[0] != _IDLE:
            kind, sizes = agreed
            if kind == "encode":
                cache = self._encoded(params, self._blank, self._local_size(sizes[0]))
            else:
                most, level = sizes
                like = [np.zeros((1, most, *x.shape), x.dtype) for x in self._draw((0,))]
                self._sampled(params, cache, *like, level)

    def _agreed(self, kind: str, sizes: list[Any]) -> tuple[str, list[Any]]:
        """What is computed next, and the largest of each size over the processes."""
        working = [(kind, sizes) for kind, sizes in processes.exchange([kind, sizes]) if kind != _IDLE]
        if len({kind for kind, _ in working}) > 1:
            raise RuntimeError(f"the processes are out of step: {working}")  # a bug
        if not working:
            return _IDLE, []
        return working[0][0], [max(column) for column in zip(*(sizes for _, sizes in working), strict=True)]

    def _local_size(self, rows: int) -> int:
        """Rows of each process's padded batch, where none has more than `rows`."""
        return self._size(rows * processes.count()) // processes.count()

    def _encoded(self, params: tuple[Any, Any], observation: Observation, rows: int) -> PrefixCache:
        padded = jax.tree.map(lambda x: pad_rows(x, rows), observation)
        return self._encode(self._prepared.prefix(params), *params, distributed.put_batch(padded, self._mesh))

    def _sampled(
        self, params: tuple[Any, Any], cache: PrefixCache, noise: np.ndarray, steps: np.ndarray, level: float
    ) -> flow.Chain:
        rows = cache.mask.shape[0] // processes.count()
        inputs = [pad_rows(x, rows) for x in (noise, steps)]
        return self._sample(
            self._prepared.expert(params),
            *params,
            cache,
            *distributed.put_batch(inputs, self._mesh),
            distributed.put_scalar(np.float32(level), self._mesh),
        )
