"""The optimiser step against a naive per-member loss with plain optax; splits, caches and devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_policy as tiny
from flax import nnx
from seeds import fresh_seed

from z1_jax import sharding
from z1_jax.config.schema import OptimConfig, UpdateConfig
from z1_jax.optim import make_optimizer, schedule
from z1_jax.rl import flow, loss
from z1_jax.rl.actor import counted_coordinates
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.rollout import NodeTable
from z1_jax.rl.tree import signed_advantage_sums
from z1_jax.rl.update import NodeBatch, Updater, mini_batches
from z1_jax.types import Observation

GROUPS, SIZE, LOOKS, BATCH = 3, 4, 5, 16
LOW, HIGH = 0.2, 0.3
SEED = fresh_seed(__name__)
COUNTED = counted_coordinates(8, 8, tiny.processor().counted_dims, "executed")
FLOW = dataclasses.replace(
    tiny.EVERY_STEP, logprob_reduce="mean"
)  # near 1, so that rounding leaves six digits of every ratio
GRPO = loss.grpo(LOW, HIGH, 0.0)
STEP = optax.sgd(1.0)  # the parameters move by the gradient itself


@functools.cache
def case() -> tuple[NodeTable, Observation, np.ndarray]:
    """A random table of nodes, 13 of them usable, ratios on both sides of the clip range; looks and advantages."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    n = 15
    size = 2 ** rng.integers(0, 3, n)
    looks = Observation(
        images=rng.integers(0, 256, (LOOKS, 1, 28, 28, 3), dtype=np.uint8),
        image_mask=np.ones((LOOKS, 1), bool),
        tokens=rng.integers(1, 500, (LOOKS, 48)).astype(np.int32),
        token_mask=np.arange(48) < rng.integers(30, 48, (LOOKS, 1)),
    )
    x = np.empty((n, 5, 8, 16), "f")
    x[:, 0] = rng.normal(size=x[:, 0].shape)
    for k in range(4):
        x[:, k + 1] = 0.95 * x[:, k] + 0.3 * rng.normal(size=x[:, k].shape)
    stochastic = rng.random((n, 4)) < 0.7
    stochastic[:, 1] = True
    table = NodeTable(
        group=rng.integers(0, GROUPS, n),
        chunk=rng.integers(0, 5, n),
        leader=rng.integers(0, SIZE // size) * size,
        size=size,
        look=rng.integers(0, LOOKS, n),
        trainable=np.arange(n) < 13,
        steps=np.full(n, 8),
        x=x,
        stochastic=stochastic,
        logp=np.zeros(n, "f"),
    )
    graphdef, trainable, frozen = tiny.policy().split("expert")
    logp = np.asarray(jax.jit(functools.partial(scores, graphdef))(trainable, frozen, seen(looks, table), table))
    moved = logp - rng.choice([-0.5, -0.1, 0.0, 0.1, 0.5], n) - rng.uniform(-0.02, 0.02, n)
    return dataclasses.replace(table, logp=moved.astype("f")), looks, rng.normal(size=(GROUPS, SIZE))


jax.tree_util.register_dataclass(NodeTable)


def seen(looks, table):
    return jax.tree.map(lambda x: x[table.look], looks)


def scores(graphdef, trainable, frozen, observations, table):
    """log π of each node's chain, observation by observation, nothing cached."""
    model = nnx.merge(graphdef, trainable, frozen)
    cache = model.encode_prefix(observations)
    return flow.chain_logp(
        lambda x, t: model.velocity(cache, x, t),
        table.x,
        table.stochastic,
        COUNTED,
        noise_level=FLOW.noise_level,
        reduce=FLOW.logprob_reduce,
    )


@functools.cache
def naive(scope: str):
    """Value and gradient of the loss as the method writes it: one term for each member of each usable node."""
    table, looks, advantages = case()
    graphdef, trainable, frozen = tiny.policy().split(scope)
    rows = [(n, m) for n in range(13) for m in range(table.leader[n], table.leader[n] + table.size[n])]
    node = np.array([n for n, _ in rows])
    a = np.array([advantages[table.group[n], m] for n, m in rows], "f")

    def loss(trainable):
        ratio = jnp.exp(scores(graphdef, trainable, frozen, seen(looks, table), table) - table.logp)[node]
        return -jnp.sum(jnp.minimum(ratio * a, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * a)) / len(rows)

    return jax.jit(jax.value_and_grad(loss))(trainable)


def batch_of(observations_or_store, inputs=None) -> tuple[NodeBatch, float]:
    table, _, advantages = case()
    positive, negative = signed_advantage_sums(advantages, table.group, table.leader, table.size)
    inputs = {"positive": positive, "negative": negative} if inputs is None else inputs
    batches = list(mini_batches(table, inputs, table.trainable, observations_or_store, BATCH, np.random.default_rng(1)))
    assert len(batches) == 1
    return batches[0]


@functools.cache
def store() -> PrefixStore:
    """The looks' caches as a rollout leaves them: several padded batches."""
    _, looks, _ = case()
    actor, params = tiny.acting()
    parts = [jax.tree.map(lambda x, s=s: x[s], looks) for s in (slice(0, 2), slice(2, LOOKS))]
    return PrefixStore([actor.encode(params, part) for part in parts])


def run(
    scope="expert",
    observations=None,
    micro=BATCH,
    mesh=None,
    optimizer=STEP,
    steps=1,
    reference=None,
    node_loss=GRPO,
    inputs=None,
    **switches,
):
    """Parameters before and after, and the statistics."""
    mesh = mesh or tiny.one_device()
    graphdef, trainable, frozen = tiny.policy().split(scope)
    config = UpdateConfig(batch_size=BATCH, micro_batch=micro, **switches)
    with jax.set_mesh(mesh):
        updater = Updater(graphdef, optimizer, node_loss, FLOW, config, COUNTED, mesh)
        before = jax.device_get(trainable)
        trainable = jax.tree.map(lambda x: x.copy(), sharding.shard(trainable, mesh))
        frozen = sharding.shard(frozen, mesh)
        state = jax.jit(optimizer.init)(trainable)
        batch, normaliser = batch_of(store() if observations is None else observations, inputs)
        for _ in range(steps):
            trainable, state, stats = updater.step(trainable, state, frozen, batch, normaliser, reference=reference)
    assert updater.traces == 1
    return before, jax.device_get(trainable), stats


@functools.cache
def plain_run():
    return run()


def distance(a, b) -> float:
    return float(
        np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))
    )


