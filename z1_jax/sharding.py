"""Device mesh, and the rules that turn logical axis names into mesh axes.

A parameter states its logical axes once, where it is declared; everything here follows from that.
Knows no model and no training loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from z1_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes that it is split over, in this order. Kernels of the time MLP and of the adaRMS modulation
# name only "embed": a kernel split over both fsdp and tensor, applied to a nearly flat activation, was seen to give
# silently wrong numbers under automatic sharding.
LOGICAL_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "kv_heads": (),
    "vocab": (),
    "layers": (),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all of `devices` (default: every device of the job).

    `data=-1` takes what fsdp and tensor leave. Raises UserError when the sizes do not cover the devices exactly.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size, lowest in (("data", data, -1), ("fsdp", fsdp, 1), ("tensor", tensor, 1)):
        if size < lowest or size == 0:
            allowed = "a positive size, or -1 for the rest" if name == "data" else "a positive size"
            raise UserError(f"mesh axis {name} must be {allowed}; got {size}")
    if data == -1:
        data, rest = divmod(len(devices), fsdp * tensor)
        if rest or data == 0:
            raise UserError(
                f"a mesh with fsdp={fsdp} and tensor={tensor} needs a multiple of {fsdp * tensor} devices; "
                f"there are {len(devices)}: {_smaller(fsdp, tensor, len(devices))}"
            )
    shape = (data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {math.prod(shape)} devices; "
            f"there are {len(devices)}: set mesh.data=-1, or use that many devices"
        )
    # Auto is stated because the default of jax.make_mesh differs between versions.
    mesh = jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(shape))
    if len({device.process_index for device in devices}) > 1 and not _in_blocks(mesh):
        in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(in_order).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    return mesh


def processes_of_shards(mesh: Mesh) -> list[set[int]]:
    """Of each shard of a batch, in order, the processes whose devices hold it."""
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    return [{device.process_index for device in row} for row in rows]


def _in_blocks(mesh: Mesh) -> bool:
    """Whether each process holds shards of a batch that are neighbours: a loader's part is then its rows."""
    order = [process for shard in processes_of_shards(mesh) for process in sorted(shard)]
    return (
        len(order) == mesh.shape["data"] * mesh.shape["fsdp"]
        and sum(one != other for one, other in zip(order, order[1:], strict=False)) == len(set(order)) - 1
    )


def _smaller(fsdp: int, tensor: int, devices: int) -> str:
    """How to set the mesh's keys for so many devices."""
    if devices == 1:
        keys = [f"mesh.{name}=1" for name, size in (("fsdp", fsdp), ("tensor", tensor)) if size > 1]
        return f"set {' and '.join(f'--config.{key}' for key in keys)} to train on one device"
    return f"choose mesh.fsdp and mesh.tensor so that their product divides {devices}"


def partition_spec(shape: Sequence[int], axes: Sequence[str | None], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose leading dimensions have the logical names `axes`.

    A dimension that its mesh axes do not divide drops them from the right until they do: in the end it is
    replicated, which is always correct and only costs memory. Raises ValueError for an unknown name, for more names
    than dimensions, and when two dimensions ask for one mesh axis.
    """
    if len(axes) > len(shape):
        raise ValueError(f"logical axes {tuple(axes)} name {len(axes)} dimensions; the shape {tuple(shape)} has fewer")
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=False):
        mesh_axes = _mesh_axes(name)
        if used & set(mesh_axes):
            raise ValueError(f"logical axes {tuple(axes)} use mesh axis {sorted(used & set(mesh_axes))} twice")
        used |= set(mesh_axes)
        while mesh_axes and size % math.prod(mesh_shape[a] for a in mesh_axes):
            mesh_axes = mesh_axes[:-1]
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in LOGICAL_RULES:
        raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(LOGICAL_RULES)}")
    return LOGICAL_RULES[name]


def param_sharding(state: nnx.State, mesh: Mesh) -> nnx.State:
    """NamedShardings with the structure of `state`, from the logical axes that each parameter was declared with.

    `state` may hold arrays or `jax.ShapeDtypeStruct`s. Raises UserError when the mesh does not divide a parameter:
    held whole by every device it would be right, but cost the memory that the mesh was asked for to save.
    """

    def of(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape, axes = variable.get_value().shape, variable.get_metadata("logical_axes")
        for size, name in zip(shape, axes, strict=True):
            for axis in _mesh_axes(name):
                if size % mesh.shape[axis]:
                    where = ".".join(str(getattr(key, "key", key)) for key in path)
                    raise UserError(
                        f"mesh axis {axis} = {mesh.shape[axis]} does not divide {name!r} = {size} of parameter "
                        f"{where}: set mesh.{axis} to a divisor of {size}"
                    )
        return variable.replace(NamedSharding(mesh, partition_spec(shape, axes, mesh.shape)))

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is the batch (it must divide by data x fsdp)."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def on_one_device() -> bool:
    """Whether the code being traced runs on a single device: no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def constrain(x: Shaped[jax.Array, "..."], *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation whose leading dimensions have the logical names `axes`.

    Does nothing outside `jax.set_mesh`. Apply it to every layer's output: otherwise the compiler may choose a
    layout that costs communication, and one such layout computed wrong gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh.shape))


def shard(state: nnx.State, mesh: Mesh) -> nnx.State:
    """`state` placed on the mesh by `param_sharding`."""
    return jax.device_put(state, param_sharding(state, mesh))


def place(value: Any, sharding: NamedSharding | None) -> jax.Array:
    """A host array that every process has whole, on its shards; nothing is sent between processes, or compared."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    with jax.transfer_guard_host_to_device("allow"):  # it is what the caller asks for
        return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])
