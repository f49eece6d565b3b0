"""SFT's batch in micro-batches, whose gradients are added up."""

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from z1_jax import sharding
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, LoraConfig, SftConfig
from z1_jax.sft import SftTrainer
from z1_jax.stages import check_batches

ROWS = 8


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(7)
    return {
        "images": rng.integers(0, 256, (ROWS, 1, tiny.PIXELS, tiny.PIXELS, 3), dtype=np.uint8),
        "image_mask": np.ones((ROWS, 1), bool),
        "tokens": rng.integers(1, 500, (ROWS, 48)).astype(np.int32),
        "token_mask": np.arange(48) < rng.integers(30, 48, (ROWS, 1)),
        "actions": rng.normal(size=(ROWS, 8, 16)).astype("f"),
    }


def stepped(batch, micro, mesh=None, **changes):
    """Statistics and the optimiser's moments after one step: those of its gradient."""
    config = SftConfig(steps=10, batch_size=ROWS, micro_batch=micro, flows=2, **changes)
    policy = tiny.consumable()
    if mesh is not None:
        policy = policy.with_params(jax.device_put(policy.params, sharding.replicated(mesh)))
    trainer = SftTrainer(policy, config, 3, mesh or tiny.one_device(), LoraConfig(vlm_rank=2, expert_rank=0))
    with jax.set_mesh(mesh or tiny.one_device()):
        stats = trainer.step(batch, 0)
    return {name: float(value) for name, value in stats.items()}, jax.device_get(trainer.state.opt_state)


def assert_close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * max(np.abs(b).max(), 1e-3))


@pytest.fixture(scope="module")
def whole(batch):
    return stepped(batch, 0)


@pytest.mark.parametrize("micro", [2])
def test_the_sum_over_micro_batches_is_the_gradient_of_the_batch(micro, batch, whole):
    assert_close(stepped(batch, micro), whole)


def test_as_many_rows_as_the_batch_is_the_batch(batch, whole):
    got = stepped(batch, ROWS)
    assert got[0] == whole[0]
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_over_devices_each_has_rows_of_every_micro_batch(batch, whole):
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    assert_close(stepped(batch, 4, mesh), whole)


@pytest.mark.slow
def test_adapters_and_augmented_pictures(batch):
    changes = {"scope": "lora", "augment": True, "ema": 0.9}
    assert_close(stepped(batch, 2, **changes), stepped(batch, 0, **changes))


def test_sizes_that_do_not_divide_are_refused():
    config = Config(sft=SftConfig(batch_size=12, micro_batch=8))
    with pytest.raises(ConfigError, match="sft.batch_size: got 12, expected a multiple of sft.micro_batch = 8"):
        check(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(ConfigError, match="sft.micro_batch: got 6, expected a multiple of the 4 shards"):
        check_batches(Config(sft=SftConfig(batch_size=24, micro_batch=6)), mesh)
