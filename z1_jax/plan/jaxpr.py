"""What a traced function costs, read from its jaxpr: operations, and bytes alive at once.

Independent of any compiler, so that a machine without the accelerator can say something about one with it. The
estimate of memory supposes what XLA does on an accelerator: element-wise operations are fused into their consumers
and need no memory unless a matrix product, a loop or the caller reads them; a dead buffer is used again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

_VIEWS = {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "sharding_constraint", "transpose"}
_IN_PLACE = {"scan", "while", "scatter", "scatter-add", "scatter_add", "dynamic_update_slice"}
_READERS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"}  # fuse what they read
_FUSED = set(
    "abs add add_any and broadcast_in_dim clamp concatenate convert_element_type cos div eq exp exp2 floor ge gt "
    "integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not or pad pow real rem rsqrt select_n "
    "sign sin slice split sqrt square sub tanh erf shift_left shift_right_logical shift_right_arithmetic xor".split()
)


def _bodies(equation: Any) -> list[core.Jaxpr]:
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of matrix products; a multiply-add counts as two."""

    total: int  # with every loop's body times its trips
    bodies_once: int  # with every loop's body once, as compilers' cost analyses count


def count_flops(jaxpr: core.Jaxpr, trips: int = 1) -> Flops:
    """Operations of a jaxpr, those in inner functions and loops included.

    Args:
        trips: of a loop whose length the data decide.
    """
    total = once = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            flops = _dot_flops(equation)
            total, once = total + flops, once + flops
            continue
        times = {"scan": equation.params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        for body in _bodies(equation):
            inner = count_flops(body, trips)
            total, once = total + times * inner.total, once + inner.bodies_once
    return Flops(total, once)


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


Size = Callable[[Any], float]  # a value's aval -> bytes on one device


def nbytes(aval: Any) -> float:
    """Bytes of a value that one device holds whole."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8.0 * math.prod(aval.shape)
    return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)


def peak_bytes(jaxpr: core.Jaxpr, *, size: Size = nbytes, in_place: Sequence[Any] = ()) -> float:
    """Most bytes alive at once beside the arguments: temporaries, and results that are not written over an argument.

    Args:
        size: bytes of a value; values inside loops are measured by `nbytes`.
        in_place: outputs (variables of `jaxpr.outvars`) that take the memory of a donated argument.
    """
    return _Sweep(jaxpr, size, set(map(id, in_place))).peak()


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    equation: Any

    @property
    def fuses(self) -> bool:
        """Whether it can be computed within its consumers."""
        return self.name in _FUSED

    @property
    def forces(self) -> bool:
        """Whether what it reads must lie in memory."""
        return not (self.fuses or self.name in _READERS or self.name in _VIEWS)


class _Sweep:
    """One pass over a jaxpr in its order, with inner calls written out and loops as single operations."""

    def __init__(self, jaxpr: core.Jaxpr, size: Size, in_place: set[int]):
        self._bytes: list[float] = []  # by value number
        environment = {id(v): self._new(0.0) for v in (*jaxpr.invars, *jaxpr.constvars)}
        self._operations = list(self._flatten(jaxpr, environment, size))
        outs = [v for v in jaxpr.outvars if not isinstance(v, core.Literal)]
        self._free = {environment[id(v)] for v in outs if id(v) in in_place}
        self._outputs = {environment[id(v)] for v in outs}

    def _new(self, nbytes: float) -> int:
        self._bytes.append(nbytes)
        return len(self._bytes) - 1

    def _flatten(self, jaxpr: core.Jaxpr, known: dict[int, int], size: Size) -> Iterator[_Operation]:
        for equation in jaxpr.eqns:
            inputs = [None if isinstance(v, core.Literal) else known[id(v)] for v in equation.invars]
            bodies = _bodies(equation)
            if len(bodies) == 1 and equation.primitive.name not in ("scan", "while"):
                body = bodies[0]
                inner = dict(zip(map(id, body.invars), (self._new(0.0) if i is None else i for i in inputs)))  # noqa: B905
                inner |= {id(v): self._new(0.0) for v in body.constvars}
                yield from self._flatten(body, inner, size)
                for outer, result in zip(equation.outvars, body.outvars, strict=True):
                    literal = isinstance(result, core.Literal)
                    known[id(outer)] = self._new(0.0) if literal else inner[id(result)]
                continue
            unchanged = _unchanged(equation)
            for i, v in enumerate(equation.outvars):
                source = inputs[unchanged[i]] if i in unchanged else None
                known[id(v)] = self._new(size(v.aval)) if source is None else source
            outputs = tuple(known[id(v)] for v in equation.outvars)
            yield _Operation(equation.primitive.name, tuple(i for i in inputs if i is not None), outputs, equation)

    def _in_memory(self) -> set[int]:
        """Values that something reads from memory, or that only a product, a loop and the like can make."""
        kept = set(self._outputs)
        for operation in reversed(self._operations):
            if operation.forces or (operation.name in _VIEWS and operation.outputs[0] in kept):
                kept.update(operation.inputs)
        for operation in self._operations:
            if not operation.fuses and operation.name not in _VIEWS:
                kept.update(operation.outputs)
            elif operation.name in _VIEWS:
                kept.difference_update(operation.outputs)
        return kept

    def peak(self) -> float:
        """The most bytes alive at once."""
        roots: dict[Any, Any] = {}
        kept = self._in_memory()
        sources: list[set[int]] = []  # by operation: the values in memory that it reads
        last: dict[int, int] = {}
        for index, operation in enumerate(self._operations):
            read = set().union(*(roots.get(i, {i}) for i in operation.inputs)) if operation.inputs else set()
            sources.append(read)
            last.update(dict.fromkeys(read, index))
            for out in operation.outputs:
                roots[out] = {out} if out in kept else read
        last.update(dict.fromkeys(set().union(*(roots.get(o, {o}) for o in self._outputs), set()), len(sources)))
        for out in self._free:  # and whatever they are views of
            for root in roots.get(out, {out}):
                self._bytes[root] = 0.0
        alive = most = 0.0
        for index, (operation, read) in enumerate(zip(self._operations, sources, strict=True)):
            dying = sum(self._bytes[i] for i in read if last[i] == index)
            made = sum(self._bytes[i] for i in operation.outputs if i in kept)
            unused = sum(self._bytes[i] for i in operation.outputs if i in kept and i not in last)
            reuses = operation.fuses or operation.name in _IN_PLACE  # writes over what it is the last to read
            before = alive - dying if reuses else alive
            most = max(most, before + made + _inside(operation), alive)
            alive += made - dying - unused
        return most


def _unchanged(equation: Any) -> dict[int, int]:
    """Of a loop: results that are an operand as it was, carried through, by their position; the operand's."""
    if equation.primitive.name != "scan":
        return {}
    body, first = equation.params["jaxpr"].jaxpr, equation.params["num_consts"]
    carried = body.invars[first : first + equation.params["num_carry"]]
    return {i: first + i for i, v in enumerate(carried) if body.outvars[i] is v}


def _inside(operation: _Operation) -> float:
    """Bytes that a loop's body needs for itself."""
    bodies = _bodies(operation.equation)
    if not bodies:
        return 0.0
    if operation.name == "while":
        bodies = [operation.equation.params["body_jaxpr"].jaxpr]
    elif operation.name != "scan":
        return max(peak_bytes(body) for body in bodies)
    return peak_bytes(bodies[0], in_place=[v for v in bodies[0].outvars if _written_over(v, bodies[0])])


def _written_over(v: Any, body: core.Jaxpr) -> bool:
    """Whether a result of a loop's body needs no memory of its own.

    A carried value is updated in place, also by a loop in the body that carries it on; a slice is written straight into
    the stacked result, where an element-wise operation makes it.
    """
    makers = {id(made): (equation, i) for equation in body.eqns for i, made in enumerate(equation.outvars)}
    if id(v) not in makers:
        return False
    equation, i = makers[id(v)]
    if equation.primitive.name == "scan":
        operand = equation.invars[equation.params["num_consts"] + i]
        return i < equation.params["num_carry"] and operand in body.invars
    return equation.primitive.name in _FUSED | _VIEWS | {"dynamic_update_slice"}
