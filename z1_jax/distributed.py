"""Placing host arrays on the mesh, and code that must not do so by accident."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from z1_jax.sharding import LOGICAL_RULES, batch_sharding, replicated
from z1_jax.types import PrefixCache

Tree = TypeVar("Tree")


def put_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays whose first axis is the batch, spread over the data and fsdp axes; it must divide."""
    return jax.device_put(tree, batch_sharding(mesh))


@contextlib.contextmanager
def explicit_transfers() -> Iterator[None]:
    """A context in which arrays move to a device, or between devices, only where the code says so."""
    with jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_device("disallow"):
        yield


def put_scalar(value: np.generic, mesh: Mesh) -> jax.Array:
    """A number on every device. The transfer is explicit, so hot loops can forbid all others."""
    return jax.device_put(value, replicated(mesh))


def cache_sharding(mesh: Mesh) -> PrefixCache:
    """Shardings of a prefix cache [layers, B, …], spread over its batch axis."""
    layered = NamedSharding(mesh, PartitionSpec(None, LOGICAL_RULES["batch"]))
    return PrefixCache(k=layered, v=layered, mask=batch_sharding(mesh))


def put_cache(cache: PrefixCache, mesh: Mesh) -> PrefixCache:
    """A prefix cache placed by `cache_sharding`; it must divide."""
    return jax.device_put(cache, cache_sharding(mesh))
