"""The policy update: an algorithm's loss over deduplicated nodes, in mini-batches of constant size."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool

from z1_jax import distributed
from z1_jax.config.schema import FlowConfig, UpdateConfig
from z1_jax.models import accumulate
from z1_jax.rl import flow, loss, shares
from z1_jax.rl.parts import norms_by_part
from z1_jax.rl.prefix_cache import AnyStore, put_taken
from z1_jax.rl.rollout import NodeTable, Share
from z1_jax.sharding import constrain
from z1_jax.types import Observation, PrefixCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeBatch:
    """One optimiser step's nodes: the chunks taken there, and what the algorithm's loss needs of each.

    `seen` is what the VLM made of their observations, or the observations themselves.
    """

    seen: PrefixCache | Observation
    node: Any  # int [B], row of the node table
    x: Any  # float32 [B, K + 1, H, A]
    stochastic: Any  # bool [B, K]
    logp_old: Any  # float32 [B]
    inputs: Any  # of the loss: a tree of arrays [B, …]
    members: Any  # float32 [B], how many share the node
    valid: Any  # bool [B], false at padding


@dataclasses.dataclass(frozen=True)
class Launched:
    """An optimiser step that the device may still be computing."""

    stats: dict[str, jax.Array]  # sums and maxima over the batch
    logp: jax.Array  # float32 [B], before the step


class Updater:
    """The jitted optimiser step.

    With a prefix cache the action expert runs alone; with observations the whole policy does.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: Any,
        node_loss: loss.NodeLoss,
        flow_config: FlowConfig,
        config: UpdateConfig,
        counted: np.ndarray,
        mesh: jax.sharding.Mesh,
        *,
        in_place: bool = True,
    ):
        """Args: `optimizer`: has optax's `update`; `node_loss`: the algorithm's, pure; `counted` bool [H, A].

        in_place: of `accumulate.gradient`.
        """
        self._in_place = in_place
        self._node_loss, self._config, self._flow, self._mesh = node_loss, config, flow_config, mesh
        self._counted = jnp.asarray(counted)
        self._optimizer = optimizer
        self.traces = 0
        self._step = jax.jit(functools.partial(self._step_impl, graphdef), donate_argnums=(0, 1))

    def step(
        self,
        trainable: Any,
        opt_state: Any,
        frozen: Any,
        batch: NodeBatch,
        normaliser: float,
        lr_scale: float = 1.0,
        reference: Any = None,
    ) -> tuple[Any, Any, dict[str, float]]:
        """`place`, `launch` and `fetch` of one NumPy batch."""
        trainable, opt_state, launched = self.launch(
            trainable, opt_state, frozen, self.place(batch), normaliser, lr_scale=lr_scale, reference=reference
        )
        return trainable, opt_state, fetch(launched)

    def place(self, batch: NodeBatch) -> NodeBatch:
        """A NumPy batch on its way to the devices; returns without waiting."""
        cached = isinstance(batch.seen, PrefixCache)
        seen = put_taken(batch.seen, self._mesh) if cached else distributed.put_batch(batch.seen, self._mesh)
        rest = distributed.put_batch(dataclasses.replace(batch, seen=None), self._mesh)
        return dataclasses.replace(rest, seen=seen)

    def launch(
        self,
        trainable: Any,
        opt_state: Any,
        frozen: Any,
        batch: NodeBatch,
        normaliser: float,
        *,
        lr_scale: float = 1.0,
        noise_level: float | None = None,
        reference: Any = None,
    ) -> tuple[Any, Any, Launched]:
        """One optimiser step on a placed batch; `trainable` and `opt_state` are consumed. Returns without waiting.

        Args:
            lr_scale: multiplies the optimiser's learning rate: a schedule over iterations, whose steps vary in number.
            noise_level: that the chains were drawn with; default: the config's.
            reference: what `trainable` was before RL; needed with `kl_coef`.
        """
        noise_level = self._flow.noise_level if noise_level is None else noise_level
        trainable, opt_state, stats, logp = self._step(
            trainable,
            opt_state,
            frozen,
            reference,
            batch,
            *(distributed.put_scalar(np.float32(x), self._mesh) for x in (normaliser, lr_scale, noise_level)),
        )
        return trainable, opt_state, Launched(stats, logp)

    def trace(self, trainable: Any, opt_state: Any, frozen: Any, batch: NodeBatch) -> jax.stages.Traced:
        """The step traced for arguments that may all be abstract: nothing is computed."""
        reference = trainable if self._config.kl_coef else None
        scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * 3
        return self._step.trace(trainable, opt_state, frozen, reference, batch, *scalars)

    def _step_impl(
        self,
        graphdef: nnx.GraphDef,
        trainable: Any,
        opt_state: Any,
        frozen: Any,
        reference: Any,
        batch: NodeBatch,
        normaliser: Any,
        lr_scale: Any,
        noise_level: Any,
    ) -> tuple[Any, Any, dict[str, Any], Any]:
        self.traces += 1
        config = self._config
        parts = config.batch_size // config.micro_batch

        def add(total: Any, micro: NodeBatch) -> tuple[Any, tuple[dict[str, Any], Any]]:
            def loss_of(model: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
                other = nnx.merge(graphdef, reference, frozen) if config.kl_coef else None
                return self._loss(model, other, micro, normaliser, noise_level)

            (value, (stats, logp)), total = accumulate.gradient(
                loss_of, graphdef, trainable, frozen, total, in_place=self._in_place
            )
            return total, ({**stats, "loss": value}, logp)

        if parts == 1:
            grads, (stats, logp) = add(None, batch)
        else:
            zeros = jax.tree.map(jnp.zeros_like, trainable)
            grads, (stacked, logp) = _in_parts(add, zeros, batch, parts)
            stats = {
                name: jnp.max(value) if name.endswith(loss.MAXIMA) else jnp.sum(value)
                for name, value in stacked.items()
            }
        updates, opt_state = self._optimizer.update(grads, opt_state, trainable)
        updates = jax.tree.map(lambda update: (update * lr_scale).astype(update.dtype), updates)
        stats["grad_norm"] = optax.global_norm(grads)
        stats |= {f"grad_norm/{part}": norm for part, norm in norms_by_part(grads).items()}
        stats["update_to_weight"] = optax.global_norm(updates) / optax.global_norm(trainable)
        logp = constrain(logp.reshape(-1), "batch")  # read on the host: each process its own rows
        return optax.apply_updates(trainable, updates), opt_state, stats, logp

    def _loss(
        self, model: Any, reference: Any, batch: NodeBatch, normaliser: Any, noise_level: Any
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        config, reduce = self._config, self._flow.logprob_reduce
        most = flow.most_stochastic(self._flow.steps, self._flow.sde_steps, self._flow.last_step)
        steps = flow.chain_steps(batch.x, batch.stochastic, most)

        def transitions(model: Any) -> tuple[jax.Array, jax.Array]:
            cache = batch.seen if isinstance(batch.seen, PrefixCache) else model.encode_prefix(batch.seen)
            return flow.chain_transitions(
                lambda x, t: model.velocity(cache, x, t), steps, self._flow.steps, noise_level=noise_level
            )

        mean, std = transitions(model)
        logp = flow.transitions_logp(steps, mean, std, self._counted, reduce)
        value, stats = self._node_loss(logp, batch.logp_old, batch.inputs, batch.valid, normaliser)
        if config.kl_coef:
            other = jax.lax.stop_gradient(transitions(reference)[0])
            kl = flow.transitions_kl(mean, other, std, steps.stochastic, self._counted, reduce)
            stats["kl_reference"] = loss.reference_penalty(kl, batch.members, batch.valid, normaliser)
            value += config.kl_coef * stats["kl_reference"]
        return value, (stats, logp)


def fetch(launched: Launched) -> dict[str, float]:
    """The statistics of a step, once it is done."""
    return {name: float(value) for name, value in jax.device_get(launched.stats).items()}


def _in_parts(
    add: Callable[[Any, NodeBatch], tuple[Any, Any]], total: Any, batch: NodeBatch, parts: int
) -> tuple[Any, Any]:
    """`total, outputs` after `add` of each micro-batch in turn; outputs are stacked.

    A micro-batch that is all padding costs nothing: its outputs are zero. It is left out of the loop, because a branch
    within it would keep the sum twice: XLA writes no branch's result over what the branch was given.
    """

    def part(index: Any) -> NodeBatch:
        return _part(batch, parts, index)

    filled = jnp.any(batch.valid.reshape(parts, -1), axis=1)
    order = jnp.argsort(~filled)  # stable: those with nodes come first, in their order
    outputs = jax.tree.map(
        lambda x: jnp.zeros((parts, *x.shape), x.dtype), jax.eval_shape(lambda t: add(t, part(0))[1], total)
    )

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        total, outputs = carry
        total, new = add(total, part(order[i]))
        return total, jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, order[i], 0), outputs, new
        )

    return jax.lax.fori_loop(0, jnp.sum(filled), step, (total, outputs))