def norm(a) -> float:
    return distance(a, jax.tree.map(np.zeros_like, a))


def moved(result):
    return jax.tree.map(np.subtract, result[0], result[1])  # with SGD at rate 1: the gradient


@pytest.mark.parametrize("scope", ["expert", "joint"])
def test_gradient_equals_the_naive_per_member_loss(scope):
    """`expert` from the prefix store, `joint` from the observations."""
    value, gradient = jax.device_get(naive(scope))
    result = plain_run() if scope == "expert" else run(scope, observations=case()[1])
    assert result[2]["loss"] == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert norm(gradient) > 1e-3
    assert distance(moved(result), gradient) < 1e-5 * norm(gradient) + 1e-6 * norm(result[0])
    assert result[2]["grad_norm"] == pytest.approx(norm(gradient), rel=1e-4)
    if scope == "joint":  # the VLM learns too
        assert all(norm(gradient[part]) > 0 for part in ("vision", "language", "expert"))


def test_optimiser_step_equals_plain_optax():
    config = OptimConfig(lr=1e-2, warmup_steps=1, schedule="constant", eps=1e-2, weight_decay=0.1, clip_norm=0.02)
    before, after, _ = run(optimizer=make_optimizer(config, schedule(config, 10)))
    _, gradient = jax.device_get(naive("expert"))
    scale = min(1.0, 0.02 / norm(gradient))
    assert scale < 1
    # The first AdamW step by hand: m̂ = g and v̂ = g², at half the rate, since one step of warm-up comes first.
    rate = 0.5e-2

    def step(w, g):
        g = g * scale
        return w - rate * (g / (np.sqrt(g * g) + 1e-2) + 0.1 * w)

    expected = jax.tree.map(step, before, gradient)
    assert distance(after, expected) < 1e-4 * distance(before, expected)


def test_statistics_are_those_of_the_valid_nodes():
    table, looks, _ = case()
    graphdef, trainable, frozen = tiny.policy().split("expert")
    logp = jax.jit(functools.partial(scores, graphdef))(trainable, frozen, seen(looks, table), table)
    ratio = np.exp(np.asarray(logp) - table.logp)[:13]
    stats = plain_run()[2]
    assert stats["nodes"] == 13
    assert stats["ratio_sum"] == pytest.approx(ratio.sum(), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(ratio.max(), rel=1e-4)
    assert stats["ratio_error"] == pytest.approx(np.abs(ratio - 1).max(), rel=1e-3)


def test_gradient_norm_of_each_part():
    stats, (_, gradient) = run("joint", observations=case()[1])[2], jax.device_get(naive("joint"))
    for part in ("vision", "language", "expert"):
        assert stats[f"grad_norm/{part}"] == pytest.approx(norm(gradient[part]), rel=1e-4)


def moved_away(scope: str):
    """Parameters apart from the policy's own: a reference to be pulled to."""
    trainable = tiny.policy().split(scope)[1]
    rng = np.random.default_rng(SEED)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, "f"), trainable)


