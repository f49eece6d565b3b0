"""What a checkpoint of a run under way holds besides its policy, and how training goes on from it.

The part `params` is always the policy as it acts: whole, adapters folded in, averaged where an average is kept. Where
training goes on from other numbers, these stand beside it: `trainable` (the parameters that the optimiser moves) and,
for averaged adapters, `average`. The frozen ones are then those of the policy that the run started from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from z1_jax.checkpoint import Checkpoints
from z1_jax.models.lora import SUFFIX
from z1_jax.policy import Policy, named, unnamed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an optimiser step reads and writes, and the parameters that it leaves alone."""

    trainable: Any
    frozen: Any
    opt_state: Any
    average: Any = None  # exponential moving average of `trainable`, where one is kept

    @property
    def acting(self) -> tuple[Any, Any]:
        """The parameters that the policy acts with."""
        return (self.trainable if self.average is None else self.average), self.frozen

    def parts(self, policy: Policy) -> dict[str, Any]:
        """The arrays of a checkpoint; `policy` is the one that acts, see `Policy.with_params`."""
        parts = {**policy.parts(), "optimizer": named(self.opt_state)}
        return parts | {name: named(tree) for name, tree in self._beside().items()}

    def restored(self, checkpoints: Checkpoints) -> tuple[int, TrainState, dict[str, Any]] | None:
        """As `restore`, where every checkpoint is of this structure."""
        return restore(checkpoints, lambda _: self)

    def wanted(self) -> dict[str, Any]:
        """The parts to load, with shapes, dtypes and shardings."""
        wanted = {"optimizer": self.opt_state, **self._beside()}
        abstract = {name: named(abstract_like(tree)) for name, tree in wanted.items()}
        if not _has_adapters(self.trainable):  # else `params` is of another structure: the folded one
            trained, frozen = map(abstract_like, self.acting)
            abstract["params"] = {**named(trained), **named(frozen)}
        return abstract

    def filled(self, loaded: Mapping[str, Any]) -> TrainState:
        """This state with what was loaded by `wanted`."""
        params = loaded.get("params", {})
        return TrainState(
            trainable=unnamed(self.trainable, loaded.get("trainable", params)),
            frozen=unnamed(self.frozen, params) if params else self.frozen,
            opt_state=unnamed(self.opt_state, loaded["optimizer"]),
            average=None if self.average is None else unnamed(self.average, loaded.get("average", params)),
        )

    def _beside(self) -> dict[str, Any]:
        """What `params` does not tell."""
        adapted = _has_adapters(self.trainable)
        beside = {"trainable": self.trainable} if adapted or self.average is not None else {}
        return beside | ({"average": self.average} if adapted and self.average is not None else {})


def restore(
    checkpoints: Checkpoints, state_of: Callable[[dict[str, Any]], TrainState]
) -> tuple[int, TrainState, dict[str, Any]] | None:
    """The step, state and document of the newest checkpoint that can be read; None where there is none.

    Args:
        state_of: a state of the structure that a checkpoint's document tells of.
    """
    like: list[TrainState] = []

    def abstract(document: dict[str, Any]) -> dict[str, Any]:
        like[:] = [state_of(document)]
        return like[0].wanted()

    newest = checkpoints.load_newest(abstract)
    if newest is None:
        return None
    step, loaded, document = newest
    return step, like[0].filled(loaded), document


def _has_adapters(tree: Any) -> bool:
    return any(f"{SUFFIX}." in name for name in named(tree))


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
