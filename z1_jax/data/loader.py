"""Batches for training: shuffled by seed without end, sharded over processes, resumable to the next batch.

A dataset that fits the memory budget is decoded and tokenised once: a batch is then a gather of rows. A larger one is
read ahead by Grain's threads. Knows the dataset and the input processor, nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from z1_jax.data.dataset import Dataset
from z1_jax.data.order import BalancedBatches, Batches
from z1_jax.data.transforms import InputProcessor
from z1_jax.errors import UserError
from z1_jax.types import Observation

MEMORY_BYTES = 2 << 30
_LOAD_RECORDS = 256  # records decoded at a time while loading into memory

Batch = dict[str, np.ndarray]

_logger = logging.getLogger(__name__)


class Loader(Iterator[Batch]):
    """Endless batches of NumPy arrays, B rows each (the process's share of the global batch):

        images      uint8 [B, C, S, S, 3]        image_mask  bool [B, C]
        tokens      int32 [B, L]                 token_mask  bool [B, L]
        state       float32 [B, state_dim], normalised
        actions     float32 [B, H, A], normalised and padded with zeros
        index       int64 [B], the rows' records

    Each epoch is a new permutation of all records, or of a task's (see `order`). The order of global batches depends on
    the seed only, so any number of processes trains on the same ones, and a run may resume with another number.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: InputProcessor,
        batch_size: int,
        seed: int,
        *,
        sampling: str = "proportional",
        records: Int[np.ndarray, " n"] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        memory_bytes: int = MEMORY_BYTES,
        prefetch: int = 2,
        threads: int = 2,
    ):
        """Args:
            batch_size: rows of a global batch, a multiple of `process_count`.
            sampling: proportional: every record is as likely as another; balanced: every task of the dataset.
            records: those that batches are drawn from; None: all.
            memory_bytes: a dataset that takes more than this is read from disk, batch by batch.
            prefetch: batches read ahead, by `threads` threads, when reading from disk.

        Raises:
            ValueError: a negative seed, sizes that do not divide, a process out of range, or data that the
                processor cannot take.
        """
        import grain  # half a second

        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} is not a positive multiple of the {process_count} processes")
        if seed < 0:
            raise ValueError(f"seed={seed}; expected 0 or more")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index}; expected 0..{process_count - 1}")
        self._dataset, self._processor = dataset, processor
        self._identity = {"dataset": dataset.identity, "seed": seed, "batch_size": batch_size}
        local = batch_size // process_count
        rows = slice(process_index * local, (process_index + 1) * local)
        self._part = process_index, process_count
        parts = _records_by_task(dataset) if sampling == "balanced" else [np.arange(len(dataset))]
        self._sampling = sampling if len(parts) > 1 else "proportional"
        if records is not None:
            parts = [part for part in (np.intersect1d(part, records) for part in parts) if len(part)]
            self._identity["records"] = len(records)
        of_batch = batch_size, seed, rows
        chosen = (
            Batches(len(dataset), *of_batch)
            if len(parts) == 1 and records is None
            else BalancedBatches(parts, *of_batch)
        )
        order = grain.MapDataset.source(chosen)
        self.memory: Batch | None = None  # all records, where they fit: arrays as in a batch, in the dataset's order
        if decoded_bytes(dataset, processor) <= memory_bytes:
            self.memory = _load(dataset, processor)
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            self._batches = iter(order.to_iter_dataset(options))
        else:
            options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
            self._batches = iter(order.map(self._read).to_iter_dataset(options))

    def __next__(self) -> Batch:
        item = next(self._batches)
        if self.memory is None:
            return item
        return {key: value[item] for key, value in self.memory.items()}

    def rows(self, records: Int[np.ndarray, " B"]) -> Batch:
        """This process's rows of a batch of given records, a multiple of the processes."""
        index, count = self._part
        mine = records.reshape(count, -1)[index]
        return self._read(mine) if self.memory is None else {key: value[mine] for key, value in self.memory.items()}

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: a loader with this state goes on with the batch that would come next."""
        told = {} if self._sampling == "proportional" else {"sampling": self._sampling}  # older states know no other
        return {**self._identity, **told, "position": self._batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a state of `get_state`.

        Raises:
            ValueError: the state belongs to another dataset, seed or batch size.
        """
        saved, which = {"sampling": "proportional", **state}, "tasks, sft.validation and version of this code"
        for key, value in {"records": None, **self._identity, "sampling": self._sampling}.items():
            if saved.get(key) != value:
                raise UserError(
                    f"the data position was saved with {key}={saved.get(key)!r}, this run has {value!r}; "
                    f"use the same {which if key == 'records' else key}, or start a new run"
                )
        self._batches.set_state(state["position"])

    def _read(self, indices: np.ndarray) -> Batch:
        return collate(self._dataset, self._processor, indices)


def _records_by_task(dataset: Dataset) -> list[np.ndarray]:
    """The records of each task, in the tasks' order of appearance."""
    parts: dict[str, list[np.ndarray]] = {}
    for row in dataset.episodes:
        parts.setdefault(row.task, []).append(np.array(row.span))
    return [np.concatenate(part) for part in parts.values()]


def collate(dataset: Dataset, processor: InputProcessor, indices: Sequence[int] | Int[np.ndarray, " B"]) -> Batch:
    """The records at `indices` as model inputs and normalised actions (see `Loader`)."""
    records = dataset.records(indices)
    observation = processor.observation(records)
    states = np.stack([record.state for record in records])
    return {
        "images": observation.images,
        "image_mask": observation.image_mask,
        "tokens": observation.tokens,
        "token_mask": observation.token_mask,
        "state": processor.model_states(states),
        "actions": processor.model_actions(np.stack([record.actions for record in records]), states),
        "index": np.asarray(indices, np.int64),
    }


def batch_observation(batch: Mapping[str, Shaped[np.ndarray, "B ..."]]) -> Observation:
    """The model inputs of a batch."""
    return Observation(batch["images"], batch["image_mask"], batch["tokens"], batch["token_mask"])


def decoded_bytes(dataset: Dataset, processor: InputProcessor) -> int:
    """Memory that the whole dataset takes as batch arrays."""
    image = len(processor.used_slots) * (processor.image_size**2 * 3 + 1)
    numbers = dataset.state_dim + dataset.chunk * processor.action_dim
    return len(dataset) * (image + 5 * processor.prompt_length + 4 * numbers + 8)


def _load(dataset: Dataset, processor: InputProcessor) -> Batch:
    """All records in memory."""
    total = len(dataset)
    _logger.info("decoding %d records into memory (%.0f MB)", total, decoded_bytes(dataset, processor) / 1e6)
    out: Batch = {}
    for start in range(0, total, _LOAD_RECORDS):
        part = collate(dataset, processor, range(start, min(start + _LOAD_RECORDS, total)))
        for key, value in part.items():
            if not start:
                out[key] = np.empty((total, *value.shape[1:]), value.dtype)
            out[key][start : start + len(value)] = value
    return out
