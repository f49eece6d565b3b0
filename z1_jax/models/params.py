"""Declares parameters: a layer states shape, logical axes and initial values once, where it is made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Key

from z1_jax.sharding import param_sharding, place


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial values of a parameter: normal with this mean and standard deviation (0: constant)."""

    std: float = 0.0
    mean: float = 0.0


ZEROS, ONES = Init(), Init(mean=1.0)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """An einsum of an input and one kernel, such as "...d,ckdh->c...kh", by the letters of the kernel.

    Attributes:
        letters: of the kernel, in its order.
        contracted: letters shared with the input, which are summed over.
        several: letters before the tokens in the output: they count several kernels.
        produced: letters behind the tokens in the output.
    """

    letters: str
    contracted: str
    several: str
    produced: str

    @classmethod
    def parse(cls, pattern: str) -> Pattern:
        """From the einsum's text."""
        letters, outputs = pattern.partition(",")[2].split("->")
        several, produced = outputs.split("...")
        return cls(letters, "".join(c for c in letters if c not in outputs), several, produced)

    def matrix(self, stacked: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The kernel's axes that are a matrix's input and its output, behind `stacked` leading axes."""

        def axes(names: str) -> tuple[int, ...]:
            return tuple(stacked + self.letters.index(name) for name in names)

        return axes(self.contracted), axes(self.produced)


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Init,
    *,
    layers: int | None = None,
    keep_float32: bool = False,
    pattern: str | None = None,
) -> nnx.Param:
    """Declares a float32 parameter: shape, logical axes (see sharding) and initial values of one layer.

    Its value is a `jax.ShapeDtypeStruct` until `initialise` or a checkpoint fills it. `layers` adds a leading axis of
    that length. `keep_float32` marks a parameter that is used in float32 whatever the compute dtype, and so must not be
    cast down when frozen. `pattern` is the einsum that applies a kernel to its input: it says which axes make a matrix.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes; got {axes}")
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    matrix = None if pattern is None else Pattern.parse(pattern).matrix(stacked=layers is not None)
    return nnx.Param(value, logical_axes=axes, init=init, keep_float32=keep_float32, matrix=matrix)


def initialise(state: nnx.State, seed: int | Key[jax.Array, ""], mesh: Mesh | None = None) -> nnx.State:
    """`state` with values drawn for every parameter that is still abstract; `seed` is an int or a JAX key.

    With `mesh`, each goes straight onto its shards: neither the host nor a device holds more than one whole array.
    """
    words = np.asarray(seed if isinstance(seed, int) else jax.random.key_data(seed)).ravel().tolist()
    filled = []
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            value = _initial_value(variable, [*words, *"/".join(map(str, path)).encode()])
            sharding = None if mesh is None else param_sharding(variable, mesh).get_value()  # type: ignore[operator]
            variable = variable.replace(place(value, sharding))
        filled.append((path, variable))
    return nnx.from_flat_state(filled)


def _initial_value(variable: nnx.Variable, seed: list[int]) -> np.ndarray:
    # Drawn on the host: compiling a generator for every shape would take half a minute for a small model. Seeded by the
    # parameter's path, so that values depend neither on the order of declarations nor on devices.
    shape, init = variable.get_value().shape, variable.get_metadata("init")
    if init.std == 0:
        return np.full(shape, init.mean, np.float32)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= init.std
    return values if init.mean == 0 else values + np.float32(init.mean)
