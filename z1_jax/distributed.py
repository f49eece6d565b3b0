"""Placing host arrays on the mesh, reading a process's own rows back, and code that must not move arrays by accident.

With several processes a batch is spread over all of them: each gives its own rows, and reads its own rows back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from z1_jax.errors import UserError
from z1_jax.sharding import LOGICAL_RULES, batch_sharding, place, processes_of_shards, replicated
from z1_jax.types import PrefixCache

Tree = TypeVar("Tree")


def put_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays whose first axis is the batch, spread over the data and fsdp axes; it must divide.

    With several processes `tree` holds this one's rows of the batch, as many as every other's.
    """
    return _put(tree, batch_sharding(mesh))


def _put(tree: Tree, shardings: Any) -> Tree:
    """`shardings`: one for all leaves, or a tree of them."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def global_array(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:  # it is one already
            return jax.device_put(x, sharding)
        with jax.transfer_guard_host_to_device("allow"):  # these transfers are what is asked for
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: global_array(x, shardings), tree)
    return jax.tree.map(global_array, tree, shardings)


@contextlib.contextmanager
def explicit_transfers() -> Iterator[None]:
    """A context in which arrays move to a device, or between devices, only where the code says so."""
    with jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_device("disallow"):
        yield


def put_scalar(value: np.generic, mesh: Mesh) -> jax.Array:
    """A number on every device. The transfer is explicit, so hot loops can forbid all others."""
    return place(value, replicated(mesh))


def cache_sharding(mesh: Mesh) -> PrefixCache:
    """Shardings of a prefix cache [layers, B, …], spread over its batch axis."""
    layered = NamedSharding(mesh, PartitionSpec(None, LOGICAL_RULES["batch"]))
    return PrefixCache(k=layered, v=layered, mask=batch_sharding(mesh))


def put_cache(cache: PrefixCache, mesh: Mesh) -> PrefixCache:
    """A prefix cache placed by `cache_sharding`; it must divide. Rows as for `put_batch`."""
    return _put(cache, cache_sharding(mesh))


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process holds the i-th of n equal parts of every batch, n the number of processes.

    Raises:
        UserError: the mesh splits a batch into other parts than the processes.
    """
    of_shards = processes_of_shards(mesh)
    count = jax.process_count()
    if len(of_shards) % count or any(len(some) > 1 for some in of_shards):
        raise UserError(
            f"mesh.data x mesh.fsdp = {len(of_shards)} shards of a batch over {count} processes: expected a multiple "
            f"of {count}, for each process feeds rows of its own, and mesh.tensor within a process"
        )
    order = [next(iter(some)) for some in of_shards]
    each = len(order) // count
    if any(len(set(order[start : start + each])) > 1 for start in range(0, len(order), each)):
        raise UserError("the mesh scatters a process's devices over the batch; choose other mesh sizes")
    return order.index(jax.process_index()) // each, count


def local_rows(x: Shaped[jax.Array, "..."], axis: int = 0) -> np.ndarray:
    """This process's rows of an array that is spread along `axis` alone; all of them where there is one process."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[axis].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)], axis=axis)


def whole(x: Any) -> np.ndarray:
    """An array with the rows of every process. Where it is spread over processes, all of them must call this."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gathered(tree: Tree) -> Tree:
    """NumPy arrays [n, …] of every process behind one another, [P · n, …]; n must be the same in all of them."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def connect(mesh: Mesh) -> None:
    """Lets the processes connect for collectives along each axis of the mesh and over all of them, while they are here.

    On CPUs (Gloo) they would do so in the first step, and give up where one compiles half a minute longer than another.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    for axes in (("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), tuple(mesh.axis_names)):
        add_up = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=axes),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
        )
        jax.block_until_ready(jax.jit(add_up)(put_scalar(np.float32(1), mesh)))
    gathered(np.zeros(1, np.float32))  # its groups have one device of each process


def check_alike(devices: list[int]) -> None:
    """Refuses processes with unequal numbers of devices; `devices`: those of each."""
    if odd := next((i for i, number in enumerate(devices) if number != devices[0]), None):
        raise UserError(
            f"process {odd} has {devices[odd]} devices, process 0 has {devices[0]}: every process needs as many "
            "(CUDA_VISIBLE_DEVICES, or JAX_NUM_CPU_DEVICES on CPUs)"
        )
