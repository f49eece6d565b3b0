"""Parameters prepared for acting against the model that they were prepared from, and who uses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy as tiny
from flax import nnx
from seeds import fresh_seed

from envs.base import episodes
from z1_jax import sharding
from z1_jax.config.schema import LoraConfig
from z1_jax.evaluation import make_actor
from z1_jax.models import acting, attention, pi05
from z1_jax.models.presets import get_preset
from z1_jax.rl import flow, rollout
from z1_jax.rl.actor import stack_ids
from z1_jax.rl.trainer import GATES
from z1_jax.rl.tree import branch_plan
from z1_jax.types import Observation, PrefixCache

STEPS = 3
# Lengths that are multiples of eight and some that are not, one key head and several, one chunk and several.
CASES = {
    "one chunk": ({}, 1),
    "whole rows": ({"horizon": 8, "prompt_length": 13}, 2),  # and three image tokens
    "key heads": ({"kv_heads": 2}, 3),
}


@functools.cache
def model_of(case: str, dtype: str = "float32") -> pi05.Pi05:
    """A model none of whose parameters is zero."""
    settings = dict(CASES[case][0])
    config = get_preset("tiny", dtype=dtype)
    if kv_heads := settings.pop("kv_heads", 0):
        stacks = {n: dataclasses.replace(getattr(config, n), kv_heads=kv_heads) for n in ("language", "expert")}
        settings |= stacks
    rng = np.random.default_rng(fresh_seed(__name__, case))
    graphdef, state = nnx.split(pi05.init_model(dataclasses.replace(config, **settings), 0))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, "f"), state))


def looks(config: pi05.Pi05Config, batch: int, rng: np.random.Generator) -> Observation:
    size = config.vision.image_size
    return Observation(
        images=rng.integers(0, 256, (batch, config.cameras, size, size, 3), np.uint8),
        image_mask=rng.random((batch, config.cameras)) < 0.8,
        tokens=rng.integers(0, config.vocab_size, (batch, config.prompt_length)),
        token_mask=np.arange(config.prompt_length) < rng.integers(1, config.prompt_length + 1, (batch, 1)),
    )


def drawn_noise(config: pi05.Pi05Config, batch: int, chunks: int, rng: np.random.Generator):
    noise = rng.standard_normal((batch, chunks, STEPS + 1, config.horizon, config.action_dim), np.float32)
    return noise, rng.random((batch, chunks, STEPS)) < 0.7, np.ones(noise.shape[-2:], bool)


def both(model: pi05.Pi05, chunks: int, rng: np.random.Generator):
    """Cache and chain of the plain form, then of the prepared one on the plain form's cache."""
    obs, drawn = looks(model.config, 2, rng), drawn_noise(model.config, 2, chunks, rng)

    @jax.jit
    def plain(model):
        cache = model.encode_prefix(obs)
        return cache, flow.sample(lambda x, t: model.velocity(cache, x, t), *drawn, noise_level=0.5)

    @jax.jit
    def prepared(model, cache):
        prefix, expert = acting.prepare_prefix(model), acting.prepare_expert(model, flow.times(STEPS))
        made = acting.encode_prefix(model.config, prefix, model.language.embedding[...], obs)
        step, held = acting.denoiser(model.config, expert, cache, chunks)
        return made, flow.sample_in_steps(step, held, expert["modulation"], *drawn, noise_level=0.5)

    graphdef, state = nnx.split(model)
    run = lambda function: lambda state, *rest: function(nnx.merge(graphdef, state), *rest)  # noqa: E731
    cache, chain = run(plain)(state)
    return (cache, chain), run(prepared)(state, cache)


