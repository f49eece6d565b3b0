"""The jitted functions of a run, traced for abstract arrays: the very functions that training calls, nothing allocated.

Each comes with the bytes that a device holds while it runs. Knows no accelerator and prints nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from z1_jax.config.schema import Config
from z1_jax.models.lora import has_adapters
from z1_jax.models.pi05 import Pi05Config, count_parameters, vlm_is_frozen
from z1_jax.plan import analytic, jaxpr
from z1_jax.policy import Policy, abstract_params
from z1_jax.rl import loss
from z1_jax.rl.actor import make_actor
from z1_jax.rl.flow import most_stochastic
from z1_jax.rl.parts import PartOptimizer
from z1_jax.rl.prepared import PreparedParams
from z1_jax.rl.update import NodeBatch, Updater
from z1_jax.sft import SftTrainer
from z1_jax.sharding import batch_sharding
from z1_jax.types import Observation, PrefixCache


@dataclasses.dataclass(frozen=True)
class Program:
    """One function of a run. Bytes are of the device that holds most."""

    name: str  # sft_step | rl_update | encode | denoise
    trace: Callable[[], jax.stages.Traced]
    parameters: int  # bytes of all parameters of the run, read by this function or not
    optimizer: int  # bytes of the optimiser's state, which stays on the device from step to step
    gradients: int  # bytes of one gradient of what it trains
    inputs: int  # bytes of its batch, prefix caches included
    outputs: int  # bytes of results that are not written over an argument
    work: analytic.Work  # over all devices
    trips: int = 1  # at most, of a loop whose length data decide

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The function for its abstract arguments, traced when it is first asked for."""
        return self.trace()


def trace_programs(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh) -> list[Program]:
    """The SFT step, and for algorithm grpo the update and the sampler: what a run of `config` compiles.

    Each is traced where its `traced` is read.
    """
    policy = abstract_policy(config, model, mesh)
    programs = [] if config.algorithm == "grpo" and config.init else [_sft(config, policy, mesh)]
    return programs + (_rl(config, policy, mesh) if config.algorithm == "grpo" else [])


@dataclasses.dataclass(frozen=True)
class _AbstractProcessor:
    """What the trainers ask of a processor; which dimensions count and which slots move changes no shape."""

    env_action_dim: int
    moved_slots: tuple[int, ...] = (0,)

    @property
    def counted_dims(self) -> np.ndarray:
        return np.ones(self.env_action_dim, bool)


def abstract_policy(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh) -> Policy:
    graphdef, params = abstract_params(model, mesh)
    processor: Any = _AbstractProcessor(model.action_dim)
    executed = config.env.executed or model.horizon
    return Policy(model, graphdef, params, processor, executed, denoising_steps=config.flow.steps)


def _sft(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> Program:
    model, batch = policy.config, config.sft.batch_size
    trainer = SftTrainer(policy, config.sft, config.seed, mesh, config.lora)
    inputs = (
        abstract_observation(model, batch, mesh),
        _rows(mesh, (batch, model.horizon, model.action_dim), jnp.float32),
    )
    state = trainer.state
    return Program(
        name="sft_step",
        trace=_on(mesh, lambda: trainer.trace(*inputs)),
        parameters=bytes_per_device((state.trainable, state.frozen, state.average)),
        optimizer=bytes_per_device(state.opt_state),
        gradients=bytes_per_device(state.trainable),
        inputs=bytes_per_device(inputs),
        outputs=0,
        work=analytic.training_work(
            model,
            batch,
            config.sft.flows,
            trainable=count_parameters(state.trainable),
            encoded=True,
            trains_vlm=not vlm_is_frozen(state.trainable),
        ),
    )


def _rl(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> list[Program]:
    model, update, flow = policy.config, config.update, config.flow
    graphdef, trainable, frozen = policy.split(acting_scope(config), config.lora)
    optimizer = PartOptimizer(update.optim, update.vlm_lr_factor)
    opt_state = optimizer.init_on(mesh, trainable)
    actor = make_actor(policy, graphdef, flow, mesh, config.env.parallel)
    node_loss = loss.grpo(update.clip_low, update.clip_high, update.ratio_max)
    updater = Updater(graphdef, optimizer, node_loss, flow, update, actor.counted, mesh, in_place=not model.unroll)
    frozen_vlm = vlm_is_frozen(trainable)
    cached = frozen_vlm and update.prefix_cache != "recompute"
    nodes = abstract_nodes(model, update.batch_size, flow.steps, mesh, cached=cached)
    rows = actor.largest  # environments, padded to what the devices divide
    looks = abstract_observation(model, rows, mesh)
    cache = abstract_cache(model, rows, mesh)
    chain = abstract_noise(model, rows, flow.steps, mesh)
    step = _on(mesh, lambda: updater.trace(trainable, opt_state, frozen, nodes))
    encode = _on(mesh, lambda: actor.trace_encode((trainable, frozen), looks))
    denoise = _on(mesh, lambda: actor.trace_sample((trainable, frozen), cache, *chain))
    common = {
        "parameters": bytes_per_device((trainable, frozen, trainable if update.kl_coef else None)),
        "optimizer": bytes_per_device(opt_state),
    }
    learning = analytic.training_work(
        model,
        update.batch_size,
        most_stochastic(flow.steps, flow.sde_steps, flow.last_step),
        trainable=count_parameters(trainable),
        encoded=not cached,
        trains_vlm=not frozen_vlm,
    )
    decision = analytic.decision_work(model, rows, flow.steps)
    encoding = rows * analytic.prefix_flops(model)
    return [
        Program("rl_update", step, gradients=bytes_per_device(trainable), inputs=bytes_per_device(nodes), outputs=0,
                work=learning, trips=update.batch_size // update.micro_batch, **common),
        Program("encode", encode, gradients=0, inputs=bytes_per_device(looks), outputs=bytes_per_device(cache),
                work=analytic.Work(encoding), **common),
        Program("denoise", denoise, gradients=0, inputs=bytes_per_device((cache, chain)), outputs=_local(chain[0]),
                work=analytic.Work(decision.flops - encoding, decision.weight_bytes), **common),
    ]  # fmt: skip


def _on(mesh: jax.sharding.Mesh, trace: Callable[[], jax.stages.Traced]) -> Callable[[], jax.stages.Traced]:
    def traced() -> jax.stages.Traced:
        with jax.set_mesh(mesh):
            return trace()

    return traced


def abstract_observation(model: Pi05Config, batch: int, mesh: jax.sharding.Mesh, cameras: int | None = None) -> Any:
    """Observations as the processor makes them."""
    cameras, size, length = cameras or model.cameras, model.vision.image_size, model.prompt_length
    return Observation(
        images=_rows(mesh, (batch, cameras, size, size, 3), jnp.uint8),
        image_mask=_rows(mesh, (batch, cameras), jnp.bool_),
        tokens=_rows(mesh, (batch, length), jnp.int32),
        token_mask=_rows(mesh, (batch, length), jnp.bool_),
    )


def abstract_cache(model: Pi05Config, batch: int, mesh: jax.sharding.Mesh, cameras: int | None = None) -> PrefixCache:
    """The prefix cache of a batch, placed as `distributed.put_cache` places it."""
    language = model.language
    length = (cameras or model.cameras) * model.vision.tokens + model.prompt_length
    shape = (language.depth, batch, length, language.kv_heads, language.head_dim)
    layered = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec))
    keys = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype), sharding=layered)
    return PrefixCache(keys, keys, _rows(mesh, (batch, length), jnp.bool_))


