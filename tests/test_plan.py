"""What a run costs on paper: counts against hand calculation, traced programs, XLA's own count and real arrays."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy
from flax import nnx

from z1_jax import initial_policy, optim, sharding
from z1_jax.config import schema as z1_config
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import ConfigError
from z1_jax.errors import UserError
from z1_jax.models import pi05
from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.presets import get_preset
from z1_jax.models.siglip import SiglipConfig
from z1_jax.plan import __main__ as plan
from z1_jax.plan import accelerators, analytic, planning, programs
from z1_jax.plan import jaxpr as traced
from z1_jax.plan import text as plan_text
from z1_jax.rl import trainer
from z1_jax.rl.actor import make_actor

H200 = accelerators.get_accelerator("H200")
SMALL = dataclasses.replace(
    z1_config.Config(),
    sft=dataclasses.replace(z1_config.SftConfig(), batch_size=8, flows=2),
    update=dataclasses.replace(z1_config.UpdateConfig(), batch_size=16, micro_batch=8),
    env=dataclasses.replace(z1_config.EnvConfig(), parallel=8),
)


def random_model(rng, **settings) -> pi05.Pi05Config:
    heads, kv_heads, head_dim, depth = int(rng.integers(1, 4)) * 2, 2, int(rng.integers(2, 5)) * 2, 3
    gemma = {"depth": depth, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    width = int(rng.integers(3, 9)) * 2
    return pi05.Pi05Config(
        vision=SiglipConfig(width=2 * width, depth=2, mlp=int(rng.integers(5, 30)), heads=2, patch=4, image_size=12),
        language=GemmaConfig(width=width + 3, mlp=int(rng.integers(5, 30)), **gemma),
        expert=GemmaConfig(width=width, mlp=int(rng.integers(5, 30)), **gemma),
        vocab_size=50,
        cameras=int(rng.integers(1, 4)),
        prompt_length=int(rng.integers(3, 9)),
        action_dim=int(rng.integers(2, 9)),
        horizon=int(rng.integers(2, 9)),
        **{"dtype": "float32", **settings},
    )


def encode(model: pi05.Pi05Config):
    """The traced prefix of one observation."""
    graphdef, params = nnx.split(pi05.abstract_model(model))
    looks = programs.abstract_observation(model, 1, tiny_policy.one_device())
    return jax.jit(lambda p, o: nnx.merge(graphdef, p).encode_prefix(o)).trace(params, looks)


def velocity(model: pi05.Pi05Config):
    """The traced velocity of one chunk."""
    graphdef, params = nnx.split(pi05.abstract_model(model))
    cache = programs.abstract_cache(model, 1, tiny_policy.one_device())
    x = jax.ShapeDtypeStruct((1, 1, model.horizon, model.action_dim), jnp.float32)
    t = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return jax.jit(lambda p, *a: nnx.merge(graphdef, p).velocity(*a)).trace(params, cache, x, t)


# ---- operations ----


def test_full_size_counts_are_the_published_ones():
    """Published: 4.64 and 3.34 TFLOP, with the whole last language layer, of which only keys and values are needed."""
    model = get_preset("pi05")
    for cameras, published in ((3, 4.64e12), (2, 3.34e12)):
        ours, tokens = analytic.prefix_flops(model, cameras), cameras * 256 + 200
        assert ours == pytest.approx(published, rel=0.05)
        # query and output 2048 x 2048, MLP 3 x 2048 x 16384, logits and weighted sum over 8 heads of 256
        rest = 2 * tokens * (2 * 2048 * 2048 + 3 * 2048 * 16384) + 2 * 2 * tokens**2 * 8 * 256
        assert ours + rest == pytest.approx(published, rel=0.003)
    assert pi05.cache_bytes(model) == pytest.approx(17.8e6, rel=0.005)
    assert pi05.cache_bytes(model, 2) == pytest.approx(13.1e6, rel=0.005)
    assert analytic.expert_parameters(model) == pi05.count_parameters(nnx.state(pi05.abstract_model(model).expert))


@pytest.mark.parametrize(
    ("observations", "encoded", "trains_vlm", "published_ms"), [(32, True, True, 569), (32, True, False, 193)]
)
def test_published_steps_are_within_5_percent(observations, encoded, trains_vlm, published_ms):
    work = analytic.training_work(
        get_preset("pi05"), observations, 1, trainable=0, encoded=encoded, trains_vlm=trains_vlm
    )
    assert H200.compute_ms(work.flops) == pytest.approx(published_ms, rel=0.05)


def test_the_floor_of_a_decision_is_the_published_one():
    """Published: 5.9 ms for the prefix and 0.20 ms a step of denoising."""
    work = analytic.decision_work(get_preset("pi05"), 1, 10)
    assert H200.memory_ms(work.weight_bytes) == pytest.approx(2.0, rel=0.01)
    assert H200.compute_ms(analytic.prefix_flops(get_preset("pi05"))) == pytest.approx(5.9, rel=0.055)


def test_formulas_count_what_the_model_does(rng):
    """Against every matrix product of the traced model, for random shapes."""
    model = random_model(rng)
    assert traced.count_flops(encode(model).jaxpr.jaxpr).total == analytic.prefix_flops(model)
    assert traced.count_flops(velocity(model).jaxpr.jaxpr).total == analytic.velocity_flops(model)


def test_loops_times_their_trips_are_what_xla_counts_unrolled():
    """XLA's count of the looped model, with the further trips added, against its count of the unrolled one."""
    tiny = get_preset("tiny", prompt_length=60)
    language, expert = (dataclasses.replace(part, depth=4) for part in (tiny.language, tiny.expert))
    model = dataclasses.replace(tiny, language=language, expert=expert)
    looped, unrolled = encode(model), encode(dataclasses.replace(model, unroll=True))
    counts = traced.count_flops(looped.jaxpr.jaxpr)
    once, whole = (program.lower().cost_analysis()["flops"] for program in (looped, unrolled))
    assert counts.total == traced.count_flops(unrolled.jaxpr.jaxpr).total == analytic.prefix_flops(model)
    assert counts.total < whole < 1.25 * counts.total  # XLA counts softmax, norms and the like too
    assert once < 0.9 * whole
    assert once + counts.total - counts.bodies_once == pytest.approx(whole, rel=0.1)


