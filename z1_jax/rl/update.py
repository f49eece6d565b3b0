"""The policy update: clipped GRPO over deduplicated nodes, in mini-batches of constant size."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from z1_jax import distributed
from z1_jax.config import FlowConfig, UpdateConfig
from z1_jax.errors import UserError
from z1_jax.rl import flow, loss
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.rollout import NodeTable
from z1_jax.types import Observation, PrefixCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeBatch:
    """One optimiser step's nodes. `seen` is what the VLM made of their observations, or the observations themselves."""

    seen: PrefixCache | Observation
    x: Any  # float32 [B, K + 1, H, A]
    stochastic: Any  # bool [B, K]
    logp_old: Any  # float32 [B]
    positive: Any  # float32 [B], A⁺
    negative: Any  # float32 [B], A⁻
    valid: Any  # bool [B], false at padding


class RatioError(UserError):
    """The importance ratio of the first update is not 1: the update does not score what the rollout sampled."""


class Updater:
    """The jitted optimiser step.

    With a prefix cache the action expert runs alone; with observations the whole policy does (scope joint).
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        flow_config: FlowConfig,
        config: UpdateConfig,
        counted: np.ndarray,
        mesh: jax.sharding.Mesh,
    ):
        self._config, self._flow, self._mesh = config, flow_config, mesh
        self._counted = jnp.asarray(counted)
        self._optimizer = optimizer
        self.traces = 0
        self._step = jax.jit(functools.partial(self._step_impl, graphdef), donate_argnums=(0, 1))

    def step(
        self, trainable: Any, opt_state: Any, frozen: Any, batch: NodeBatch, normaliser: float, lr_scale: float = 1.0
    ) -> tuple[Any, Any, dict[str, float]]:
        """One optimiser step on a NumPy batch; `trainable` and `opt_state` are consumed.

        `lr_scale` multiplies the optimiser's learning rate: a schedule over iterations, whose number of steps varies.
        """
        if isinstance(batch.seen, PrefixCache):
            seen = distributed.put_cache(batch.seen, self._mesh)
        else:
            seen = distributed.put_batch(batch.seen, self._mesh)
        rest = distributed.put_batch(dataclasses.replace(batch, seen=None), self._mesh)
        trainable, opt_state, stats = self._step(
            trainable,
            opt_state,
            frozen,
            dataclasses.replace(rest, seen=seen),
            jnp.float32(normaliser),
            jnp.float32(lr_scale),
        )
        return trainable, opt_state, {name: float(value) for name, value in jax.device_get(stats).items()}

    def trace(self, trainable: Any, opt_state: Any, frozen: Any, batch: NodeBatch) -> jax.stages.Traced:
        """The step traced for arguments that may all be abstract: nothing is computed."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        return self._step.trace(trainable, opt_state, frozen, batch, scalar, scalar)

    def _step_impl(
        self,
        graphdef: nnx.GraphDef,
        trainable: Any,
        opt_state: Any,
        frozen: Any,
        batch: NodeBatch,
        normaliser: Any,
        lr_scale: Any,
    ) -> tuple[Any, Any, dict[str, Any]]:
        self.traces += 1
        config = self._config
        parts = config.batch_size // config.micro_batch
        gradient = jax.value_and_grad(functools.partial(self._loss, graphdef), has_aux=True)

        def accumulate(total: Any, micro: NodeBatch) -> tuple[Any, dict[str, Any]]:
            (value, stats), grads = gradient(trainable, frozen, micro, normaliser)
            return jax.tree.map(jnp.add, total, grads), {**stats, "loss": value}

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        if parts == 1:
            grads, stats = accumulate(zeros, batch)
        else:
            grads, stacked = jax.lax.scan(accumulate, zeros, _split_rows(batch, parts))
            stats = {
                name: jnp.max(value) if name in ("ratio_max", "ratio_error") else jnp.sum(value)
                for name, value in stacked.items()
            }
        updates, opt_state = self._optimizer.update(grads, opt_state, trainable)
        updates = jax.tree.map(lambda update: (update * lr_scale).astype(update.dtype), updates)
        stats["grad_norm"] = optax.global_norm(grads)
        stats["update_to_weight"] = optax.global_norm(updates) / optax.global_norm(trainable)
        return optax.apply_updates(trainable, updates), opt_state, stats

    def _loss(
        self, graphdef: nnx.GraphDef, trainable: Any, frozen: Any, batch: NodeBatch, normaliser: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, trainable, frozen)
        cache = batch.seen if isinstance(batch.seen, PrefixCache) else model.encode_prefix(batch.seen)
        logp = flow.chain_logp(
            lambda x, t: model.velocity(cache, x, t),
            batch.x,
            batch.stochastic,
            self._counted,
            noise_level=self._flow.noise_level,
            reduce=self._flow.logprob_reduce,
        )
        return loss.grpo_loss(
            logp,
            batch.logp_old,
            batch.positive,
            batch.negative,
            batch.valid,
            normaliser,
            self._config.clip_low,
            self._config.clip_high,
        )


def _split_rows(batch: NodeBatch, parts: int) -> NodeBatch:
    def rows(x: jax.Array, axis: int = 0) -> jax.Array:
        shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    if isinstance(batch.seen, PrefixCache):
        seen: Any = PrefixCache(rows(batch.seen.k, 1), rows(batch.seen.v, 1), rows(batch.seen.mask))
    else:
        seen = jax.tree.map(rows, batch.seen)
    rest = jax.tree.map(rows, dataclasses.replace(batch, seen=None))
    return dataclasses.replace(rest, seen=seen)


def mini_batches(
    nodes: NodeTable,
    positive: np.ndarray,
    negative: np.ndarray,
    usable: np.ndarray,
    seen: PrefixStore | Observation,
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[tuple[NodeBatch, float]]:
    """One epoch over the usable nodes in random order: padded batches with their normaliser Σ_i |B_i|.

    Nodes are dealt evenly, so that no small remainder takes a step as long as a full batch's.
    """
    order = rng.permutation(np.flatnonzero(usable))
    if len(order) == 0:
        return
    for rows in np.array_split(order, math.ceil(len(order) / batch_size)):
        valid = np.arange(batch_size) < len(rows)
        padded = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
        looks = nodes.look[padded]
        batch = NodeBatch(
            seen=seen.take(looks) if isinstance(seen, PrefixStore) else jax.tree.map(lambda x: x[looks], seen),  # noqa: B023
            x=nodes.x[padded],
            stochastic=nodes.stochastic[padded],
            logp_old=nodes.logp[padded],
            positive=positive[padded],
            negative=negative[padded],
            valid=valid,
        )
        yield batch, float(nodes.size[rows].sum())
