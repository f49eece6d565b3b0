"""The optimiser step against a gradient derived by hand; any split of it; the ratio gate through the real path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_env
import tiny_policy as tiny
from flax import nnx
from seeds import fresh_seed

from envs.pool import EnvPool
from z1_jax import sharding
from z1_jax.config.schema import Config, EnvConfig, GroupConfig, OptimConfig, RewardConfig, UpdateConfig
from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, train_small_tokenizer
from z1_jax.errors import UserError
from z1_jax.policy import fresh_policy, make_processor
from z1_jax.rl import loss
from z1_jax.rl.loop import GrpoTrainer
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.rollout import NodeTable
from z1_jax.rl.tree import signed_advantage_sums
from z1_jax.rl.update import Updater, mini_batches
from z1_jax.types import PrefixCache

# --- a policy whose gradient fits on one line -----------------------------------------------------------------------

K, H, A = 4, 2, 3
NODES, BATCH, LOOKS = 13, 16, 5
GROUPS, SIZE = 3, 4
LOW, HIGH = 0.2, 0.3
FLOW = dataclasses.replace(tiny.EVERY_STEP, steps=K, logprob_reduce="mean")  # near 1: six digits of a ratio stay
COUNTED = np.array([[True, True, False], [True, False, True]])


class Linear(nnx.Module):
    """v = x·w + t·b + the observation's cached value."""

    def __init__(self, rng: np.random.Generator):
        self.w = nnx.Param(jnp.asarray(0.3 * rng.normal(size=(A, A)), jnp.float32))
        self.b = nnx.Param(jnp.asarray(0.3 * rng.normal(size=A), jnp.float32))
        self.unused = nnx.Param(jnp.ones(2))  # stands for the frozen part

    def velocity(self, cache: PrefixCache, x: jax.Array, t: jax.Array) -> jax.Array:
        return x @ self.w[...] + t[..., None, None] * self.b[...] + cache.v[0, :, None, :, 0]


