"""Placing host arrays on the mesh."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from z1_jax.sharding import LOGICAL_RULES, batch_sharding
from z1_jax.types import PrefixCache

Tree = TypeVar("Tree")


def put_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays whose first axis is the batch, spread over the data and fsdp axes; it must divide."""
    return jax.device_put(tree, batch_sharding(mesh))


def cache_sharding(mesh: Mesh) -> PrefixCache:
    """Shardings of a prefix cache [layers, B, …], spread over its batch axis."""
    layered = NamedSharding(mesh, PartitionSpec(None, LOGICAL_RULES["batch"]))
    return PrefixCache(k=layered, v=layered, mask=batch_sharding(mesh))


def put_cache(cache: PrefixCache, mesh: Mesh) -> PrefixCache:
    """A prefix cache placed by `cache_sharding`; it must divide."""
    return jax.device_put(cache, cache_sharding(mesh))