@pytest.mark.parametrize("scope", ["expert", "joint"])
def test_kl_to_the_reference_equals_the_densities_own(scope):
    """Value and gradient, from means written out and one term per member; `joint` has another VLM too."""
    table, looks, _ = case()
    graphdef, trainable, frozen = tiny.policy().split(scope)
    reference, coefficient = moved_away(scope), 0.7

    def means(weights):
        model = nnx.merge(graphdef, weights, frozen)
        cache = model.encode_prefix(seen(looks, table))
        t = jnp.broadcast_to(1 - jnp.arange(4) / 4, table.stochastic.shape)
        return flow.transition(table.x[:, :-1], model.velocity(cache, table.x[:, :-1], t), t, 4, FLOW.noise_level)

    def penalty(weights):
        (mean, std), (other, _) = means(weights), means(reference)
        terms = (mean - jax.lax.stop_gradient(other)) ** 2 / (2 * std**2) * COUNTED
        per_chunk = jnp.sum(terms * table.stochastic[..., None, None], axis=(1, 2, 3))
        per_chunk /= table.stochastic.sum(axis=1) * COUNTED.sum()  # reduced as the log-probability is
        return jnp.sum((per_chunk * table.size)[:13]) / table.size[:13].sum()

    value, gradient = jax.device_get(jax.jit(jax.value_and_grad(penalty))(trainable))
    observations = None if scope == "expert" else looks
    plain = plain_run() if scope == "expert" else run(scope, observations=observations)
    pulled = run(scope, observations=observations, reference=reference, kl_coef=coefficient)
    assert pulled[2]["kl_reference"] == pytest.approx(float(value), rel=1e-4) and value > 1e-3
    assert pulled[2]["loss"] - plain[2]["loss"] == pytest.approx(coefficient * float(value), rel=1e-3)
    added = jax.tree.map(np.subtract, moved(pulled), moved(plain))
    expected = jax.tree.map(lambda g: coefficient * g, gradient)
    assert distance(added, expected) < 1e-3 * norm(expected)


def test_the_reference_itself_is_at_no_distance():
    stats = run(reference=tiny.policy().split("expert")[1], kl_coef=1.0)[2]
    assert stats["kl_reference"] == 0 and stats["loss"] == pytest.approx(plain_run()[2]["loss"], rel=1e-6)


def test_micro_batches_change_nothing():
    a, b = plain_run(), run(micro=4)
    assert distance(moved(a), moved(b)) < 1e-6 * norm(moved(a)) + 1e-7 * norm(a[0])
    assert b[2] == pytest.approx(a[2], rel=1e-5, abs=1e-6)


def test_the_prefix_cache_changes_nothing():
    a, b = plain_run(), run(observations=case()[1])
    assert distance(moved(a), moved(b)) < 1e-6 * norm(moved(a)) + 1e-7 * norm(a[0])
    assert b[2] == pytest.approx(a[2], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("shape", "micro"), [((8, 1, 1), BATCH), ((2, 4, 1), 8)])
def test_eight_devices_change_nothing(shape, micro):
    a = plain_run()
    b = run(mesh=sharding.make_mesh(*shape), micro=micro)
    assert distance(moved(a), moved(b)) < 1e-6 * norm(moved(a)) + 1e-7 * norm(a[0])
    assert b[2] == pytest.approx(a[2], rel=1e-4, abs=1e-5)


def test_repeated_steps_compile_once_and_lower_the_loss():
    _, _, first = plain_run()
    _, _, later = run(optimizer=optax.sgd(0.1), steps=4)
    assert later["loss"] < first["loss"]


def test_caches_of_the_store_are_the_rollouts_own():
    _, looks, _ = case()
    actor, params = tiny.acting()
    whole, rows = actor.encode(params, looks)
    assert rows == LOOKS
    order = np.array([4, 0, 0, 2])
    taken = store().take(order)
    np.testing.assert_allclose(taken.k, np.asarray(whole.k)[:, order], atol=1e-5)
    np.testing.assert_array_equal(taken.mask, np.asarray(whole.mask)[order])
    assert store().nbytes > 0 and store().take(np.arange(LOOKS)).k.shape[1] == LOOKS