def test_flops_by_hand():
    """A product [3, 5] x [5, 7] takes 3·7 sums of 5 multiply-adds; a loop of 4 trips holds one."""

    def looped(x, w):
        return jax.lax.scan(lambda c, _: (c, c @ w), x, None, length=4)[1]

    shapes = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    counts = traced.count_flops(jax.jit(looped).trace(*shapes).jaxpr.jaxpr)
    assert (counts.total, counts.bodies_once) == (4 * 210, 210)

    def as_long_as_asked(x, w, trips):
        return jax.lax.fori_loop(0, trips, lambda _, c: c + (x @ w), jnp.zeros((3, 7)))

    asked = jax.jit(as_long_as_asked).trace(*shapes, jax.ShapeDtypeStruct((), jnp.int32))
    counts = traced.count_flops(asked.jaxpr.jaxpr, trips=6)
    assert (counts.total, counts.bodies_once) == (6 * 210, 210)


# ---- bytes ----


def peak(function, *shapes, in_place: int = 0) -> float:
    jaxpr = jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr.jaxpr
    return traced.peak_bytes(jaxpr, in_place=jaxpr.outvars[:in_place])


def test_peak_bytes_by_hand():
    x, w = (8, 16), (16, 16)
    product = 4 * 8 * 16
    assert peak(lambda x, w: x @ w, x, w) == product
    assert peak(lambda x, w: jnp.sum(jnp.exp(x) * 2), x, w) == 4  # fused into the sum: nothing is stored but the result
    assert peak(lambda x, w: ((x @ w) @ w) @ w, x, w) == 2 * product  # one product is read, another written
    assert peak(lambda x, w: (x @ w, x @ w + 1, (x @ w) @ w), x, w) >= 3 * product
    assert peak(lambda x, w: (x + 1, x @ w), x, w, in_place=1) == product  # the first result overwrites an argument
    assert peak(lambda x, w: jnp.tanh(x @ w) @ w, x, w) == 2 * product  # tanh overwrites what it is the last to read

    def stacked(x, w):  # 5 results, and within the loop nothing else: each is written where it stays
        return jax.lax.scan(lambda c, _: (c + 1, c * 2), x, None, length=5)[1]

    assert peak(stacked, x, w) == pytest.approx(6 * product)

    def passed_through(x, w):  # an array that a loop carries and never changes is no new one
        return jax.lax.scan(lambda c, _: ((c[0] @ w, c[1]), None), (x, w), None, length=5)[0]

    assert peak(passed_through, x, w) == 2 * product

    def two_sums(x, w, sums):  # a sum that a loop within a loop carries on
        def add(sums, i):
            return jax.lax.dynamic_update_slice(sums, x[None], (i, 0, 0)), None

        def inner(sums, rows):
            return jax.lax.scan(add, sums, rows)[0], None

        return jax.lax.scan(inner, sums, jnp.zeros((3, 5), jnp.int32))[0]

    many = 64 * product
    assert many <= peak(two_sums, x, w, (64, *x)) < 1.2 * many
    assert peak(two_sums, x, w, (64, *x), in_place=1) < 0.2 * many

    def kept_for_backward(x, w):  # exp keeps its result, of each of 5 layers; two or three products are at work
        return jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda c, _: (jnp.exp(c @ w), None), x, None, length=5)[0]))(x)

    assert 7 * product <= peak(kept_for_backward, x, w) <= 8 * product


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bytes_are_those_of_real_arrays(rng, name):
    """Parameters, optimiser state and prefix cache of a tiny model, on two devices."""
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    model = get_preset("tiny")
    real = nnx.state(pi05.init_model(model, int(rng.integers(1000)), mesh))
    policy = programs.abstract_policy(SMALL, model, mesh)
    optimizer = optim.make_optimizer(z1_config.SftOptimConfig(name=name), 1e-3)

    def held(tree) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert programs.bytes_per_device(policy.params) == held(real) < 4 * pi05.count_parameters(real)
    abstract = optim.init_optimizer(optimizer, policy.params, mesh)
    state = optim.init_optimizer(optimizer, real, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert programs.bytes_per_device(abstract) == held(state)
    assert [x.sharding for x in jax.tree.leaves(abstract)] == [x.sharding for x in jax.tree.leaves(state)]
    cache = encode(model).out_info
    assert pi05.cache_bytes(model) == sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(cache))


