"""Adapters: no change at first, the change that the formula says, folding, and checkpoints that resume or act."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy as tiny
from flax import nnx
from seeds import fresh_seed

from z1_jax import sharding
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import LoraConfig, OptimConfig
from z1_jax.convert import openpi_names
from z1_jax.models import lora, pi05
from z1_jax.models.choices import trains_vlm
from z1_jax.models.layers import Einsum, GatedMlp
from z1_jax.models.params import Init, initialise
from z1_jax.optim import init_optimizer, make_optimizer
from z1_jax.policy import load_policy, named
from z1_jax.train_state import TrainState
from z1_jax.types import Observation

SMALL = LoraConfig(vlm_rank=2, vlm_alpha=3.0, expert_rank=4, expert_alpha=2.0)


@functools.cache
def inputs() -> tuple[Observation, np.ndarray, np.ndarray]:
    seed = fresh_seed(__name__, "inputs")
    rng = np.random.default_rng(seed)
    obs = Observation(
        images=rng.uniform(-1, 1, (2, 1, 28, 28, 3)).astype("f"),
        image_mask=np.ones((2, 1), bool),
        tokens=rng.integers(1, 500, (2, 48)).astype(np.int32),
        token_mask=np.arange(48) < rng.integers(30, 48, (2, 1)),
    )
    return obs, rng.normal(size=(2, 2, 8, 16)).astype("f"), rng.random((2, 2)).astype("f")


def velocity(graphdef, *states):
    @jax.jit
    def run(states, obs, x, t):
        model = nnx.merge(graphdef, *states)
        return model.velocity(model.encode_prefix(obs), x, t)

    return np.asarray(run(states, *inputs()))


@functools.cache
def split(config: LoraConfig = SMALL):
    return tiny.policy().split("lora", config, 7)


def moved(state: nnx.State) -> nnx.State:
    """Adapters in which nothing is zero, large enough to matter."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, "f"), x.dtype), state)


@functools.cache
def plain() -> np.ndarray:
    return velocity(tiny.policy().graphdef, tiny.policy().params)


def test_fresh_adapters_change_no_bit():
    graphdef, adapters, frozen = split()
    np.testing.assert_array_equal(velocity(graphdef, adapters, frozen), plain())
    values = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(adapters)}
    assert all(np.any(value) == (path[-1] == "a") for path, value in values.items())


def test_folded_adapters_compute_the_same():
    graphdef, adapters, frozen = split()
    adapters = moved(adapters)
    unfolded = velocity(graphdef, adapters, frozen)
    assert np.abs(unfolded - plain()).max() > 0.1 * np.abs(plain()).max()
    folded = tiny.policy().with_params(adapters, frozen)
    assert jax.tree.structure(folded.params) == jax.tree.structure(tiny.policy().params)
    with pytest.raises(ValueError, match="adapters that are not folded in"):
        openpi_names.to_openpi(nnx.merge_state(adapters, frozen))
    difference = np.abs(velocity(folded.graphdef, folded.params) - unfolded).max()
    assert difference <= 1e-6 * max(1.0, np.abs(unfolded).max())


def filled(module, rng):
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), state))


def test_the_formula_by_hand(rng):
    x = rng.normal(size=(3, 5, 6)).astype("f")
    linear = Einsum("...d,dnh->...nh", (6, 2, 4), (None, None, None), Init(1.0))
    linear.adapt(3, 1.5)
    linear = filled(linear, rng)
    a, b = linear.kernel_lora.a[...], linear.kernel_lora.b[...]
    weight = np.asarray(linear.kernel[...]).reshape(6, 8) + 0.5 * np.asarray(a) @ np.asarray(b).reshape(3, 8)
    np.testing.assert_allclose(linear(x), (x @ weight).reshape(3, 5, 2, 4), rtol=1e-4, atol=1e-4)

    several = Einsum("...d,ckdh->c...kh", (2, 2, 6, 4), (None,) * 4, Init(1.0))  # keys and values
    several.adapt(3, 1.5)
    several = filled(several, rng)
    a, b = np.asarray(several.kernel_lora.a[...]), np.asarray(several.kernel_lora.b[...])
    for c in range(2):
        for k in range(2):
            weight = np.asarray(several.kernel[...])[c, k] + 0.5 * a[c] @ b[c, :, k]
            np.testing.assert_allclose(several(x)[c, ..., k, :], x @ weight, rtol=1e-4, atol=1e-4)

    mlp = GatedMlp(6, 10)
    mlp.adapt(2, 4.0)
    mlp = filled(mlp, rng)
    change, down = mlp.gate_up_lora, mlp.down_lora
    gate, up = (x @ (np.asarray(mlp.gate_up[c]) + 2 * np.asarray(change.a[c] @ change.b[c])) for c in range(2))
    hidden = np.asarray(jax.nn.gelu(gate, approximate=True)) * up
    expected = hidden @ (np.asarray(mlp.down[...]) + 2 * np.asarray(down.a[...] @ down.b[...]))
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (LoraConfig(vlm_rank=2, expert_rank=0), {"vision": "adapters", "language": "adapters", "expert": "all"}),
        (LoraConfig(vlm_rank=0, expert_rank=2), {"expert": "adapters"}),
        (LoraConfig(vlm_rank=2, expert_rank=2), dict.fromkeys(("vision", "language", "expert"), "adapters")),
    ],
)
def test_what_is_frozen(config, trained):
    _, trainable, frozen = tiny.policy().split("lora", config)
    paths = [path for path, _ in nnx.to_flat_state(trainable)]
    assert {path[0] for path in paths} == trained.keys()
    for path in paths:
        assert lora.is_adapter(path) or trained[path[0]] == "all"
    assert not any(lora.is_adapter(path) for path, _ in nnx.to_flat_state(frozen))
    base = {name for name in named(tiny.policy().params)}
    assert base == {name for name in {**named(trainable), **named(frozen)} if "_lora." not in name}
    assert pi05.vlm_is_frozen(trainable) == (config.vlm_rank == 0)
    assert trains_vlm("lora", config.vlm_rank) == (config.vlm_rank > 0)


