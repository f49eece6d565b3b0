"""Which form of the parameters decisions read, and keeping the prepared one until other parameters are given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from z1_jax.models import acting
from z1_jax.models.lora import has_adapters
from z1_jax.models.pi05 import vlm_is_frozen
from z1_jax.rl import flow


class PreparedParams:
    """The parameters of a policy prepared for acting, kept until other ones are given.

    Prefix and expert are kept apart: while the VLM is frozen, its part is prepared once for all iterations.
    """

    def __init__(self, graphdef: nnx.GraphDef, steps: int, mesh: jax.sharding.Mesh, form: str):
        """Args: `form`: plain, prepared, or auto: prepared on accelerators; see `Compute`."""
        self._mesh = mesh
        self._wanted = form == "prepared" or (form == "auto" and mesh.devices.flat[0].platform != "cpu")
        self._forced = form == "prepared"
        self._functions: dict[str, Callable[..., acting.Prepared]] = {
            "prefix": lambda *params: acting.prepare_prefix(nnx.merge(graphdef, *params)),
            "expert": lambda *params: acting.prepare_expert(nnx.merge(graphdef, *params), flow.times(steps)),
        }
        self._compiled: dict[str, Callable[..., acting.Prepared]] = {}
        self._kept: dict[str, tuple[tuple[Any, ...], acting.Prepared]] = {}

    def prefix(self, params: tuple[Any, Any]) -> acting.Prepared | None:
        """For `acting.encode_prefix`; None: the plain form is to be used."""
        return self._get("prefix", params, params[1:] if vlm_is_frozen(params[0]) else params)

    def expert(self, params: tuple[Any, Any]) -> acting.Prepared | None:
        """For `acting.denoiser`; None: the plain form is to be used."""
        return self._get("expert", params, params)

    def _get(self, part: str, params: tuple[Any, Any], source: tuple[Any, ...]) -> acting.Prepared | None:
        if not self._wanted or any(map(has_adapters, params)):
            if self._forced:
                raise ValueError("adapters cannot be prepared for acting before they are folded into their kernels")
            return None
        kept, prepared = self._kept.get(part, ((), None))
        if prepared is not None and len(kept) == len(source) and all(map(operator.is_, kept, source)):
            return prepared
        del prepared
        self._kept.pop(part, None)  # before its successor needs the room
        if part not in self._compiled:
            placed = acting.place(jax.eval_shape(self._functions[part], *params), self._mesh)
            if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):  # a plan: nothing is computed
                return placed
            shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
            self._compiled[part] = jax.jit(self._functions[part], out_shardings=shardings)
        made = self._compiled[part](*params)
        self._kept[part] = (source, made)
        return made