def test_frozen_parameters_are_kept_in_bfloat16():
    """But norms, patch and position embeddings, which compute in float32."""
    model = dataclasses.replace(tiny_policy.CONFIG, dtype="bfloat16")
    policy = programs.abstract_policy(SMALL, model, tiny_policy.one_device())
    _, trainable, frozen = policy.split("expert")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    for path, variable in nnx.to_flat_state(frozen):
        wide = any(part.startswith(("norm", "patch", "position")) for part in map(str, path))
        assert variable.get_value().dtype == (jnp.float32 if wide else jnp.bfloat16), path


def test_a_plan_draws_nothing_for_adapters_and_augmented_images():
    sft = dataclasses.replace(SMALL.sft, augment=True, ema=0.9)
    train = dataclasses.replace(SMALL.train, scope="lora")
    config, mesh = dataclasses.replace(SMALL, sft=sft, train=train), tiny_policy.one_device()
    names = [program.name for program in programs.trace_programs(config, tiny_policy.CONFIG, mesh)]
    assert names == ["sft_step", "rl_update", "encode", "denoise"]
    _, trainable, frozen = programs.abstract_policy(config, tiny_policy.CONFIG, mesh).split("lora", config.lora)
    leaves = jax.tree.leaves((trainable, frozen))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh for leaf in leaves)
    real = tiny_policy.policy().split("lora", config.lora)
    assert jax.tree.map(jnp.shape, (trainable, frozen)) == jax.tree.map(jnp.shape, real[1:])


