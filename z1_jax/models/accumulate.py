"""A gradient added to the sum of those before it, without a second one in memory.

A loop over stacked layers makes the gradient of the whole stack before anything can be added to it: twice the memory
of the trained parameters. Here the sum travels backwards through that loop, and each layer's gradient is added to its
place in it. For that the parameters also come out of the network, through the loop that reads them: the cotangent
that is given for that output is the sum so far, and the one that arrives at the parameters is the sum afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

_MARK = "summed"  # metadata of parameters whose gradient is added to a sum


def is_summed(path: Any, variable: Any) -> bool:
    """Whether the gradient of a parameter is added to a sum: a filter for `nnx.split`."""
    return isinstance(variable, nnx.Variable) and bool(variable.get_metadata().get(_MARK))


def gradient(
    loss: Callable[[Any], tuple[Float[jax.Array, ""], Any]],
    graphdef: nnx.GraphDef,
    params: Any,
    frozen: Any,
    total: Any = None,
    *,
    in_place: bool = True,
) -> tuple[tuple[jax.Array, Any], Any]:
    """`((value, aux), gradient)` as of `jax.value_and_grad`; with a `total`, the gradient added to it.

    Args:
        loss: of the model that `graphdef`, `params` and `frozen` make: a scalar, and anything else.
        total: the sum so far, with the structure of `params`. The compiler can write the result over it.
        in_place: false makes the whole gradient first: faster on a CPU where layers are written out (docs/cost.md).
    """
    if total is None or not in_place:
        out, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p, frozen)), has_aux=True)(params)
        return out, grads if total is None else jax.tree.map(jnp.add, total, grads)

    def through(params: Any) -> tuple[tuple[jax.Array, list[Any]], Any]:
        marked = jax.tree.map(lambda x: x.replace(**{_MARK: True}), params, is_leaf=_is_variable)
        model = nnx.merge(graphdef, marked, frozen)
        value, aux = loss(model)
        return (value, jax.tree.leaves(nnx.state(model, is_summed))), aux

    (value, _), pull, aux = jax.vjp(through, params, has_aux=True)
    return (value, aux), pull((jnp.ones_like(value), jax.tree.leaves(total)))[0]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


@jax.custom_vjp
def tie(layer: Any, stack: Any, index: Int[jax.Array, ""]) -> tuple[Any, Any]:
    """`layer` and `stack` as they are. Backwards the layer's cotangent is added to row `index` of the stack's.

    Args:
        layer: a layer's parameters, read from the stack without a gradient of their own.
        stack: the parameters [layers, …] of all layers, as they came from the layer before.
    """
    return layer, stack


def _forward(layer: Any, stack: Any, index: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    return (layer, stack), index


def _backward(index: jax.Array, cotangents: tuple[Any, Any]) -> tuple[None, Any, None]:
    def add(total: jax.Array, part: jax.Array) -> jax.Array:
        at: list[Any] = [index, *[0] * part.ndim]
        row = jax.lax.dynamic_slice(total, at, (1, *part.shape))
        return jax.lax.dynamic_update_slice(total, row + part[None], at)

    layer, stack = cotangents
    return None, jax.tree.map(add, stack, layer), None


tie.defvjp(_forward, _backward)