@functools.cache
def case():
    """A model, its caches, nodes of groups with advantages of both signs, and ratios on both sides of the clip."""
    seed = fresh_seed(__name__, "case")
    rng = np.random.default_rng(seed)
    size = 2 ** rng.integers(0, 3, NODES)
    values = rng.normal(size=(1, LOOKS, 1, 1, A)).astype("f")
    x = np.empty((NODES, K + 1, H, A), "f")
    x[:, 0] = rng.normal(size=x[:, 0].shape)
    for k in range(K):
        x[:, k + 1] = 0.9 * x[:, k] + 0.3 * rng.normal(size=x[:, k].shape)
    table = NodeTable(
        group=rng.integers(0, GROUPS, NODES),
        chunk=np.zeros(NODES, int),
        leader=rng.integers(0, SIZE // size) * size,
        size=size,
        look=rng.integers(0, LOOKS, NODES),
        trainable=np.ones(NODES, bool),
        steps=np.full(NODES, H),
        x=x,
        stochastic=(rng.random((NODES, K)) < 0.7) | (np.arange(K) == 1),
        logp=np.zeros(NODES, "f"),
    )
    model, store = Linear(rng), PrefixStore([(PrefixCache(values, values, np.ones((LOOKS, 1), bool)), LOOKS)])
    advantages = rng.normal(size=(GROUPS, SIZE))
    logp, _ = by_hand(model, table, values)
    away = rng.choice([-0.6, -0.1, 0.0, 0.1, 0.6], NODES) + rng.uniform(-0.04, 0.04, NODES)
    return model, dataclasses.replace(table, logp=(logp - away).astype("f")), store, values, advantages


def by_hand(model: Linear, table: NodeTable, values: np.ndarray):
    """log π of each node, a mean over its terms, and its derivatives in w and b, float64.

    With μ = x − Δ·[v + c·(x + (1 − t)·v)], c = σ²/(2t): ∂ log π/∂v = −Δ·(1 + c·(1 − t))·(x' − μ)/(σ²Δ); and
    ∂v/∂w = x, ∂v/∂b = t.
    """
    w, b = np.asarray(model.w[...], float), np.asarray(model.b[...], float)
    logp, slopes = np.zeros(len(table.size)), []
    for n in range(len(table.size)):
        dw, db = np.zeros((A, A)), np.zeros(A)
        for k in np.flatnonzero(table.stochastic[n]):
            dt, t = 1 / K, 1 - k / K
            variance = 0.25 * t / max(1 - t, dt) * dt
            c = variance / dt / (2 * t)
            x, after = table.x[n, k].astype(float), table.x[n, k + 1].astype(float)
            v = x @ w + t * b + values[0, table.look[n], 0, 0]
            residual = np.where(COUNTED, after - (x - dt * (v + c * (x + (1 - t) * v))), 0.0)
            logp[n] += -0.5 * np.sum(residual**2) / variance - 0.5 * COUNTED.sum() * np.log(2 * np.pi * variance)
            to_v = -dt * (1 + c * (1 - t)) * residual / variance
            dw, db = dw + x.T @ to_v, db + t * to_v.sum(axis=0)
        terms = table.stochastic[n].sum() * COUNTED.sum()
        logp[n] /= terms
        slopes.append((dw / terms, db / terms))
    return logp, slopes


def expected_step():
    """The gradient of the method's loss, one term for each member of each node."""
    model, table, _, values, advantages = case()
    logp, slopes = by_hand(model, table, values)
    dw, db, count = np.zeros((A, A)), np.zeros(A), 0
    for n in range(NODES):
        ratio = np.exp(logp[n] - float(table.logp[n]))
        for member in range(table.leader[n], table.leader[n] + table.size[n]):
            a = advantages[table.group[n], member]
            count += 1
            if ratio * a <= np.clip(ratio, 1 - LOW, 1 + HIGH) * a:  # not clipped
                dw, db = dw - ratio * a * slopes[n][0], db - ratio * a * slopes[n][1]
    return np.concatenate([dw.ravel(), db]) / count


def step(mesh, micro: int, batch_size: int = BATCH, order: int = 1) -> np.ndarray:
    """The parameters' movement under SGD with rate 1, which is the gradient."""
    model, table, store, _, advantages = case()
    graphdef, trainable, frozen = nnx.split(model, lambda path, _: path[0] != "unused", ...)
    positive, negative = signed_advantage_sums(advantages, table.group, table.leader, table.size)
    config = UpdateConfig(batch_size=batch_size, micro_batch=micro)
    with jax.set_mesh(mesh):
        optimizer = optax.sgd(1.0)
        updater = Updater(graphdef, optimizer, loss.grpo(LOW, HIGH, 0.0), FLOW, config, COUNTED, mesh)
        before = [np.asarray(trainable[name].get_value()) for name in ("w", "b")]
        trainable, frozen = jax.device_put((trainable, frozen), sharding.replicated(mesh))
        trainable = jax.tree.map(lambda x: x.copy(), trainable)
        rng = np.random.default_rng(order)
        inputs = {"positive": positive, "negative": negative}
        ((batch, normaliser),) = mini_batches(table, inputs, table.trainable, store, batch_size, rng)
        trainable, _, _ = updater.step(trainable, optimizer.init(trainable), frozen, batch, normaliser)
        after = [np.asarray(trainable[name].get_value()) for name in ("w", "b")]
    return np.concatenate([(a.astype(float) - b).ravel() for a, b in zip(before, after, strict=True)])


def test_any_split_over_devices_and_micro_batches_is_the_gradient_by_hand():
    """Σ_i |B_i| is global: one device or eight, whole or in parts of any size, padded more or less, in any order."""
    gradient = expected_step()
    plain = step(tiny.one_device(), BATCH)
    assert np.linalg.norm(gradient) > 1e-2
    assert np.linalg.norm(plain - gradient) < 1e-5 * np.linalg.norm(gradient)  # float32 against float64
    splits = [(1, 1, 1, micro) for micro in (1, 4, 8)]
    splits += [(8, 1, 1, 8), (4, 2, 1, 8), (2, 2, 2, 4), (1, 8, 1, 16)]
    for *shape, micro in splits:
        mesh = tiny.one_device() if max(shape) == 1 else sharding.make_mesh(*shape)
        got = step(mesh, micro)
        assert np.linalg.norm(got - plain) < 1e-6 * np.linalg.norm(plain), (shape, micro)
    for batch_size, micro in ((13, 1), (32, 8)):
        got = step(tiny.one_device(), micro, batch_size, order=batch_size)
        assert np.linalg.norm(got - plain) < 1e-6 * np.linalg.norm(plain), (batch_size, micro)


def test_a_mean_of_each_parts_mean_would_be_noticed():
    """What a local normaliser would give differs by far more than the tolerance: the parts' members are not equal."""
    _, table, _, _, _ = case()
    order = np.random.default_rng(1).permutation(NODES)
    members = [table.size[order[i : i + 4]].sum() for i in range(0, NODES, 4)]
    assert max(members) > 1.01 * min(members)


# --- the ratio gate through the real path ---------------------------------------------------------------------------

GATES = {"float32": 1e-3, "bfloat16": 0.1}  # the method's numbers
GATE_CONFIG = Config(
    env=EnvConfig(parallel=16),
    flow=tiny.EVERY_STEP,
    group=GroupConfig(count=4, size=4, branching="tree", prefix_chunks=1, prefix_chunks_end=1),
    reward=RewardConfig(keep_low=0.0, keep_high=1.0),
    update=UpdateConfig(epochs=2, batch_size=32, micro_batch=32, optim=OptimConfig(lr=1e-2, warmup_steps=0)),
)


def make_trainer(dtype: str) -> GrpoTrainer:
    """The tiny policy, no parameter zero, for the tiny environment; computing in `dtype` over float32 parameters."""
    config = dataclasses.replace(tiny.CONFIG, dtype=dtype)
    stats = {
        "state": NormStats(np.zeros(2), np.ones(2), np.zeros(2), np.ones(2)),
        "actions": NormStats(np.zeros(3), np.ones(3), -np.ones(3), np.ones(3)),
    }
    words = PromptTokenizer.from_bytes(train_small_tokenizer(["hold still"]), config.prompt_length)
    processor = make_processor(config, words, stats, ("eye",))
    policy = fresh_policy(config, processor, 0, tiny.one_device(), executed=8, denoising_steps=4)
    rng = np.random.default_rng(fresh_seed(__name__, "make_trainer"))
    policy = policy.with_params(jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, "f"), policy.params))
    return GrpoTrainer(policy, GATE_CONFIG, tiny.one_device(), 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratio_is_one_from_collect_to_update(dtype, monkeypatch):
    """Sampled in one batch and one shape, scored in another, from stored caches; and a wrong chain is noticed."""
    monkeypatch.setattr(tiny_env, "HORIZON", 16)  # two chunks
    trainer = make_trainer(dtype)
    with EnvPool(tiny_env.FleetingEnv, 16, 0) as pool:
        rollouts = trainer.collect(pool, 0)
    assert rollouts.caches and rollouts.nodes.logp.dtype == np.float32
    before = jax.tree.map(np.array, trainer.trainable)
    stats = trainer.update(rollouts, 0)
    assert stats["updates"] == 2 and stats["ratio/first_update_max_error"] < GATES[dtype]
    first = jax.tree.map(lambda x: x[:4], rollouts.looks)
    assert trainer.actor.encode(trainer.params, first)[0].k.dtype == dtype  # it does compute in it
    assert {str(x.dtype) for x in jax.tree.leaves(trainer.trainable)} == {"float32"}  # over float32 masters
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, trainer.trainable)
    assert max(jax.tree.leaves(moved)) > 0

    trainer.trainable = jax.tree.map(jnp.asarray, before)
    wrong = rollouts.nodes.x.copy()
    wrong[rollouts.nodes.trainable, 2] += 0.05  # a twentieth of a standard deviation of noise, once in each chain
    broken = dataclasses.replace(rollouts, nodes=dataclasses.replace(rollouts.nodes, x=wrong))
    with pytest.raises(UserError, match="first update's importance ratios are off by"):
        trainer.update(broken, 0)
