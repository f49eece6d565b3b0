"""The prefix caches of one iteration's observations, kept for its updates: on the device, or in host memory.

While the VLM is frozen they are the same in the rollout and in every update, so the update runs the action expert
alone (method: section 6). They belong to one iteration's observations: a new iteration, and a resumed one, fills its
store anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from z1_jax import distributed
from z1_jax.config.checks import stale_cache
from z1_jax.sharding import replicated
from z1_jax.types import PrefixCache

DEVICE_SHARE, HOST_SHARE = 0.4, 0.5  # of the memory that is free: activations and frames need the rest


class PrefixStore:
    """Caches by observation in host memory, each batch trimmed of its padding; of several processes this one's."""

    def __init__(self, caches: Iterable[tuple[PrefixCache, int]] = ()):
        """Args: `caches`: batches with their number of real rows; the rest of each is padding."""
        self._parts: list[PrefixCache] = []
        self._coming: list[tuple[PrefixCache, int]] = []
        self.rows = 0
        for cache, rows in caches:
            self.add(cache, rows)

    def add(self, cache: PrefixCache, rows: int) -> None:
        """Appends the first `rows` observations of a batch that the device may still be computing."""
        self._settle()
        for leaf in jax.tree.leaves(cache):
            if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
                leaf.copy_to_host_async()  # beside the simulation; fetched at the next call
        self._coming.append((cache, rows))
        self.rows += rows

    def take(self, rows: Int[np.ndarray, " N"]) -> PrefixCache:
        """The caches of observations `rows` (NumPy)."""
        self._settle()
        first = np.cumsum([0] + [part.mask.shape[0] for part in self._parts])
        like = self._parts[0]
        k, v, mask = (np.empty((*x.shape[:a], len(rows), *x.shape[a + 1 :]), x.dtype) for x, a in _axes(like))
        source = np.searchsorted(first, rows, side="right") - 1
        for index in np.unique(source):
            here = np.flatnonzero(source == index)
            part, local = self._parts[index], rows[here] - first[index]
            k[:, here], v[:, here], mask[here] = part.k[:, local], part.v[:, local], part.mask[local]
        return PrefixCache(k, v, mask)

    def clear(self) -> None:
        """Forgets every cache."""
        self._parts, self._coming, self.rows = [], [], 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        self._settle()
        return sum(x.nbytes for part in self._parts for x in jax.tree.leaves(part))

    def _settle(self) -> None:
        for cache, rows in self._coming:
            k, v = (np.array(distributed.local_rows(x, 1)[:, :rows]) for x in (cache.k, cache.v))
            self._parts.append(PrefixCache(k, v, np.array(distributed.local_rows(cache.mask)[:rows])))
        self._coming = []


class DevicePrefixStore:
    """Caches by observation in one device buffer of fixed capacity: nothing travels, nothing is compiled twice."""

    def __init__(self, capacity: int, mesh: Mesh):
        """Args: `capacity`: the most observations of an iteration, with one padded batch to spare."""
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self._capacity = -(-capacity // shards) * shards
        self._sharding, self._whole = distributed.cache_sharding(mesh), replicated(mesh)
        self._all: PrefixCache | None = None
        self.rows = 0
        self.traces = {"write": 0, "take": 0}
        self._write = jax.jit(self._write_impl, donate_argnums=0, out_shardings=self._sharding)
        self._take = jax.jit(self._take_impl, out_shardings=self._sharding)

    def add(self, cache: PrefixCache, rows: int) -> None:
        """Appends the first `rows` observations of a batch; its padding is overwritten by the next."""
        if self.rows + cache.mask.shape[0] > self._capacity:
            raise ValueError(f"{self.rows} + {cache.mask.shape[0]} observations exceed the store's {self._capacity}")
        if self._all is None:
            self._all = self._empty(cache)
        self._all = self._write(self._all, cache, jnp.int32(self.rows))
        self.rows += rows

    def take(self, rows: Int[np.ndarray, " N"]) -> PrefixCache:
        """The caches of observations `rows`, on the device, spread like a batch."""
        if self._all is None or rows.max(initial=0) >= self.rows:
            raise ValueError(f"observation {rows.max(initial=0)} asked for, {self.rows} are stored")
        return self._take(self._all, jax.device_put(rows.astype(np.int32), self._whole))

    def clear(self) -> None:
        """Forgets every cache; the buffer stays."""
        self.rows = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in jax.tree.leaves(self._all))

    def _empty(self, like: PrefixCache) -> PrefixCache:
        def zeros(like: PrefixCache) -> PrefixCache:
            shapes = ((*x.shape[:a], self._capacity, *x.shape[a + 1 :]) for x, a in _axes(like))
            return PrefixCache(*(jnp.zeros(s, x.dtype) for s, (x, _) in zip(shapes, _axes(like), strict=True)))

        return jax.jit(functools.partial(zeros, jax.eval_shape(lambda x: x, like)), out_shardings=self._sharding)()

    def _write_impl(self, store: PrefixCache, cache: PrefixCache, at: jax.Array) -> PrefixCache:
        self.traces["write"] += 1
        pairs = zip(_axes(store), _axes(cache), strict=True)
        return PrefixCache(*(jax.lax.dynamic_update_slice_in_dim(x, new, at, axis) for (x, axis), (new, _) in pairs))

    def _take_impl(self, store: PrefixCache, rows: jax.Array) -> PrefixCache:
        self.traces["take"] += 1
        return store.take(rows)


AnyStore = PrefixStore | DevicePrefixStore


def _axes(cache: PrefixCache) -> tuple[tuple[jax.Array, int], ...]:
    """Each array with its axis of observations."""
    return (cache.k, 1), (cache.v, 1), (cache.mask, 0)


def put_taken(cache: PrefixCache, mesh: Mesh) -> PrefixCache:
    """A batch of caches on the device, sent without waiting: through page-locked memory where the device has it."""
    if isinstance(cache.k, np.ndarray) and page_locked_first(mesh):
        cache = jax.device_put(
            cache, jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), distributed.cache_sharding(mesh))
        )
    return distributed.put_cache(cache, mesh)


def page_locked_first(mesh: Mesh) -> bool:
    device = mesh.devices.flat[0]  # a CPU's memory is the host's: a copy on the way would only cost
    return device.platform != "cpu" and any(m.kind == "pinned_host" for m in device.addressable_memories())


def choose_placement(asked: str, trains_vlm: bool, scope: str, planned: int, device: int | None, host: int) -> str:
    """One of `checks.PLACEMENTS` for `planned` bytes of prefix caches.

    Args:
        asked: `auto`, or one of these.
        trains_vlm: then every update makes the caches stale: they are recomputed.
        device: free bytes of the devices that share them; None where device memory is host memory.
        host: free bytes of host memory.

    Raises:
        ConfigError: a cache is asked for and the VLM is trained.
    """
    if trains_vlm:
        if asked in ("device", "host"):
            raise stale_cache(asked, scope)
        return "recompute"
    if asked != "auto":
        return asked
    if device is not None and planned <= DEVICE_SHARE * device:
        return "device"
    return "host" if planned <= HOST_SHARE * host else "recompute"


def free_device_bytes(mesh: Mesh) -> int | None:
    """Free memory over the devices that share a batch; None where the backend does not say, as on a CPU."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if not all(s and "bytes_limit" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats) * mesh.shape["data"] * mesh.shape["fsdp"]