def weighted_likelihood(logp, logp_old, inputs, valid, normaliser):
    """Another algorithm, whole: regression on what was taken, each node with its weight (as RWR and AWR)."""
    weight = jnp.where(valid, inputs["weight"], 0.0)
    stats = {"nodes": jnp.sum(valid), "weight_sum": jnp.sum(weight), "weight_max": jnp.max(weight)}
    return -jnp.sum(weight * logp) / normaliser, stats


@pytest.mark.parametrize("micro", [BATCH, 4])
def test_another_algorithm_is_another_loss(micro):
    """Its gradient by autodiff of the likelihood written out; no A⁺, A⁻ or ratio is asked of it."""
    table, looks, _ = case()
    weight = np.random.default_rng(SEED).exponential(size=15).astype("f")
    graphdef, trainable, frozen = tiny.policy().split("expert")

    def by_hand(trainable):
        logp = scores(graphdef, trainable, frozen, seen(looks, table), table)
        return -jnp.sum((weight * logp)[:13]) / table.size[:13].sum()

    value, gradient = jax.device_get(jax.jit(jax.value_and_grad(by_hand))(trainable))
    arguments = {"node_loss": weighted_likelihood, "inputs": {"weight": weight}, "micro": micro}
    result = run(**arguments)
    assert result[2]["loss"] == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert distance(moved(result), gradient) < 1e-5 * norm(gradient) + 1e-6 * norm(result[0])
    assert result[2]["nodes"] == 13
    assert result[2]["weight_sum"] == pytest.approx(weight[:13].sum(), rel=1e-5)
    assert result[2]["weight_max"] == weight[:13].max()


@pytest.mark.parametrize("usable", [1, 16, 17, 40])
def test_an_epoch_deals_every_usable_node_once(rng, usable):
    n = 50
    mask = np.zeros(n, bool)
    mask[rng.choice(n, usable, replace=False)] = True
    table = NodeTable(
        **{name: np.zeros(n, int) for name in ("group", "chunk", "leader", "steps")},
        size=rng.integers(1, 5, n),
        look=np.arange(n),
        trainable=mask,
        x=np.arange(n, dtype="f")[:, None, None, None],
        stochastic=np.ones((n, 1), bool),
        logp=rng.normal(size=n).astype("f"),
    )
    inputs = {"weight": rng.random(n).astype("f"), "vectors": [rng.normal(size=(n, 3))]}  # whatever an algorithm has
    looks = Observation(*(np.arange(n)[:, None] for _ in range(4)))
    dealt, sizes = [], []
    for batch, normaliser in mini_batches(table, inputs, mask, looks, 16, rng):
        rows = batch.x[:, 0, 0, 0].astype(int)
        assert len(rows) == 16
        np.testing.assert_array_equal(batch.seen.tokens[:, 0], rows)  # everything of a node stays together
        np.testing.assert_array_equal(batch.inputs["weight"], inputs["weight"][rows])
        np.testing.assert_array_equal(batch.inputs["vectors"][0], inputs["vectors"][0][rows])
        np.testing.assert_array_equal(batch.logp_old, table.logp[rows])
        real = rows[batch.valid]
        assert normaliser == table.size[real].sum()  # members, not nodes, and no padding
        dealt += real.tolist()
        sizes.append(len(real))
    assert sorted(dealt) == np.flatnonzero(mask).tolist()
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == -(-usable // 16)


def test_an_epoch_of_nothing_is_empty(rng):
    table, looks, _ = case()
    none = np.zeros(15, bool)
    assert list(mini_batches(table, table.logp, none, looks, 16, rng)) == []


def test_schedules():
    cosine = schedule(OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", lr_end=0.1), steps=12)
    assert [float(cosine(k)) for k in (0, 2, 4)] == pytest.approx([0.2, 0.6, 1.0])
    assert float(cosine(8)) == pytest.approx(0.55) and float(cosine(12)) == pytest.approx(0.1)  # half-way, the end
    constant = schedule(OptimConfig(lr=1.0, warmup_steps=3, schedule="constant"), steps=12)
    assert [float(constant(k)) for k in (0, 3, 500)] == pytest.approx([0.25, 1.0, 1.0])
    assert float(schedule(OptimConfig(lr=0.5, warmup_steps=0, schedule="constant"), steps=1)(0)) == 0.5
