"""Declaring parameters: shape, logical axes and initial values are stated once, where a layer is made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from z1_jax.sharding import param_sharding


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial values of a parameter: normal with this mean and standard deviation (0: constant)."""

    std: float = 0.0
    mean: float = 0.0


ZEROS, ONES = Init(), Init(mean=1.0)


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Init,
    *,
    layers: int | None = None,
    keep_float32: bool = False,
) -> nnx.Param:
    """Declares a float32 parameter: shape, logical axes (see sharding) and initial values of one layer.

    Its value is a `jax.ShapeDtypeStruct` until `initialise` or a checkpoint fills it. `layers` adds a leading axis of
    that length. `keep_float32` marks what must not be cast down when frozen: it is used in float32 whatever the
    compute dtype.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes; got {axes}")
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes, init=init, keep_float32=keep_float32)


def initialise(state: nnx.State, seed: int | jax.Array, mesh: Mesh | None = None) -> nnx.State:
    """`state` with every parameter that is still abstract drawn; `seed` is an int or a JAX key.

    With `mesh`, each goes straight onto its shards: neither the host nor a device holds more than one whole array.
    """
    words = np.asarray(seed if isinstance(seed, int) else jax.random.key_data(seed)).ravel().tolist()
    filled = []
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            value = _initial_value(variable, [*words, *"/".join(map(str, path)).encode()])
            sharding = None if mesh is None else param_sharding(variable, mesh).get_value()
            variable = variable.replace(jax.device_put(value, sharding))
        filled.append((path, variable))
    return nnx.from_flat_state(filled)


def _initial_value(variable: nnx.Variable, seed: list[int]) -> np.ndarray:
    # Drawn on the host: compiling a generator for every shape would take a small model half a minute. Seeded by the
    # parameter's path: the value depends neither on the order of declarations nor on devices.
    shape, init = variable.get_value().shape, variable.get_metadata("init")
    if init.std == 0:
        return np.full(shape, init.mean, np.float32)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= init.std
    return values if init.mean == 0 else values + np.float32(init.mean)