def distance(wanted, got) -> float:
    """Size of the difference as a part of the size of what is wanted."""
    wanted, got = (np.asarray(x, np.float64) for x in (wanted, got))
    return float(np.linalg.norm(wanted - got) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", CASES)
def test_prepared_parameters_decide_the_same(case, rng):
    (cache, chain), (other, sampled) = both(model_of(case), CASES[case][1], rng)
    np.testing.assert_array_equal(cache.mask, other.mask)
    for name in ("k", "v"):
        shown = np.asarray(cache.mask)[None, :, :, None, None]  # what nothing may read may be anything
        assert distance(getattr(cache, name) * shown, getattr(other, name) * shown) < 1e-6, name
    assert distance(chain.x, sampled.x) < 1e-6
    assert distance(chain.logp, sampled.logp) < 1e-6


def test_in_bfloat16_they_differ_by_its_rounding(rng):
    (cache, chain), (other, sampled) = both(model_of("one chunk", "bfloat16"), 1, rng)
    assert distance(cache.v * cache.mask[None, :, :, None, None], other.v * cache.mask[None, :, :, None, None]) < 0.03
    assert 0 < distance(chain.x, sampled.x) < 0.03


@pytest.fixture(scope="module")
def actors():
    """The tiny policy's actors by form, and its parameters."""
    graphdef, *params = tiny.policy().split("expert")
    made = {}
    for form in ("plain", "prepared"):
        policy = dataclasses.replace(tiny.policy(), config=dataclasses.replace(tiny.CONFIG, acting=form))
        made[form] = make_actor(policy, graphdef, tiny.EVERY_STEP, tiny.one_device(), 16)
    return made, tuple(params)


def test_the_update_finds_the_probabilities_of_prepared_rollouts(actors):
    made, params = actors
    plan = branch_plan("tree", 4, 2)
    out = rollout.collect(
        tiny.pool(16), made["prepared"], params, tiny.processor(), plan, episodes(range(4)), (7,), executed=8
    )
    graphdef, *_ = tiny.policy().split("expert")
    counted, nodes = made["prepared"].counted, out.nodes

    @jax.jit
    def score(trainable, frozen, obs, x, stochastic):
        model = nnx.merge(graphdef, trainable, frozen)
        cache = model.encode_prefix(obs)
        return flow.chain_logp(lambda x, t: model.velocity(cache, x, t), x, stochastic, counted, noise_level=0.5)

    seen = jax.tree.map(lambda x: x[nodes.look], out.looks)
    logp = score(*params, seen, nodes.x, nodes.stochastic)
    assert 0 < np.abs(np.exp(logp - nodes.logp) - 1).max() < GATES["float32"]


def test_other_parameters_are_prepared_anew(actors):
    made, params = actors
    actor, plain = made["prepared"], made["plain"]
    obs = looks(tiny.CONFIG, 2, np.random.default_rng(0))
    ids = stack_ids(np.arange(2)[:, None], 0, 0)

    def decided(actor, params):
        return actor.sample(params, actor.encode(params, obs)[0], ids, (1,), False).x

    before = decided(actor, params)
    prefix, expert = actor.prepared(params)
    changed = jax.tree.map(lambda x: 1.1 * x, params[0]), params[1]
    after = decided(actor, changed)
    assert distance(decided(plain, changed), after) < 1e-6 < distance(before, after)
    assert actor.prepared(changed)[0] is prefix  # the VLM is as it was
    assert actor.prepared(changed)[1] is not expert
    assert distance(before, decided(actor, params)) == 0


def test_what_auto_chooses(actors):
    _, params = actors
    graphdef, *adapted = tiny.policy().split("lora", LoraConfig(vlm_rank=2, expert_rank=2))
    actor = make_actor(tiny.policy(), graphdef, tiny.EVERY_STEP, tiny.one_device(), 16)
    assert actor.prepared(params) == (None, None)  # a CPU
    policy = dataclasses.replace(tiny.policy(), config=dataclasses.replace(tiny.CONFIG, acting="prepared"))
    with pytest.raises(ValueError, match="folded"):
        make_actor(policy, graphdef, tiny.EVERY_STEP, tiny.one_device(), 16).prepared(tuple(adapted))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_decides_the_same(actors, shape):
    made, params = actors
    mesh = sharding.make_mesh(*shape)
    config = dataclasses.replace(tiny.CONFIG, acting="prepared")
    policy = dataclasses.replace(tiny.policy(), config=config, params=sharding.shard(tiny.policy().params, mesh))
    obs, ids = (
        looks(config, 8, np.random.default_rng(fresh_seed(__name__, shape))),
        stack_ids(np.arange(8)[:, None], 0, 0),
    )
    cache, _ = made["plain"].encode(params, obs)
    wanted = made["plain"].sample(params, cache, ids, (1,), True)
    with jax.set_mesh(mesh):
        graphdef, *split = policy.split("expert")
        actor = make_actor(policy, graphdef, tiny.EVERY_STEP, mesh, 8)
        spread, _ = actor.encode(tuple(split), obs)
        got = actor.sample(tuple(split), spread, ids, (1,), True)
    expert = actor.prepared(tuple(split))[1]
    if shape == (2, 2, 2):
        down = expert["layers"][0]["down"]
        assert down.addressable_shards[0].data.size == down.size // 4  # fsdp x tensor: held in parts
    assert distance(wanted.x, got.x) < 1e-5
    assert distance(wanted.logp, got.logp) < 1e-5


def test_lengths_are_rounded_up_and_never_seen(rng):
    """Rows of padding hold the largest numbers that there are: nothing may reach a chunk from them."""
    model, chunks = model_of("key heads"), 3
    config, language = model.config, model.config.language
    length = config.prefix_length
    shape = (language.depth, 2, length, language.kv_heads, language.head_dim)
    cache = PrefixCache(*rng.standard_normal((2, *shape), np.float32), rng.random((2, length)) < 0.7)
    x = rng.standard_normal((2, chunks, config.horizon, config.action_dim), np.float32)

    @jax.jit
    def velocities(state):
        model = nnx.merge(graphdef, state)
        expert = acting.prepare_expert(model, flow.times(STEPS))
        step, held = acting.denoiser(config, expert, cache, chunks)
        assert held[0][0].shape[1] % acting.ROWS == 0 < held[0][0].shape[1] - length - chunks * config.horizon
        poisoned = jax.tree.map(lambda kept: kept.at[:, length:].set(1e30), held)
        wanted = model.velocity(cache, x, jnp.full((2, chunks), flow.times(STEPS)[1]))
        return wanted, *(step(handed, x, expert["modulation"][1])[0] for handed in (held, poisoned))

    graphdef, state = nnx.split(model)
    wanted, got, beside_poison = velocities(state)
    np.testing.assert_array_equal(got, beside_poison)
    assert distance(wanted, got) < 1e-5


def test_products_cut_into_parts_decide_the_same(rng, monkeypatch):
    """A full-size policy's products are cut; here the constants are made so small that the tiny one's are too."""
    monkeypatch.setattr(acting, "SHORTEST", 8)
    monkeypatch.setattr(acting, "ROWS", 2)
    model = model_of("one chunk")
    assert acting._parts(1, model.config.expert.width, 1) > 1
    (cache, chain), (other, sampled) = both(model, 1, rng)
    assert distance(chain.x, sampled.x) < 1e-6
    assert distance(chain.logp, sampled.logp) < 1e-6


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_product_in_parts_is_the_product_of_the_sum(rng, monkeypatch, parts):
    x, kernel = rng.standard_normal((3, 2, 5, 4, 16)), rng.standard_normal((4, 16, 7))
    monkeypatch.setattr(acting, "_parts", lambda rows, inner, columns: parts)
    got = acting._product_in_parts(x.astype("f"), kernel.astype("f"), 2)
    wanted = np.einsum("sbtnd,ndf->btf", x, kernel)
    assert distance(wanted, got) < 1e-6


def test_attention_in_parts_adds_up_to_attention(rng):
    q, k, v = rng.standard_normal((2, 24, 4)), rng.standard_normal((2, 12, 4)), rng.standard_normal((2, 12, 4))
    mask = rng.random((2, 5, 12)) < 0.6
    mask[:, :, 0] = True
    got = attention.attend_in_parts(*(x.astype("f") for x in (q, k, v)), mask, 4, 5, 2)
    assert got.shape == (2, 2, 5, 4, 4)
    weights = np.exp(q[:, :20].reshape(2, 5, 4, 4) @ np.swapaxes(k, 1, 2)[:, None]) * mask[:, :, None]
    wanted = weights / weights.sum(-1, keepdims=True) @ v[:, None]
    assert distance(wanted, got.sum(0)) < 1e-6
