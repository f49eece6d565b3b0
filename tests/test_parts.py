"""The optimiser by part against plain optax over everything, and a part that joins later."""

import jax
import numpy as np
import optax
import pytest
import tiny_policy as tiny

from z1_jax.config.schema import OptimConfig
from z1_jax.optim import make_optimizer
from z1_jax.policy import named
from z1_jax.rl.parts import PartOptimizer, by_part, norms_by_part

CONFIG = OptimConfig(lr=1e-2, b2=0.99, eps=1e-6, weight_decay=0.1, clip_norm=0.5)


def small(rng):
    return {
        part: {"kernel": rng.normal(size=(3, 2)).astype("f"), "bias": rng.normal(size=2).astype("f")}
        for part in ("vision", "language", "expert")
    }


def test_equal_factors_are_adamw_over_everything(rng):
    params, plain, parts = small(rng), make_optimizer(CONFIG, CONFIG.lr), PartOptimizer(CONFIG, 1.0)
    state, split = plain.init(params), parts.init(params)
    for _ in range(3):
        grads = small(rng)
        expected, state = plain.update(grads, state, params)
        got, split = parts.update(grads, split, params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        params = optax.apply_updates(params, expected)


def test_the_factor_scales_the_vlm_alone(rng):
    params, grads = small(rng), small(rng)
    runs = []
    for factor in (1.0, 0.25):
        optimizer = PartOptimizer(CONFIG, factor)
        runs.append(optimizer.update(grads, optimizer.init(params), params)[0])
    for part, factor in (("vision", 0.25), ("language", 0.25), ("expert", 1.0)):
        for a, b in zip(jax.tree.leaves(runs[1][part]), jax.tree.leaves(runs[0][part]), strict=True):
            np.testing.assert_allclose(a, factor * b, rtol=1e-6)


def test_a_part_that_joins_later_steps_as_if_it_had_just_begun(rng):
    """Its first step after ten of the expert's equals the first step of an AdamW of its own."""
    params, mesh = jax.device_put(small(rng)), tiny.one_device()
    config = OptimConfig(lr=1e-2, b2=0.99, eps=1e-6, weight_decay=0.1, clip_norm=1e9)
    optimizer = PartOptimizer(config, 1.0)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    alone = {"expert": params["expert"]}
    state = optimizer.init_on(mesh, alone)
    for _ in range(10):
        _, state = optimizer.update({"expert": small(rng)["expert"]}, state, alone)
    joined = optimizer.init_on(mesh, params, state)
    assert joined["expert"] is state["expert"]
    grads = small(rng)
    updates, _ = optimizer.update(grads, joined, params)
    fresh = optax.adamw(1e-2, b2=0.99, eps=1e-6, weight_decay=0.1)
    for part in ("vision", "language"):
        expected, _ = fresh.update(grads[part], fresh.init(params[part]), params[part])
        for a, b in zip(jax.tree.leaves(updates[part]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_parts_of_the_real_policy():
    for scope, parts in (("expert", {"expert"}), ("joint", {"vision", "language", "expert"})):
        _, trainable, _ = tiny.policy().split(scope)
        assert set(by_part(trainable)) == parts
        norms = norms_by_part(trainable)
        for part, leaves in by_part(trainable).items():
            assert set(leaves) <= set(named(trainable))
            by_hand = np.sqrt(sum(float(np.sum(np.asarray(x, np.float64) ** 2)) for x in leaves.values()))
            assert float(norms[part]) == pytest.approx(by_hand, rel=1e-5)
