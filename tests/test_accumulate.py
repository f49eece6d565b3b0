"""A gradient added to a sum within the backward loop over layers: the sum of both, in the memory of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from z1_jax.models import accumulate, layers
from z1_jax.models.compute import Compute
from z1_jax.models.layers import Mlp, scan_layers
from z1_jax.models.params import initialise
from z1_jax.models.pi05 import add_adapters, init_model, split_model
from z1_jax.models.presets import get_preset
from z1_jax.types import Observation


class Net(nnx.Module):
    """A stack of layers between two others."""

    def __init__(self, compute: Compute, width: int, depth: int):
        self.compute = compute
        self.first, self.last = Mlp(width, width), Mlp(width, width)
        self.layers = Mlp(width, width, layers=depth)

    def __call__(self, x):
        return self.last(
            scan_layers(self.layers, lambda layer, x, _: (x + layer(x), x), self.first(x), self.compute)[0]
        )


def parted(compute: Compute, width: int, depth: int, trained):
    graphdef, state = nnx.split(Net(compute, width, depth))
    return nnx.split(nnx.merge(graphdef, initialise(state, 3)), trained, ...)


def everything(path, _):
    return True


def half_a_layer(path, _):
    return path[:2] == ("layers", "up") or path[0] == "first"


def random_like(tree, rng):
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f"), tree)


@pytest.mark.parametrize("trained", [everything, half_a_layer])
@pytest.mark.parametrize("remat", layers.REMAT_POLICIES)
@pytest.mark.parametrize("unroll", [False, True])
def test_a_stack_adds_what_its_layers_one_by_one_give(trained, remat, unroll, rng):
    """The gradient by a Python loop over layers that are no stack."""
    compute = Compute(dtype="float32", remat=remat, unroll=unroll)
    graphdef, params, frozen = parted(compute, 6, 3, trained)
    total, x = random_like(params, rng), rng.standard_normal((5, 6)).astype("f")

    def by_hand(params):
        net = nnx.merge(graphdef, params, frozen)
        definition, stack = nnx.split(net.layers)
        h = net.first(x)
        for i in range(3):
            h = h + nnx.merge(definition, jax.tree.map(lambda leaf, i=i: leaf[i], stack))(h)
        return jnp.sum(jnp.sin(net.last(h)))

    expected, slope = jax.value_and_grad(by_hand)(params)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(slope))
    (value, aux), got = jax.jit(
        lambda total: accumulate.gradient(
            lambda net: (jnp.sum(jnp.sin(net(x))), {"twice": 2 * x}), graphdef, params, frozen, total
        )
    )(total)
    assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-3)
    np.testing.assert_array_equal(aux["twice"], 2 * x)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for sum_, before, added in zip(*map(jax.tree.leaves, (got, total, slope)), strict=True):
        np.testing.assert_allclose(sum_, before + added, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(added).max())))


def temporary_bytes(summed: bool) -> tuple[int, int]:
    """What XLA allocates beside the result for the sum of three gradients; and the bytes of one."""
    graphdef, params, frozen = parted(Compute(dtype="float32", remat="full"), 128, 16, everything)

    def sum_of_three(params, parts):
        def add(total, x):
            def loss(net):
                return jnp.sum(jnp.sin(net(x))), None

            if summed:
                return accumulate.gradient(loss, graphdef, params, frozen, total)[1], None
            return jax.tree.map(jnp.add, total, accumulate.gradient(loss, graphdef, params, frozen)[1]), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

    compiled = jax.jit(sum_of_three).lower(params, jnp.ones((3, 4, 128))).compile()
    return compiled.memory_analysis().temp_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_xla_holds_no_second_gradient():
    plain, size = temporary_bytes(summed=False)
    assert plain > 0.9 * size  # the claim is no empty one
    assert temporary_bytes(summed=True)[0] < 0.25 * size


def observation() -> Observation:
    model, rng = get_preset("tiny"), np.random.default_rng(5)
    side = model.vision.image_size
    return Observation(
        images=rng.uniform(-1, 1, (2, model.cameras, side, side, 3)).astype("f"),
        image_mask=np.ones((2, model.cameras), bool),
        tokens=rng.integers(0, model.vocab_size, (2, model.prompt_length)).astype("i4"),
        token_mask=np.ones((2, model.prompt_length), bool),
    )


def test_adapters_beside_frozen_kernels_add_theirs(rng):
    """In all of a policy's stacks; the expert is trained whole. What is frozen has no sum."""
    model = init_model(get_preset("tiny"), 1)
    graphdef, state = nnx.split(add_adapters(model, {"vision": (2, 2.0), "language": (2, 2.0)}))
    graphdef, params, frozen = split_model(nnx.merge(graphdef, initialise(state, 1)), "lora")
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype("f"), params)  # adapters begin at 0
    total = random_like(params, rng)
    x = rng.standard_normal((2, 2, model.config.horizon, model.config.action_dim)).astype("f")

    def loss(model):
        velocity = model.velocity(model.encode_prefix(observation()), x, jnp.full((2, 2), 0.3))
        return jnp.sum(jnp.square(velocity)), None

    @jax.jit
    def both(params, total):
        gradient = functools.partial(accumulate.gradient, loss, graphdef, params, frozen)
        return gradient()[1], gradient(total)[1]

    slope, got = both(params, total)
    assert {path[0] for path, _ in nnx.to_flat_state(got)} == {"vision", "language", "expert"}
    for sum_, before, added in zip(*map(jax.tree.leaves, (got, total, slope)), strict=True):
        np.testing.assert_allclose(sum_, before + added, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(added).max())))