def test_every_attention_and_mlp_kernel_that_matters_has_an_adapter():
    _, trainable, _ = split()
    targets = {name.rsplit("_lora.", 1)[0] for name in named(trainable)}
    expected = {f"vision.layers.{name}.kernel" for name in ("q", "k", "v", "out", "mlp.up", "mlp.down")}
    for part in ("language", "expert"):
        expected |= {f"{part}.layers.{name}.kernel" for name in ("q", "kv", "out")}
        expected |= {f"{part}.layers.mlp.{name}" for name in ("gate_up", "down")}
    assert targets == expected | {"language.last.kv.kernel"}


def test_gradients_reach_every_adapter():
    graphdef, adapters, frozen = split()
    obs, x, t = inputs()

    @jax.jit
    def grads(adapters):
        def loss(adapters):
            model = nnx.merge(graphdef, adapters, frozen)
            return jnp.mean(jnp.square(model.velocity(model.encode_prefix(obs), x, t)))

        return jax.grad(loss)(adapters)

    for name, leaf in named(grads(moved(adapters))).items():
        assert np.any(np.asarray(leaf)), name
    for name, leaf in named(grads(adapters)).items():  # while b = 0, a has none
        assert np.any(np.asarray(leaf)) == name.endswith(".b"), name


def state_of(graphdef_states, average=None, mesh=None) -> TrainState:
    _, trainable, frozen = graphdef_states
    optimizer = make_optimizer(OptimConfig(), 1e-3)
    return TrainState(trainable, frozen, init_optimizer(optimizer, trainable, mesh or tiny.one_device()), average)


@pytest.mark.parametrize("averaged", [False, True])
def test_unfolded_adapters_resume_and_the_checkpoint_acts(tmp_path, averaged):
    graphdef, adapters, frozen = split()
    trained = moved(adapters)
    average = jax.tree.map(lambda x: x / 2, trained) if averaged else None
    state = state_of((graphdef, trained, frozen), average)
    acting = tiny.policy().with_params(*state.acting)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state.parts(acting), acting.document())

    fresh = state_of((graphdef, adapters, frozen), adapters if averaged else None)
    step, resumed, _ = fresh.restored(checkpoints)
    assert step == 5
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)

    loaded = load_policy(checkpoints, 5, tiny.one_device())  # as any checkpoint: complete, nothing to fold
    assert not lora.has_adapters(loaded.params)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(tiny.policy().params)
    unfolded = velocity(graphdef, *state.acting)
    assert np.abs(velocity(loaded.graphdef, loaded.params) - unfolded).max() <= 1e-6 * max(1, np.abs(unfolded).max())


def test_adapters_lie_on_the_mesh_and_fold_there():
    mesh = sharding.make_mesh(2, 2, 2)
    policy = tiny.policy()
    spread = dataclasses.replace(policy, params=sharding.shard(policy.params, mesh))
    _, adapters, frozen = spread.split("lora", SMALL, 7)
    for (name, a), b in zip(named(adapters).items(), jax.tree.leaves(split()[1]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)  # drawn alike on any mesh
        assert len(a.sharding.device_set) == 8
    assert adapters["expert"]["layers"]["mlp"]["down_lora"]["a"].get_value().addressable_shards[0].data.shape[1] == 16
    rng = np.random.default_rng(3)
    trained = jax.tree.map(lambda x: jax.device_put(rng.standard_normal(x.shape, "f"), x.sharding), adapters)
    on_mesh = spread.with_params(trained, frozen).params
    alone = policy.with_params(jax.device_get(trained), policy.params).params
    for (name, a), b, before in zip(
        named(on_mesh).items(), jax.tree.leaves(alone), jax.tree.leaves(spread.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
        assert a.sharding == before.sharding


def test_adapters_need_a_rank():
    model = pi05.abstract_model(tiny.CONFIG)
    with pytest.raises(ValueError, match="scope lora needs adapters"):
        pi05.split_model(model, "lora")
    with pytest.raises(ValueError, match="rank must be positive; got 0"):
        pi05.add_adapters(model, {"expert": (0, 1.0)})


def test_initial_values_follow_the_seed():
    def drawn(seed):
        _, state = nnx.split(pi05.add_adapters(pi05.abstract_model(tiny.CONFIG), {"expert": (4, 4.0)}))
        return named(initialise(state, seed))["expert.layers.mlp.down_lora.a"]

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert np.any(np.asarray(drawn(1)) != np.asarray(drawn(2)))
    assert np.std(np.asarray(drawn(1))) == pytest.approx(32**-0.5, rel=0.5)
