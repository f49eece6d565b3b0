"""Which form of the parameters decisions read, and keeping the prepared one until other parameters are given."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from z1_jax.models import acting
from z1_jax.models.lora import has_adapters
from z1_jax.models.pi05 import vlm_is_frozen
from z1_jax.rl import flow

Params = tuple[Any, Any]  # trainable, frozen


@dataclasses.dataclass
class _Kept:
    params: Params  # that were given
    source: tuple[Any, ...]  # those of them that were read
    prepared: acting.Prepared | None


class PreparedParams:
    """The parameters of a policy prepared for acting, kept until other ones are given.

    Prefix and expert are kept apart: while the VLM is frozen, its part is prepared once for all iterations.
    """

    def __init__(self, graphdef: nnx.GraphDef, steps: int, mesh: jax.sharding.Mesh, form: str):
        """Args: `form`: plain, prepared, or auto: prepared on accelerators; see `Compute.acting`."""
        self._mesh = mesh
        self._wanted = form == "prepared" or (form == "auto" and mesh.devices.flat[0].platform != "cpu")
        self._forced = form == "prepared"
        self._functions: dict[str, Callable[..., acting.Prepared]] = {
            "prefix": lambda *params: acting.prepare_prefix(nnx.merge(graphdef, *params)),
            "expert": lambda *params: acting.prepare_expert(nnx.merge(graphdef, *params), flow.times(steps)),
        }
        self._compiled: dict[str, Callable[..., acting.Prepared]] = {}
        self._kept: dict[str, _Kept] = {}

    def prefix(self, params: Params) -> acting.Prepared | None:
        """For `acting.encode_prefix`; None: the plain form is to be used.

        Raises:
            ValueError: the prepared form is asked for and there are adapters.
        """
        return self._get("prefix", params)

    def expert(self, params: Params) -> acting.Prepared | None:
        """For `acting.denoiser`; otherwise as `prefix`."""
        return self._get("expert", params)

    def _get(self, part: str, params: Params) -> acting.Prepared | None:
        if not self._wanted:
            return None
        kept = self._kept.get(part)
        if kept is None or not _same(kept.params, params):  # decisions come thick and fast: most end here
            self._kept[part] = kept = self._renewed(part, params)
        return kept.prepared

    def _renewed(self, part: str, params: Params) -> _Kept:
        if any(map(has_adapters, params)):
            if self._forced:
                raise ValueError("adapters cannot be prepared for acting before they are folded into their kernels")
            return _Kept(params, (), None)
        source = params[1:] if part == "prefix" and vlm_is_frozen(params[0]) else params
        kept = self._kept.pop(part, None)
        if kept is not None and _same(kept.source, source):
            return _Kept(params, source, kept.prepared)
        del kept  # before its successor needs the room
        return _Kept(params, source, self._prepare(part, params))

    def _prepare(self, part: str, params: Params) -> acting.Prepared:
        if part not in self._compiled:
            placed = acting.place(jax.eval_shape(self._functions[part], *params), self._mesh)
            if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):  # a plan: nothing is computed
                return placed
            shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
            self._compiled[part] = jax.jit(self._functions[part], out_shardings=shardings)
        return self._compiled[part](*params)


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
