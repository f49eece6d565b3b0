"""Optimisers: AdamW or Muon behind global-norm clipping, and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from z1_jax.config.schema import OptimConfig, SftOptimConfig
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
    """clip(global norm) → AdamW, as openpi, or Muon: weight decay on every trained parameter, float32 moments."""
    if isinstance(config, SftOptimConfig) and config.name == "muon":
        rule = make_muon(config, lr)
    else:
        rule = make_adamw(config, lr)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def make_adamw(config: OptimConfig, lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW alone."""
    return optax.adamw(
        lr,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def make_muon(config: SftOptimConfig, lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) for kernels, AdamW with Nesterov momentum for the rest.

    A kernel's step is its momentum (0.95, Nesterov) with all singular values near one, scaled to a root mean square of
    `muon_rms` × lr whatever its shape (arXiv 2502.16982). Each layer's, and each of several kernels in one array, is a
    matrix of its own.
    """
    return muon(
        lr,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=config.muon_rms,
    )


def _matrices(params: Any) -> Any:
    """For each parameter, which of its axes make a matrix: those of the layer's input and of its output; or None."""

    def axes(variable: nnx.Variable) -> nnx.Variable:
        matrix = variable.get_metadata("matrix")
        return variable.replace(matrix and MuonDimensionNumbers(*matrix))

    return jax.tree.map(axes, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """The optimiser's state for `params`: moments lie where their parameters do, the rest on every device.

    It is created in place: no device ever holds a whole moment, and the first step is not compiled twice. The state of
    abstract parameters is abstract.
    """
    whole = replicated(mesh)
    shardings = optax.tree.map_params(
        optimizer,
        lambda moment, sharding: moment if _absent(moment) else sharding,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda _: whole,
        is_leaf=_absent,
    )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        abstract = jax.eval_shape(optimizer.init, params)
        return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings)
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def _absent(moment: Any) -> bool:
    """Whether an optimiser that treats parameters differently keeps no such moment for this one."""
    return isinstance(moment, optax.MaskedNode)
