"""Meshes, logical rules, and the model's numbers on 8 virtual devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pi05_reference as reference
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from z1_jax import sharding
from z1_jax.models import pi05
from z1_jax.models.presets import get_preset
from z1_jax.types import Observation

MESH_SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}
BATCH = 8


@pytest.fixture(scope="module")
def batch():
    """A random batch of observations, noisy chunks and times, and random parameters (none of them zero)."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    obs = Observation(
        images=rng.uniform(-1, 1, (BATCH, 3, 28, 28, 3)).astype("f"),
        image_mask=rng.random((BATCH, 3)) < 0.8,
        tokens=rng.integers(0, 512, (BATCH, 12)),
        token_mask=np.arange(12) < rng.integers(1, 13, (BATCH, 1)),
    )
    x, t = rng.normal(size=(BATCH, 2, 6, 8)).astype("f"), rng.uniform(size=(BATCH, 2)).astype("f")
    return obs, x, t


@pytest.fixture(scope="module")
def case():
    return reference.load_case()


def loss_and_grads(case, state, batch):
    @jax.jit
    def run(state, obs, x, t):
        def loss(state):
            model = nnx.merge(case.graphdef, state)
            return jnp.mean(jnp.square(model.velocity(model.encode_prefix(obs), x, t) - x))

        return jax.value_and_grad(loss)(state)

    return run(state, *batch)


@pytest.fixture(scope="module")
def on_one_device(case, batch):
    return jax.device_get(loss_and_grads(case, case.state, batch))


# At (2, 2, 2) XLA's CPU collectives were seen to wait for each other for ever on two busy cores: run it alone.
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_loss_and_every_gradient_match_one_device(case, batch, on_one_device, shape):
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        state = sharding.shard(case.state, mesh)
        loss, grads = loss_and_grads(case, state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    expected_loss, expected = on_one_device
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    errors = jax.tree.map(lambda a, b: float(np.linalg.norm(np.asarray(a) - b) / norm), grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-5
    if shape[1] > 1:
        kernel = state["language"]["layers"]["mlp"]["gate_up"].get_value()
        assert kernel.addressable_shards[0].data.size == kernel.size // (shape[1] * shape[2])


def test_parameters_can_be_created_sharded():
    mesh = sharding.make_mesh(2, 2, 2)
    config = get_preset("tiny")
    alone, spread = pi05.init_model(config, 3), pi05.init_model(config, 3, mesh)
    for a, b in zip(jax.tree.leaves(nnx.state(alone)), jax.tree.leaves(nnx.state(spread)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert spread.expert.layers.q.kernel[...].sharding.spec == PartitionSpec(None, "tensor", "fsdp", None)


def test_full_size_model_divides_over_a_pod():
    """Every large array of π0.5 splits over fsdp = 8: one device holds little more than an eighth."""
    state = nnx.state(pi05.abstract_model(get_preset("pi05")))
    mesh = sharding.make_mesh(1, 8, 1)
    share = sharding.bytes_per_device(state, mesh) / (4 * pi05.count_parameters(state))
    assert 0.125 <= share < 0.1255


def test_no_kernel_of_time_and_modulation_is_on_the_tensor_axis():
    state = nnx.state(pi05.abstract_model(get_preset("tiny")))
    specs = nnx.to_flat_state(sharding.param_sharding(state, sharding.make_mesh(2, 2, 2)))
    chosen = [v.get_value().spec for path, v in specs if "modulation" in path or "time_in" in path]
    assert chosen and all("tensor" not in spec for spec in chosen)
    assert any("fsdp" in spec for spec in chosen)


def test_partition_spec():
    assert sharding.partition_spec((8, 4, 6), ("batch", None, "heads"), MESH_SHAPE) == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
    # 6 divides by data = 2 but not by data x fsdp = 4; 3 divides by nothing.
    assert sharding.partition_spec((6, 3), ("batch", "mlp"), MESH_SHAPE) == PartitionSpec("data", None)
    assert sharding.partition_spec((8, 4), ("batch",), MESH_SHAPE) == PartitionSpec(("data", "fsdp"))
    with pytest.raises(ValueError, match="twice"):
        sharding.partition_spec((4, 4), ("embed", "embed"), MESH_SHAPE)
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        sharding.partition_spec((4,), ("width",), MESH_SHAPE)
    with pytest.raises(ValueError, match="has fewer"):
        sharding.partition_spec((4,), ("batch", None), MESH_SHAPE)


def test_make_mesh():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == MESH_SHAPE and set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh(devices=jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "needs a multiple of 3 devices; there are 8"),
        ({"fsdp": 16}, "needs a multiple of 16 devices; there are 8"),
        ({"data": 3, "fsdp": 2}, "needs 6 devices; there are 8"),
        ({"data": 0}, "data must be a positive size, or -1 for the rest; got 0"),
        ({"tensor": -1}, "tensor must be a positive size; got -1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_constrain_needs_no_mesh():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch") is x
    with jax.set_mesh(sharding.make_mesh()):
        odd = jax.jit(lambda x: sharding.constrain(x, "batch"))(x)  # 3 rows on 8 devices: replicated
        assert odd.sharding.is_fully_replicated
        even = jax.jit(lambda x: sharding.constrain(x, "batch"))(jnp.ones((16, 5)))
        assert even.addressable_shards[0].data.shape == (2, 5)