@pytest.mark.parametrize(
    ("branching", "schedule", "start", "end"),
    [("tree", "constant", 0, 1), ("tree", "constant", 3, 1), ("tree", "linear", 0, 3), ("prefix", "cosine", 3, 0)],
)
def test_the_most_looks_are_those_of_the_dearest_iteration(branching, schedule, start, end):
    """Counted member by member: a look is one chunk of those who have not parted yet."""
    group = z1_config.GroupConfig(3, 4, branching, start, end, schedule)
    train = dataclasses.replace(SMALL.train, iterations=4)
    config = dataclasses.replace(SMALL, group=group, train=train)

    def looks(iteration: int) -> int:
        if schedule == "cosine":
            share = (1 - np.cos(np.pi * iteration / 3)) / 2
        else:
            share = iteration / 3 if schedule == "linear" else 0.0
        prefix = round(start + (end - start) * share)
        points = [prefix // 2, prefix] if branching == "tree" else [prefix] * 2
        seen = {(chunk, tuple(member >> (1 - i) for i, p in enumerate(points) if p < chunk))
                for member in range(4) for chunk in range(6)}  # fmt: skip
        return 3 * len(seen)

    most = max(looks(i) for i in range(4))
    assert trainer.most_looks(config, control_steps=46, executed=8) == most
    model = tiny_policy.CONFIG
    env = dataclasses.replace(SMALL.env, horizon=46)
    made = planning.make_plan(dataclasses.replace(config, env=env, init="there"), model, H200, 1e9, 1)
    assert made.host_cache_bytes == most * pi05.cache_bytes(model)


def test_the_sampler_casts_its_weights_once():
    """Of a bfloat16 policy: no kernel enters the denoising loop in float32."""
    model = dataclasses.replace(tiny_policy.CONFIG, dtype="bfloat16")
    config = dataclasses.replace(SMALL, init="somewhere", flow=dataclasses.replace(SMALL.flow, steps=7))
    traces = {p.name: p.traced for p in programs.trace_programs(config, model, tiny_policy.one_device())}
    loops = [e for e in traces["denoise"].jaxpr.jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 7]
    wide = [v.aval.shape for v in loops[0].invars if v.aval.dtype == jnp.float32 and v.aval.ndim >= 2]
    kernels = {leaf.shape for leaf in jax.tree.leaves(nnx.state(pi05.abstract_model(model).expert.layers))}
    assert len(loops) == 1 and not kernels & set(wide)


@pytest.fixture(scope="module")
def small_plan():
    return planning.make_plan(SMALL, tiny_policy.CONFIG, H200, 1e9, 1)


def test_a_plan_adds_up(small_plan):
    rows = {row.name: row for row in small_plan.rows}
    assert list(rows) == ["sft_step", "rl_update", "encode", "denoise"] and small_plan.fits
    state = nnx.state(pi05.abstract_model(tiny_policy.CONFIG))
    count = pi05.count_parameters(state)
    sft, update = rows["sft_step"], rows["rl_update"]
    assert sft.parameters == sft.gradients == update.parameters == 4 * count
    assert 8 * count < sft.optimizer < 8 * count + 64  # two moments, and counters
    expert = analytic.expert_parameters(tiny_policy.CONFIG)
    assert update.gradients == 4 * expert and 8 * expert < update.optimizer < 8 * expert + 64
    assert update.temporary_estimate > update.gradients
    assert rows["encode"].outputs == 8 * pi05.cache_bytes(tiny_policy.CONFIG)
    assert rows["denoise"].flops_traced == pytest.approx(
        8 * SMALL.flow.steps * analytic.velocity_flops(tiny_policy.CONFIG)
    )
    assert small_plan.host_cache_bytes % pi05.cache_bytes(tiny_policy.CONFIG) == 0 < small_plan.host_cache_bytes
    assert small_plan.peak == max(r.total for r in small_plan.rows)


def test_the_copy_for_acting_is_what_xla_is_given():
    """All that a compiled decision reads beside its inputs and the token embedding; every program of RL holds it."""
    model = dataclasses.replace(tiny_policy.CONFIG, acting="prepared")
    config, mesh = dataclasses.replace(SMALL, init="somewhere"), tiny_policy.one_device()
    policy = programs.abstract_policy(config, model, mesh)
    graphdef, *params = policy.split("expert")
    actor = make_actor(policy, graphdef, config.flow, mesh, 8)
    looks = programs.abstract_observation(model, 8, mesh)
    chain = programs.abstract_cache(model, 8, mesh), *programs.abstract_noise(model, 8, config.flow.steps, mesh)
    with jax.set_mesh(mesh):
        decision = actor.trace_encode(tuple(params), looks), actor.trace_sample(tuple(params), *chain)
    read = sum(t.lower().compile().memory_analysis().argument_size_in_bytes for t in decision)
    embedding, level = 4 * model.vocab_size * model.language.width, 4
    copy = read - embedding - level - programs.bytes_per_device((looks, chain))
    assert programs.prepared_bytes(config, model, mesh) == copy > 0
    lora = dataclasses.replace(config, train=dataclasses.replace(config.train, scope="lora"))
    plain = dataclasses.replace(model, acting="plain")
    assert programs.prepared_bytes(lora, model, mesh) == programs.prepared_bytes(config, plain, mesh) == 0
    rows = planning.make_plan(config, tiny_policy.CONFIG, H200, 1e9, 1).rows
    assert [row.prepared for row in rows] == [copy] * 3


def test_host_memory_counts(small_plan):
    """Caches that no host holds: `auto` computes prefixes again, as the run would; `host` does not fit."""
    caches = small_plan.host_cache_bytes
    enough, less = (
        planning.make_plan(SMALL, tiny_policy.CONFIG, H200, 1e9, 1, "no", x) for x in (2 * caches, 2 * caches - 1)
    )
    assert enough.fits and (enough.host_cache_bytes, enough.recomputed) == (caches, False)
    assert less.fits and (less.host_cache_bytes, less.recomputed) == (0, True)
    update = {row.name: row.flops_traced for row in less.rows}["rl_update"]
    assert update > 1.5 * {row.name: row.flops_traced for row in enough.rows}["rl_update"]
    assert "recomputed" in "\n".join(plan_text.lines(less))
    kept = dataclasses.replace(SMALL, update=dataclasses.replace(SMALL.update, prefix_cache="host"))
    refused = planning.make_plan(kept, tiny_policy.CONFIG, H200, 1e9, 1, "no", caches - 1)
    assert not refused.fits and refused.changes[0][0] == "update.prefix_cache=recompute"
    assert "does not fit: prefix caches need" in "\n".join(plan_text.lines(refused))


def test_a_plan_that_does_not_fit_says_what_would(small_plan):
    budget = 0.9 * small_plan.peak
    tight = planning.make_plan(SMALL, tiny_policy.CONFIG, H200, budget, 1)
    assert not tight.fits and tight.changes
    assert tight.changes[-1][1] <= budget and all(nbytes > budget for _, nbytes in tight.changes[:-1])
    text = "\n".join(plan_text.lines(tight))
    assert "does not fit: sft_step needs" in text and tight.changes[0][0] in text
    assert json.loads(json.dumps(plan_text.document(tight)))["fits"] is False


@pytest.mark.parametrize(
    "batch, micro, told",
    [(8, 0, ["micro_batch=4", "batch_size=4"]), (64, 8, ["micro_batch=4", "batch_size=4"]), (5, 0, ["batch_size=2"]),
     (6, 3, ["batch_size=3"]), (3, 3, [])],
)  # fmt: skip
def test_what_is_advised_is_what_was_planned(batch, micro, told, small_plan):
    """Each advice, with those before it, names the batch of the config whose bytes stand beside it."""
    given = dataclasses.replace(SMALL, sft=dataclasses.replace(SMALL.sft, batch_size=batch, micro_batch=micro))
    worst = dataclasses.replace(small_plan, rows=[row for row in small_plan.rows if row.name == "sft_step"])
    steps = [(name, made) for name, made, *_ in planning._steps(given, tiny_policy.CONFIG, worst) if "sft" in name]
    assert [name.removeprefix("sft.") for name, _ in steps] == told
    expected = given.sft
    for name, made in steps:
        key, _, value = name.removeprefix("sft.").partition("=")
        expected = dataclasses.replace(expected, **{key: int(value)})
        assert made.sft == expected


@pytest.mark.parametrize(
    "batch, micro, devices, told",
    [(16, 8, 1, ["micro_batch=4", "batch_size=4"]), (8, 8, 1, ["micro_batch=4", "batch_size=4"]),
     (10, 5, 1, ["batch_size=5"]), (5, 5, 1, ["micro_batch=2 and update.batch_size=2"]), (1, 1, 1, []),
     (64, 8, 8, ["batch_size=8"]), (8, 8, 8, []), (64, 16, 8, ["micro_batch=8", "batch_size=8"])],
)  # fmt: skip
def test_what_is_advised_of_an_update(batch, micro, devices, told, small_plan):
    """Rows of a micro-batch are a multiple of the devices."""
    update = dataclasses.replace(SMALL.update, batch_size=batch, micro_batch=micro)
    rows = [row for row in small_plan.rows if row.name == "rl_update"]
    worst = dataclasses.replace(small_plan, rows=rows, devices=devices)
    given = dataclasses.replace(SMALL, update=update)
    names = [name for name, *_ in planning._steps(given, tiny_policy.CONFIG, worst) if name.startswith("update")]
    assert [name.removeprefix("update.") for name in names] == told


def test_the_copy_for_decisions_is_given_up_before_a_training_is_changed(small_plan):
    """Its place in the order of advice, and the bytes that are left without it."""
    rows = {row.name: row for row in small_plan.rows}
    update = rows["rl_update"]
    assert update.prepared > 0
    worst = dataclasses.replace(small_plan, rows=[update])
    names = [name for name, *_ in planning._steps(SMALL, tiny_policy.CONFIG, worst)]
    order = ["update.micro_batch=4", "model.acting=plain", "update.batch_size=4"]
    assert [name for name in names if name in order] == order
    without = dataclasses.replace(tiny_policy.CONFIG, remat="full", dtype="bfloat16", acting="plain")
    told = dict(planning.changes(SMALL, tiny_policy.CONFIG, dataclasses.replace(worst, memory=0.0)))
    smaller = dataclasses.replace(SMALL, update=dataclasses.replace(SMALL.update, micro_batch=4))
    expected = planning.make_plan(smaller, without, H200, 1e12, 1)
    bytes_of = next(told[name] for name in told if name.endswith("model.acting=plain"))
    assert bytes_of == max(row.total for row in expected.rows) and all(row.prepared == 0 for row in expected.rows)
    apart = dataclasses.replace(worst, rows=[dataclasses.replace(update, prepared=0)])
    assert "model.acting=plain" not in [name for name, *_ in planning._steps(SMALL, tiny_policy.CONFIG, apart)]


def test_compiled_bytes_and_estimate_agree_in_float32():
    """On the CPU in float32, where no number is widened: within a factor of two of what XLA allocates.

    Four micro-batches whose activations are small hold one gradient, their sum, but for a layer's and what XLA copies.
    """
    micro = dataclasses.replace(SMALL.update, batch_size=4, micro_batch=1)
    only_rl = dataclasses.replace(SMALL, init="somewhere", update=micro)
    expert = dataclasses.replace(tiny_policy.CONFIG.expert, mlp=1024)
    model = dataclasses.replace(tiny_policy.CONFIG, remat="full", expert=expert)
    rows = {row.name: row for row in planning.make_plan(only_rl, model, H200, 1e9, 1, "cpu").rows}
    update = rows["rl_update"]
    assert 0.5 < update.temporary_estimate / update.compiled.temporary < 2.0
    assert max(update.temporary_estimate, update.compiled.temporary) < 2.4 * update.gradients
    # A CPU's allocation is not what is planned with.
    assert update.temporary == int(planning.ALLOWANCE * update.temporary_estimate)
    assert update.compiled.flops_with_trips(update.flops_traced, update.flops_traced_once) > update.flops_traced


@pytest.mark.parametrize(("source", "devices", "memory"), [("grpo", 1, 21e9), ("sft", 2, 48e9)])
def test_full_size_fits_where_it_should(source, devices, memory):
    config = parse_command_line(["", f"--config=configs/{source}.py:full"])
    model = initial_policy.configured_model(config)
    result = planning.make_plan(config, model, H200, memory, devices)
    assert result.fits, plan_text.lines(result)
    floor = 4 * pi05.count_parameters(nnx.state(pi05.abstract_model(model))) * 3 / devices
    assert source == "grpo" or result.peak > floor  # no plan for less than parameters and moments


# ---- the command ----


def one_line(capfd, *arguments) -> str:
    with pytest.raises(UserError) as error:
        plan.main(["plan", *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/sft.py", "--accelerator=H20"], "'H20' is not in the table; known: H200, H100"),
        (["--config=configs/sft.py", "--devices=0"], "--devices: got 0, expected 1"),
        (["--config=configs/sft.py", "--devices=two"], "invalid int value: 'two'"),
        (["--config=configs/sft.py", "--memory=-3"], "--memory: got -3, expected"),
        (["--config=configs/sft.py", "--memory=nan"], "--memory: got nan, expected"),
        (["--config=configs/sft.py", "--memory=inf"], "--memory: got inf, expected"),
        (["--config=configs/sft.py", "--host-memory=-1"], "--host-memory: got -1, expected"),
        (["--config=configs/sft.py", "--compile=gpu"], "--compile: invalid choice: 'gpu'"),
        (["--config=configs/sft.py", "--fsdp=2"], "'--fsdp=2' is not understood"),
        (["--config=configs/eval.py", "--config.checkpoint=x"], "algorithm: got 'eval'"),
        (["--config=configs/sft.py", "--config.task=Fly"], "task: 'Fly' does not exist"),
        (["--config=configs/sft.py", "--config.mesh.fsdp=3", "--devices=4"], "needs a multiple of 3 devices"),
        (["--config=configs/sft.py", "--config.sft.batch_size=7", "--devices=2"], "sft.batch_size: got 7"),
        (["--config=configs/sft.py", "--compile=cuda", "--accelerator=TPUv5p"], "compiling for TPUv5p"),
    ],
)
def test_mistakes_are_answered_in_a_line(capfd, arguments, message):
    assert message in one_line(capfd, *arguments)


def test_accelerators_are_found_by_what_jax_calls_them():
    assert accelerators.accelerator_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert accelerators.accelerator_of("NVIDIA GeForce RTX 4090").name == "RTX4090"
    assert accelerators.accelerator_of("TPU v5 lite").name == "TPUv5e"
    assert accelerators.accelerator_of("TPU v5").name == "TPUv5p"  # what JAX calls it
    assert accelerators.accelerator_of("cpu") is None
    assert accelerators.get_accelerator("tpu-v5p").memory == 95
    with pytest.raises(ConfigError):
        plan.parse_options(["plan", "--devices=many"])


@pytest.mark.slow
def test_the_command_plans_for_devices_that_are_not_there(tmp_path):
    """In a process of its own, with its own virtual devices; prints JSON and tells by its exit status."""
    command = [sys.executable, "-m", "z1_jax.plan", "--config=configs/sft.py:smoke", "--config.mesh.fsdp=4"]
    command += ["--devices=4", "--json", "--compile=no"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    for memory, code in (("40", 0), ("0.001", 1)):
        done = subprocess.run([*command, f"--memory={memory}"], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["devices"] == 4
