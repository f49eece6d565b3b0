"""The optimiser of the policy update: one AdamW for each part of the policy, behind one global-norm clip.

A part that is trained later than the others starts with fresh moments and its own step count; theirs stay.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from z1_jax.config.schema import OptimConfig
from z1_jax.optim import init_optimizer, make_adamw
from z1_jax.policy import named, unnamed

EXPERT = "expert"


def by_part(tree: Any) -> dict[str, dict[str, Any]]:
    """The leaves of a tree of parameters by part (vision, language, expert) and name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in named(tree).items():
        parts.setdefault(name.partition(".")[0], {})[name] = leaf
    return parts


def norms_by_part(tree: Any) -> dict[str, jax.Array]:
    """The global norm of each part's leaves."""
    return {
        part: jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves.values()))
        for part, leaves in by_part(tree).items()
    }


class PartOptimizer:
    """clip(global norm) → AdamW, with the state and the learning-rate factor of each part kept apart.

    With equal factors and parts that start together it is the AdamW over all of them. `init` and `update` are pure.
    """

    def __init__(self, config: OptimConfig, vlm_lr_factor: float):
        self._clip = optax.clip_by_global_norm(config.clip_norm)
        self._adamw = make_adamw(config, config.lr)
        self._factor = vlm_lr_factor

    def init(self, params: Any) -> dict[str, Any]:
        """Fresh states by part."""
        return {part: self._adamw.init(leaves) for part, leaves in by_part(params).items()}

    def init_on(self, mesh: jax.sharding.Mesh, params: Any, previous: dict[str, Any] | None = None) -> dict[str, Any]:
        """States placed like their parameters; a part that stands in `previous` keeps what it has there."""
        previous = previous or {}
        return {
            part: previous[part] if part in previous else init_optimizer(self._adamw, leaves, mesh)
            for part, leaves in by_part(params).items()
        }

    def update(self, grads: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        """Updates of `params` and the new states."""
        clipped, _ = self._clip.update(grads, optax.EmptyState())
        updates: dict[str, Any] = {}
        weights, new = by_part(params), {}
        for part, leaves in by_part(clipped).items():
            step, new[part] = self._adamw.update(leaves, state[part], weights[part])
            factor = 1.0 if part == EXPERT else self._factor
            updates |= step if factor == 1.0 else optax.tree.scale(factor, step)
        return unnamed(params, updates), new
