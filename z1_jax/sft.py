"""Supervised fine-tuning: flow matching on demonstrations, everything trained."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from z1_jax import distributed
from z1_jax.checkpoint import Checkpoints
from z1_jax.config import SftConfig
from z1_jax.data.dataset import Dataset
from z1_jax.data.loader import Loader, batch_observation
from z1_jax.interrupt import GracefulStop
from z1_jax.metrics import MetricsWriter, Progress
from z1_jax.optim import init_optimizer, make_optimizer, schedule
from z1_jax.policy import Policy, named, unnamed
from z1_jax.rl import flow
from z1_jax.types import Observation


def flow_matching_loss(
    model: Any,
    observation: Observation,
    actions: jax.Array,
    key: jax.Array,
    flows: int,
    counted: jax.Array,
) -> jax.Array:
    """Mean squared error of the velocity over `flows` times and noises per observation, each encoded once.

    Args:
        actions: [B, H, A], normalised and padded.
        counted: bool [A], the dimensions that the loss averages.
    """
    batch = actions.shape[0]
    time_key, noise_key = jax.random.split(key)
    t = flow.training_times(time_key, (batch, flows))
    noise = jax.random.normal(noise_key, (batch, flows, *actions.shape[1:]))
    x_t, target = flow.training_pair(actions[:, None], noise, t)
    velocity = model.velocity(model.encode_prefix(observation), x_t, t)
    weight = counted / (jnp.sum(counted) * batch * flows * actions.shape[1])
    return jnp.sum(jnp.square(velocity - target) * weight)


class SftTrainer:
    """The jitted SFT step and its state."""

    def __init__(self, policy: Policy, config: SftConfig, seed: int, mesh: jax.sharding.Mesh):
        self._policy, self._config, self._mesh = policy, config, mesh
        self.graphdef, self.params, self._frozen = policy.split("joint")
        self._optimizer = make_optimizer(config.optim, schedule(config.optim, config.steps))
        self.opt_state = init_optimizer(self._optimizer, self.params, mesh)
        self._key = jax.random.fold_in(jax.random.key(seed), 0x5F7)
        dims = np.arange(policy.config.action_dim) < policy.processor.env_action_dim
        self._counted = jnp.asarray(np.ones_like(dims) if config.loss_dims == "all" else dims, jnp.float32)
        self._step = jax.jit(self._step_impl, donate_argnums=(0, 1))

    def step(self, batch: dict[str, np.ndarray], step: int) -> dict[str, jax.Array]:
        """One optimiser step; returns device scalars, so that the host need not wait."""
        observation = distributed.put_batch(batch_observation(batch), self._mesh)
        actions = distributed.put_batch(batch["actions"], self._mesh)
        self.params, self.opt_state, stats = self._step(
            self.params, self.opt_state, self._frozen, observation, actions, jnp.uint32(step)
        )
        return stats

    def trace(self, observation: Observation, actions: jax.Array) -> jax.stages.Traced:
        """The step traced for a batch that may be abstract, as may be the parameters: nothing is computed."""
        step = jax.ShapeDtypeStruct((), jnp.uint32)
        return self._step.trace(self.params, self.opt_state, self._frozen, observation, actions, step)

    def _step_impl(
        self, params: Any, opt_state: Any, frozen: Any, observation: Observation, actions: jax.Array, step: jax.Array
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(self.graphdef, params, frozen)
            key = jax.random.fold_in(self._key, step)
            return flow_matching_loss(model, observation, actions, key, self._config.flows, self._counted)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        stats = {"loss": value, "grad_norm": optax.global_norm(grads)}
        return optax.apply_updates(params, updates), opt_state, stats

    def policy(self) -> Policy:
        """The policy as trained so far."""
        return dataclasses.replace(self._policy, params=nnx.merge_state(self.params, self._frozen))


def train_sft(
    policy: Policy,
    dataset: Dataset,
    config: SftConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
    directory: pathlib.Path,
    writer: MetricsWriter,
    *,
    report_every: int,
    stage: str = "sft",
) -> Policy:
    """Trains to `config.steps`, from the newest checkpoint in `directory` where there is one.

    Order of a step: stop if asked → next batch → step → log → save.

    Raises:
        KeyboardInterrupt: after an interruption; the last finished step is saved.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
    """
    checkpoints = Checkpoints(directory)
    loader = Loader(dataset, policy.processor, config.batch_size, seed)
    trainer = SftTrainer(policy, config, seed, mesh)
    start = _restore(checkpoints, trainer, loader)
    if start == config.steps:
        checkpoints.close()
        return trainer.policy()
    writer.resume(stage, start + 1)  # records count finished steps: that of `start` is covered by its checkpoint

    def save(step: int) -> None:
        saved = trainer.policy()
        parts = {**saved.parts(), "optimizer": named(trainer.opt_state)}
        checkpoints.save(step, parts, {**saved.document(), "loader": loader.get_state()})

    columns = {"loss": ".4f", "grad_norm": ".3f"}
    with GracefulStop() as stop, Progress(stage, config.steps, "step", columns, start=start) as progress:
        for step in range(start, config.steps):
            if stop.requested:
                save(step)
                checkpoints.close()
                raise KeyboardInterrupt
            stats = trainer.step(next(loader), step)
            done = step + 1
            if done % report_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in stats.items()}
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"SFT loss is {values['loss']} at step {done}; the checkpoints before it are in {directory}: "
                        "lower sft.optim.lr or look at the data"
                    )
                writer.write(stage, done, values)
                progress.report(done, values)
            if done % config.checkpoint_every == 0 or done == config.steps:
                save(done)
    checkpoints.close()
    return trainer.policy()


def _restore(checkpoints: Checkpoints, trainer: SftTrainer, loader: Loader) -> int:
    """Loads the newest intact checkpoint into the trainer and the loader; returns its step, 0 for none."""
    newest = checkpoints.load_newest(
        {"params": named(abstract_like(trainer.params)), "optimizer": named(abstract_like(trainer.opt_state))}
    )
    if newest is None:
        return 0
    step, loaded, document = newest
    trainer.params = unnamed(trainer.params, loaded["params"])
    trainer.opt_state = unnamed(trainer.opt_state, loaded["optimizer"])
    loader.set_state(document["loader"])
    return step


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