def abstract_noise(model: Pi05Config, batch: int, steps: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """What drives one chain of each observation: noise and stochastic steps."""
    noise = _rows(mesh, (batch, 1, steps + 1, model.horizon, model.action_dim), jnp.float32)
    return noise, _rows(mesh, (batch, 1, steps), jnp.bool_)


def abstract_nodes(model: Pi05Config, batch: int, steps: int, mesh: jax.sharding.Mesh, *, cached: bool) -> NodeBatch:
    """The nodes of one optimiser step, with prefix caches or with observations."""
    number = _rows(mesh, (batch,), jnp.float32)
    return NodeBatch(
        seen=abstract_cache(model, batch, mesh) if cached else abstract_observation(model, batch, mesh),
        x=_rows(mesh, (batch, steps + 1, model.horizon, model.action_dim), jnp.float32),
        stochastic=_rows(mesh, (batch, steps), jnp.bool_),
        node=_rows(mesh, (batch,), jnp.int32),
        logp_old=number,
        inputs={"positive": number, "negative": number},
        members=number,
        valid=_rows(mesh, (batch,), jnp.bool_),
    )


def prepared_bytes(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh) -> int:
    """Bytes on one device of the copy of the parameters that decisions read on an accelerator (see `models.acting`).

    It stays there while the update runs; 0 where the run makes none: model.acting=plain, or adapters.
    """
    policy = abstract_policy(config, model, mesh)
    graphdef, *params = policy.split(acting_scope(config), config.lora)
    if model.acting == "plain" or any(map(has_adapters, params)):
        return 0
    prepared = PreparedParams(graphdef, config.flow.steps, mesh, "prepared")
    return bytes_per_device((prepared.prefix((params[0], params[1])), prepared.expert((params[0], params[1]))))


def acting_scope(config: Config) -> str:
    """What RL trains; of the scopes of `auto` the dearer one."""
    return config.selective.then if config.train.scope == "auto" else config.train.scope


def _rows(mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of (abstract) arrays on one device, by their shardings."""
    return sum(_local(leaf) for leaf in jax.tree.leaves(tree))


def _local(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def estimated_temporary(program: Program, shares: dict[tuple[int, ...], float]) -> float:
    """Bytes of activations, gradients and all else that comes and goes, from the jaxpr alone (see `traced`).

    Args:
        program: traced for one device with its share of the batch.
        shares: of a gradient, by its parameter's shape, the part that the device holds.
    """
    closed = program.traced.jaxpr
    donated = sum(info.donated for info in jax.tree.leaves(program.traced.args_info))

    def size(aval: Any) -> float:
        return jaxpr.nbytes(aval) * shares.get(tuple(aval.shape), 1.0)

    return jaxpr.peak_bytes(closed.jaxpr, size=size, in_place=closed.jaxpr.outvars[:donated]) - program.outputs


def gradient_shares(model: Pi05Config, mesh: jax.sharding.Mesh) -> dict[tuple[int, ...], float]:
    """By parameter shape: the part of it that one device of the mesh holds."""
    leaves = jax.tree.leaves(abstract_params(model, mesh)[1])
    return {leaf.shape: math.prod(leaf.sharding.shard_shape(leaf.shape)) / math.prod(leaf.shape) for leaf in leaves}


def local_config(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """`config` with the share of every batch that one device of the mesh has."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    sft = dataclasses.replace(
        config.sft,
        batch_size=max(config.sft.batch_size // shards, 1),
        micro_batch=config.sft.micro_batch // shards,
    )
    update = dataclasses.replace(
        config.update,
        batch_size=config.update.batch_size // shards,
        micro_batch=config.update.micro_batch // shards,
    )
    env = dataclasses.replace(config.env, parallel=-(-config.env.parallel // shards))
    return dataclasses.replace(config, sft=sft, update=update, env=env)