def _part(batch: NodeBatch, parts: int, index: Any) -> NodeBatch:
    """Micro-batch `index` of a batch, read where it lies."""

    def rows(x: jax.Array, axis: int = 0) -> jax.Array:
        shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis, keepdims=False)

    if isinstance(batch.seen, PrefixCache):
        seen: Any = PrefixCache(rows(batch.seen.k, 1), rows(batch.seen.v, 1), rows(batch.seen.mask))
    else:
        seen = jax.tree.map(rows, batch.seen)
    rest = jax.tree.map(rows, dataclasses.replace(batch, seen=None))
    return dataclasses.replace(rest, seen=seen)


def mini_batches(
    nodes: NodeTable,
    inputs: Any,
    usable: Bool[np.ndarray, " nodes"],
    seen: AnyStore | Observation,
    batch_size: int,
    rng: np.random.Generator,
    share: Share | None = None,
) -> Iterator[tuple[NodeBatch, float]]:
    """One epoch over the usable nodes in random order: padded batches with their normaliser Σ_i |B_i|.

    With several processes each gets its part of every batch, and all must take equally many.

    Nodes are spread evenly over the batches: a small last batch would take as long as a full one.

    Args:
        inputs: of the algorithm's loss: a tree of arrays [N, …].
        share: which process has the frames and chains of which node; None: this one has all.
    """
    room = batch_size // (share.parts if share else 1)

    def own(of: np.ndarray) -> tuple[Any, np.ndarray]:
        looks = nodes.look[of]
        chosen = jax.tree.map(lambda x: x[looks], seen) if isinstance(seen, Observation) else seen.take(looks)
        return chosen, nodes.x[share.row[of] if share else of]

    order = rng.permutation(np.flatnonzero(usable))
    if len(order) == 0:
        return
    for rows in np.array_split(order, math.ceil(len(order) / batch_size)):
        if share is None:
            padded = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
            mine, (chosen, x) = rows, own(padded)
        else:
            mine, padded, (chosen, x) = shares.brought(rows, share, room, own)
        batch = NodeBatch(
            seen=chosen,
            node=padded,
            x=x,
            stochastic=nodes.stochastic[padded],
            logp_old=nodes.logp[padded],
            inputs=jax.tree.map(lambda x: x[padded], inputs),  # noqa: B023
            members=nodes.size[padded].astype(np.float32),
            valid=np.arange(room) < len(mine),
        )
        yield batch, float(nodes.size[rows].sum())
