"""Optimisers: AdamW behind global-norm clipping, and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import jax
import optax

from z1_jax.config import OptimConfig
from z1_jax.sharding import replicated


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from lr / (warmup + 1), then constant or cosine down to lr_end."""
    if config.schedule == "constant":
        if config.warmup_steps == 0:
            return optax.constant_schedule(config.lr)
        start = config.lr / (config.warmup_steps + 1)
        return optax.linear_schedule(start, config.lr, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / (config.warmup_steps + 1),
        peak_value=config.lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.lr_end,
    )


def make_optimizer(config: OptimConfig, lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """clip(global norm) → AdamW, as openpi: weight decay on every trained parameter, first moment in float32."""
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), make_adamw(config, lr))


def make_adamw(config: OptimConfig, lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW alone."""
    return optax.adamw(
        lr,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """The optimiser's state for `params`: moments lie where their parameters do, the rest on every device.

    Created there: no device holds a moment whole. And a step whose inputs lie elsewhere than its outputs would be
    compiled a second time. Abstract for abstract parameters.
    """
    whole = replicated(mesh)
    shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda _: whole,
    )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        abstract = jax.eval_shape(optimizer.init, params)
        return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings)
    return jax.jit(optimizer.init, out_shardings=shardings)(params)
