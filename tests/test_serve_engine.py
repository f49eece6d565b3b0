"""Batched decisions against the policy acting alone, and real-time chunking against a loop over the model itself."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy
from flax import nnx

from envs.base import EnvObservation, Episode
from z1_jax.api import ActingPolicy
from z1_jax.data.relative import RelativeActions
from z1_jax.rl import real_time
from z1_jax.serve.engine import Engine


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_policy.policy(), 4, span_factor=math.inf)


@pytest.fixture(scope="module")
def looks():
    env = tiny_policy.make_env()
    found = []
    for episode in range(5):
        env.reset(Episode(episode))
        found.append(env.observe())
    return found


def test_an_answer_is_what_the_policy_does(engine, looks):
    alone = ActingPolicy(tiny_policy.policy())
    answers = engine.decide([engine.prepare(look, (2, seed, 3)) for seed, look in enumerate(looks[:3])])
    for seed, (look, answer) in enumerate(zip(looks, answers, strict=False)):
        assert answer.actions.shape == (8, 12) and answer.actions.dtype == np.float32 and not answer.fault
        np.testing.assert_allclose(answer.actions, alone.act(look, seed=seed, chunk=3, noise_seed=2), atol=1e-4)
    (short,) = engine.decide([engine.prepare(looks[0], (9,))])
    np.testing.assert_allclose(short.actions, alone.act(looks[0], noise_seed=9), atol=1e-4)


def test_answers_repeat_to_the_bit(engine, looks):
    """Of one size of batch, whatever else is in it; batches of one are the policy acting alone."""
    alone, one = ActingPolicy(tiny_policy.policy()), Engine(tiny_policy.policy(), 1, span_factor=math.inf)
    requests = [engine.prepare(look, (0, seed)) for seed, look in enumerate(looks[:4])]
    together = [answer.actions for answer in engine.decide(requests)]
    turned = [answer.actions for answer in engine.decide(requests[::-1])][::-1]
    crowded = [answer.actions for answer in engine.decide([requests[0], requests[0], requests[2]])]  # padded to four
    np.testing.assert_array_equal(together, turned)
    np.testing.assert_array_equal(crowded, [together[i] for i in (0, 0, 2)])
    for seed, request in enumerate(requests):
        np.testing.assert_array_equal(one.decide([request])[0].actions, alone.act(looks[seed], seed=seed))


def test_a_mixed_batch_answers_each_as_if_alone(engine, looks, rng):
    left = rng.uniform(-1, 1, (5, 12))
    requests = [
        engine.prepare(looks[0], (1,)),
        engine.prepare(looks[1], (2,), left, 2),
        engine.prepare(looks[2], (3,), left[:1], 0),
    ]
    together = engine.decide(requests)
    for request, answer in zip(requests, together, strict=True):
        np.testing.assert_allclose(answer.actions, engine.decide([request])[0].actions, atol=1e-4)


def test_relative_actions_are_answered_and_taken_in_the_environments_units(looks):
    """Of a policy whose first three actions are offsets from the state; what is left is told in the same units."""
    policy = tiny_policy.policy()
    processor = dataclasses.replace(policy.processor, relative=RelativeActions((True,) * 3), clip=None)
    relative = dataclasses.replace(policy, processor=processor)
    engine = Engine(relative, 1, span_factor=math.inf)
    absolute = Engine(
        dataclasses.replace(policy, processor=dataclasses.replace(processor, relative=None)), 1, span_factor=math.inf
    )
    look, noise = looks[0], (0,)
    offset = np.pad(look.state[:3].astype(np.float64), (0, 9))
    (answer,) = engine.decide([engine.prepare(look, noise)])
    np.testing.assert_allclose(answer.actions, ActingPolicy(relative).act(look), atol=1e-4)
    (plain,) = absolute.decide([absolute.prepare(look, noise)])
    np.testing.assert_allclose(answer.actions, plain.actions + offset, atol=1e-4)
    left = np.full((4, 12), 0.25)
    (held,) = engine.decide([engine.prepare(look, noise, left + offset, 2)])
    (same,) = absolute.decide([absolute.prepare(look, noise, left, 2)])
    np.testing.assert_allclose(held.actions, same.actions + offset, atol=1e-4)


def test_relative_actions_are_served_as_targets(looks, rng):
    """Each answer is added to its own state, and what is left is an offset from the state of now."""
    policy = tiny_policy.policy()
    relative = RelativeActions((True, False, True, True))
    policy = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, relative=relative))
    made, alone, left = Engine(policy, 4, span_factor=math.inf), ActingPolicy(policy), rng.uniform(-1, 1, (5, 12))
    answers = made.decide([made.prepare(look, (2, seed)) for seed, look in enumerate(looks[:3])])
    for seed, (look, answer) in enumerate(zip(looks, answers, strict=False)):
        np.testing.assert_allclose(answer.actions, alone.act(look, seed=seed, noise_seed=2), atol=1e-4)
    request = made.prepare(looks[1], (2,), left, 2)
    offsets = left.copy()
    offsets[:, [0, 2, 3]] -= looks[1].state[[0, 2, 3]]
    stats = policy.processor.stats["actions"]
    expected = (offsets - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose(request.previous[:, :7], expected[:, :7], atol=1e-5)
    assert made.decide([request])[0].actions.shape == (8, 12)


def model():
    return nnx.merge(tiny_policy.policy().graphdef, tiny_policy.policy().params)


@jax.jit
def encoded(observation):
    return model().encode_prefix(observation)


@jax.jit
def velocity(cache, x, t):
    return model().velocity(cache, x[None, None], jnp.full((1, 1), t))[0, 0]


@jax.jit
def jacobian_of_data(cache, x, t):
    """[H, A, H, A]"""
    return jax.jacrev(lambda x: x - t * velocity(cache, x, t))(x)


def by_hand(look, noise, left, delay, overwrite=False):
    """Four Euler steps over the model, with the whole Jacobian where the engine takes a product with it."""
    processor = tiny_policy.processor()
    cache = encoded(processor.observation([look]))
    target = np.zeros((8, 16), np.float32)
    target[: len(left)] = processor.model_actions(left)
    weights = real_time.soft_mask(8, delay, len(left))[:, None] * processor.counted_dims
    noise = np.random.default_rng(noise).standard_normal((5, 8, 16), np.float32)[0]
    x = jnp.asarray(noise)

    for t in (1.0, 0.75, 0.5, 0.25):
        if overwrite:
            x = jnp.where(weights == 1.0, t * noise + (1 - t) * target, x)
            x = x - velocity(cache, x, t) / 4
            continue
        jacobian = jacobian_of_data(cache, x, t)
        error = weights * (target - (x - t * velocity(cache, x, t)))
        weight = 5.0 if t == 1.0 else min(5.0, ((1 - t) ** 2 + t**2) / (t * (1 - t)))
        x = x - (velocity(cache, x, t) - weight * jnp.einsum("ha,haij->ij", error, jacobian)) / 4
    x = jnp.where((weights == 1.0) & overwrite, target, x)
    return processor.env_actions(np.asarray(x))


def test_real_time_chunking_is_its_equations(engine, looks, rng):
    left = rng.uniform(-1, 1, (6, 12)).astype(np.float32)
    for delay in (0, 3, 6):
        (got,) = engine.decide([engine.prepare(looks[0], (1, 2, 3, 4), left, delay)])
        np.testing.assert_allclose(got.actions, by_hand(looks[0], (1, 2, 3, 4), left, delay), atol=2e-4)


def test_guidance_brings_a_chunk_to_the_one_before_and_overwriting_makes_it_the_same(engine, looks):
    moving = tiny_policy.processor().counted_dims[:12]
    (before,) = engine.decide([engine.prepare(looks[0], (1,))])
    left = before.actions[2:]
    (free,) = engine.decide([engine.prepare(looks[1], (5,))])
    (held,) = engine.decide([engine.prepare(looks[1], (5,), left, 3)])

    def apart(answer):
        return float(np.abs(answer.actions[:3] - left[:3])[:, moving].mean())

    assert apart(held) < 0.5 * apart(free), (apart(held), apart(free))
    hard = Engine(tiny_policy.policy(), 1, span_factor=math.inf, overwrite=True)
    (same,) = hard.decide([hard.prepare(looks[1], (5,), left, 3)])
    np.testing.assert_allclose(same.actions[:3, moving], left[:3, moving], atol=1e-5)
    np.testing.assert_allclose(same.actions, by_hand(looks[1], (5, 0, 0, 0), left, 3, overwrite=True), atol=2e-4)


def test_answers_beyond_the_span_and_numbers_that_are_none_are_faults(looks):
    """The moving dimensions span −1 … 1, so that a factor f allows ±(1 + 2f)."""
    policy = tiny_policy.policy()
    shown = set()
    processor = dataclasses.replace(policy.processor, clip=None)
    unclipped = Engine(dataclasses.replace(policy, processor=processor), 1, span_factor=math.inf)
    reached = [np.abs(unclipped.decide([unclipped.prepare(look, (0,))])[0].actions).max() for look in looks]
    for factor in (0.0, 100.0, float(np.median(reached) - 1) / 2 + 1e-3):
        engine = Engine(policy, 1, span_factor=factor)
        for look, furthest in zip(looks, reached, strict=True):
            (answer,) = engine.decide([engine.prepare(look, (0,))])
            beyond = furthest > 1 + 2 * factor
            assert bool(answer.fault) == beyond
            shown.add(beyond)
            if beyond:
                assert f"more than {factor:g} spans beyond the statistics' -1 … 1" in answer.fault
    assert shown == {True, False}
    broken = Engine(dataclasses.replace(policy, params=jax.tree.map(lambda x: x * np.nan, policy.params)), 1)
    (answer,) = broken.decide([broken.prepare(looks[0], (0,))])
    assert answer.fault == "the policy's actions are not finite"


def test_what_cannot_be_decided_is_refused_alone(engine, looks):
    look = looks[0]
    for arguments, told in (
        ((EnvObservation({}, look.state, "x"), (0,)), "has no camera"),
        ((EnvObservation(look.images, look.state[:3], "x"), (0,)), "states have shape"),
        ((EnvObservation(look.images, look.state * np.nan, "x"), (0,)), "not finite"),
        ((look, ()), r"noise_seed is \[\]; expected 1 to 4 numbers"),
        ((look, (1, 2, 3, 4, 5)), "expected 1 to 4 numbers"),
        ((look, (-1,)), "each 0 or more"),
        ((look, (1 << 63,)), "each 0 or more"),
        ((look, (0,), np.zeros((9, 12))), r"previous_actions have shape \[9, 12\]; expected \[1 … 8, 12\]"),
        ((look, (0,), np.zeros((0, 12))), "expected"),
        ((look, (0,), np.zeros((4, 7))), "expected"),
        ((look, (0,), np.full((4, 12), np.inf)), "NaN or infinity"),
        ((look, (0,), np.zeros((4, 12)), 5), r"delay is 5; expected 0 … 4"),
        ((look, (0,), None, 1), "delay is 1; expected without previous_actions 0"),
        ((look, (0,), np.zeros((4, 12)), -1), "delay is -1"),
    ):
        with pytest.raises(ValueError, match=told):
            engine.prepare(*arguments)


def test_warming_up_leaves_nothing_to_compile(looks):
    engine = Engine(tiny_policy.policy(), 2, span_factor=math.inf)
    engine.warm_up()
    for count in (1, 2):
        engine.decide([engine.prepare(looks[0], (0,))] * count)
        engine.decide([engine.prepare(looks[0], (0,), np.zeros((3, 12)), 1)] * count)
    assert engine.traces == {"encode": 2, "sample": 2, "onwards": 2}
