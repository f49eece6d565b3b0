"""Supervised fine-tuning: flow matching on demonstrations (method: section 1)."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Key, Shaped

from z1_jax import distributed, processes
from z1_jax.checkpoint import Checkpoints, Keep
from z1_jax.config.schema import LoraConfig, SftConfig
from z1_jax.data.augment import augment
from z1_jax.data.dataset import Dataset
from z1_jax.data.loader import Loader, batch_observation
from z1_jax.data.normalize import held_line
from z1_jax.interrupt import GracefulStop
from z1_jax.metrics import MetricsWriter, Progress
from z1_jax.models import accumulate
from z1_jax.optim import init_optimizer, make_optimizer, schedule
from z1_jax.policy import Policy
from z1_jax.resuming import counted_sft
from z1_jax.rl import flow
from z1_jax.sharding import constrain
from z1_jax.train_state import TrainState
from z1_jax.types import Observation
from z1_jax.validation import HELD_OUT, TRAINED, Split, Validation, records_to_train, sentence


def draw_times(
    key: Key[jax.Array, ""], shape: tuple[int, ...], flows: int
) -> tuple[Float[jax.Array, "B F"], Float[jax.Array, "B F H A"]]:
    """Flow times and noise, F = `flows` of them for each action chunk, for actions of a shape [B, H, A]."""
    time_key, noise_key = jax.random.split(key)
    return flow.training_times(time_key, (shape[0], flows)), normal(noise_key, (shape[0], flows, *shape[1:]))


def flow_matching_loss(
    model: Any,
    observation: Observation,
    actions: Float[jax.Array, "B H A"],
    drawn: tuple[Float[jax.Array, "B F"], Float[jax.Array, "B F H A"]],
    counted: Shaped[jax.Array, " A"],
    rows: int,
) -> jax.Array:
    """Mean squared error of the velocity over the flow times and noises of each observation, which is encoded once.

    Args:
        actions: [B, H, A], normalised and padded.
        drawn: by `draw_times`.
        counted: 0 or 1 [A], the dimensions that the loss averages.
        rows: of the batch that these B are a part of; the losses of its parts add up to its own.
    """
    t, noise = drawn
    x_t, target = flow.training_pair(actions[:, None], noise, t)
    velocity = model.velocity(model.encode_prefix(observation), x_t, t)
    weight = counted / (jnp.sum(counted) * rows * t.shape[1] * actions.shape[1])
    return jnp.sum(jnp.square(velocity - target) * weight)


def normal(key: Key[jax.Array, ""], shape: tuple[int, ...]) -> Float[jax.Array, "..."]:
    """`jax.random.normal`, the same numbers, its bits drawn in one row and shaped afterwards.

    XLA's CPU compiler writes out the loops over small dimensions around each round of the generator: for H and A that
    was a quarter of what the whole step takes to compile.
    """
    bits = jax.random.bits(key, (math.prod(shape),)).reshape(shape)
    low = np.nextafter(np.float32(-1), np.float32(0))  # never -1, whose inverse is infinite
    ones = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32)  # a mantissa: [1, 2)
    uniform = jnp.maximum(low, (ones - 1) * (1 - low) + low)
    return np.float32(2**0.5) * jax.lax.erf_inv(uniform)


def augmented(observation: Observation, key: Key[jax.Array, ""], moved_slots: tuple[int, ...]) -> Observation:
    """The observation (uint8 images) with every image randomly changed, as openpi trains: float32 in [-1, 1]."""
    images = observation.images.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return dataclasses.replace(observation, images=augment(key, images, moved_slots))


def _summed(gradient: Callable[[Any, Any], tuple[Any, Any]], params: Any, whole: Any, count: int) -> tuple[Any, Any]:
    """Value and gradient of a batch [B, …] as sums over `count` micro-batches, each with rows of every device.

    Args:
        gradient: `gradient(part, total)` is the value of a micro-batch, and its gradient added to `total`.
    """

    def add(total: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
        part = jax.tree.map(lambda x: constrain(x, "batch"), part)
        value, summed = gradient(part, total[1])
        return (total[0] + value, summed), None

    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), whole)
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, parts)[0]


def _copied(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else x.copy()


class SftTrainer:
    """The jitted SFT step and its state. The policy that is passed is used up."""

    def __init__(
        self, policy: Policy, config: SftConfig, seed: int, mesh: jax.sharding.Mesh, adapters: LoraConfig | None = None
    ):
        self._config, self._mesh = config, mesh
        self.graphdef, trainable, frozen = policy.split(config.scope, adapters, seed)
        self._policy = policy.without_params()
        self._optimizer = make_optimizer(config.optim, schedule(config.optim, config.steps))
        average = jax.tree.map(_copied, trainable) if config.ema else None
        self.state = TrainState(trainable, frozen, init_optimizer(self._optimizer, trainable, mesh), average)
        self._key = jax.random.fold_in(jax.random.key(seed), 0x5F7)
        dims = np.arange(policy.config.action_dim) < policy.processor.env_action_dim
        self._counted = jnp.asarray(np.ones_like(dims) if config.loss_dims == "all" else dims, jnp.float32)
        moved = self._moved()
        placed = jax.tree.map(lambda x: x.sharding, moved)  # where they came from: nothing wanders between steps
        self._step = jax.jit(self._step_impl, donate_argnums=0, out_shardings=(placed, None))

    def _moved(self) -> tuple[Any, Any, Any]:
        return self.state.trainable, self.state.opt_state, self.state.average

    def step(self, batch: dict[str, Shaped[np.ndarray, "B ..."]], step: int) -> dict[str, jax.Array]:
        """One optimiser step; returns device scalars, so that the host need not wait."""
        with distributed.explicit_transfers():
            (trainable, opt_state, average), stats = self._step(*self._inputs(batch, step))
        self.state = TrainState(trainable, self.state.frozen, opt_state, average)
        return stats

    def lower(self, batch: dict[str, Shaped[np.ndarray, "B ..."]]) -> jax.stages.Lowered:
        """The step as it would be compiled for such a batch."""
        return self._step.lower(*self._inputs(batch, 0))

    def _inputs(self, batch: dict[str, np.ndarray], step: int) -> tuple[Any, ...]:
        observation = distributed.put_batch(batch_observation(batch), self._mesh)
        actions = distributed.put_batch(batch["actions"], self._mesh)
        return (
            self._moved(),
            self.state.frozen,
            observation,
            actions,
            distributed.put_scalar(np.uint32(step), self._mesh),
        )

    def trace(self, observation: Observation, actions: Float[jax.Array, "B H A"]) -> jax.stages.Traced:
        """The step traced for a batch that may be abstract, as may be the parameters: nothing is computed."""
        step = jax.ShapeDtypeStruct((), jnp.uint32)
        return self._step.trace(self._moved(), self.state.frozen, observation, actions, step)

    def _step_impl(
        self, moved: tuple[Any, Any, Any], frozen: Any, observation: Observation, actions: jax.Array, step: jax.Array
    ) -> tuple[tuple[Any, Any, Any], dict[str, jax.Array]]:
        params, opt_state, average = moved
        key = jax.random.fold_in(self._key, step)
        if self._config.augment:
            observation = augmented(observation, jax.random.fold_in(key, 0xA6), self._policy.processor.moved_slots)

        rows, micro = len(actions), self._config.micro_batch or len(actions)

        def gradient(
            part: tuple[Observation, jax.Array, tuple[jax.Array, jax.Array]], total: Any = None
        ) -> tuple[jax.Array, Any]:
            def loss(model: Any) -> tuple[jax.Array, None]:
                return flow_matching_loss(model, *part, counted=self._counted, rows=rows), None

            (value, _), grads = accumulate.gradient(
                loss, self.graphdef, params, frozen, total, in_place=not self._policy.config.unroll
            )
            return value, grads

        whole = observation, actions, draw_times(key, actions.shape, self._config.flows)
        value, grads = gradient(whole) if micro == rows else _summed(gradient, params, whole, rows // micro)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if average is not None:
            average = optax.incremental_update(params, average, 1 - self._config.ema)
        stats = {"loss": value, "grad_norm": optax.global_norm(grads)}
        return (params, opt_state, average), stats

    def validation(self, loader: Loader, dataset: Dataset, parts: Split) -> Validation:
        """What gives the loss on held-out episodes, to be called with `state.acting`."""
        of_loss = self._config.flows, self._counted
        rows = self._config.micro_batch or self._config.batch_size  # what memory is known to hold
        return Validation(self.graphdef, loader, dataset, parts, *of_loss, self._mesh, rows)

    def policy(self) -> Policy:
        """The policy as trained so far: with the averaged parameters where `sft.ema` asks for them."""
        return self._policy.with_params(*self.state.acting)


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
    adapters: LoraConfig | None = None,
    sampling: str = "proportional",
    collected: bool = False,
    tasks: Sequence[Sequence[str]] = (),
) -> Policy:
    """Trains to `config.steps`, from the newest checkpoint in `directory` where there is one. `policy` is used up.

    Args:
        sampling: of the batches, as `demos.sampling`.
        collected: the run collected its demonstrations itself.
        tasks: the run's, each by its names. Where the dataset has them all and others too, it is trained on theirs
            alone; () takes all.

    Order of a step: stop if asked → next batch → step → log → save.

    Raises:
        KeyboardInterrupt: after an interruption; the last finished step is saved.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        UserError: records that the checkpoint stands on are gone; nothing was touched.
    """
    checkpoints = Checkpoints(directory, Keep(config.keep_last, config.keep_every))
    if line := held_line(policy.processor.stats):
        print(line, flush=True)
    part, parts = distributed.share_of_batch(mesh)
    own = {"process_index": part, "process_count": parts}
    records, chosen = records_to_train(dataset, tasks, config.validation, seed)
    for line in _told(dataset, tasks, chosen):
        print(line, flush=True)
    loader = Loader(dataset, policy.processor, config.batch_size, seed, sampling=sampling, records=records, **own)
    trainer = SftTrainer(policy, config, seed, mesh, adapters)
    del policy  # frees what is now kept in bfloat16
    start, document = _restore(checkpoints, trainer, loader)
    if start == config.steps:
        checkpoints.close()
        return trainer.policy()
    written = processes.on_leader(lambda: counted_sft(writer.run_dir, start, document, stage))
    writer.resume(stage, start + 1)  # records count finished steps: that of `start` is covered by its checkpoint

    def checked(stats: Mapping[str, jax.Array | float], done: int) -> dict[str, float]:
        values = {name: float(value) for name, value in stats.items()}
        if not np.isfinite(list(values.values())).all():
            raise FloatingPointError(
                f"SFT's {' and '.join(f'{name} {value}' for name, value in values.items())} at step {done} are not "
                f"finite; the checkpoints before it are in {directory}: lower sft.optim.lr or look at the data"
            )
        return values

    def save(step: int) -> None:
        saved = trainer.policy()
        checkpoints.save(
            step, trainer.state.parts(saved), {**saved.document(), "loader": loader.get_state(), "records": written}
        )

    validate = trainer.validation(loader, dataset, chosen) if chosen else None
    losses: dict[str, float] = {}
    columns = {"loss": ".4f", "grad_norm": ".3f", **({HELD_OUT: ".4f", TRAINED: ".4f"} if validate else {})}
    stats: dict[str, jax.Array] = {}
    with GracefulStop() as stop, Progress(stage, config.steps, "step", columns, start=start) as progress:
        for step in range(start, config.steps):
            if processes.anyone(stop.requested):
                checked(stats, step)  # a step that is not finite spoils all that follow, and must not be saved
                save(step)
                checkpoints.close()
                raise KeyboardInterrupt
            with jax.profiler.StepTraceAnnotation(stage, step_num=step):
                stats = trainer.step(next(loader), step)
            done = step + 1
            saves = done % config.checkpoint_every == 0 or done == config.steps
            if done % report_every == 0 or done == config.steps or (validate and saves):
                values = checked(stats, done)
                if validate and saves:
                    losses = checked(validate(*trainer.state.acting), done)
                    values |= losses
                writer.write(stage, done, values)
                written += 1
                progress.report(done, values)
            if saves:
                checked(stats, done)
                save(done)
    checkpoints.close()
    if losses:
        print(sentence(losses, collected), flush=True)
    return trainer.policy()


def _told(dataset: Dataset, tasks: Sequence[Sequence[str]], chosen: Split | None) -> Iterator[str]:
    """Lines that say which part of a dataset SFT takes."""
    own, known = dataset.episodes_of(tasks), {row.task for row in dataset.episodes}
    mine = sum(row.records for row in own)
    if len(own) < len(dataset.episodes):
        yield f"of the dataset's {len(dataset):,} records {mine:,} are of this run's tasks; SFT uses no others"
    elif missing := [names[0] for names in tasks if known.isdisjoint(names)] if len(known) > len(tasks) else []:
        yield (
            f"SFT takes all {len(dataset):,} records of the dataset's {len(known)} tasks: none of these is called "
            f"{missing[0]}{f', nor {len(missing) - 1} more of the run' * (len(missing) > 1)}"
        )
    if chosen:
        yield (
            f"held out for validation: {chosen.episodes:,} of {len(own):,} episodes, {len(chosen.held_out):,} of "
            f"{mine:,} records"
        )


def _restore(checkpoints: Checkpoints, trainer: SftTrainer, loader: Loader) -> tuple[int, dict[str, Any]]:
    """Loads the newest intact checkpoint into the trainer and the loader; returns its step and document, 0 for none."""
    newest = trainer.state.restored(checkpoints)
    if newest is None:
        return 0, {}
    step, trainer.state, document = newest
    loader.set_state(document["loader"])
    return step, document
