"""What a walk makes of its pool: halves that overlap against none, lost groups against runs without them."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest
import tiny_policy as tiny
from scripted import KEY, PROCESSOR, ScriptedActor
from seeds import fresh_seed
from tiny_env import FleetingEnv, FragileEnv

from envs.base import episodes
from envs.pool import EnvPool
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, EnvConfig, RolloutConfig
from z1_jax.rl import rollout
from z1_jax.rl.actor import Actor
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.tree import branch_plan

PLANS = {
    "none": branch_plan("none", 4, 0),
    "prefix": branch_plan("prefix", 4, 1),
    "tree": branch_plan("tree", 4, 2),
}


def collected(pool, plan, seeds, **options) -> rollout.Rollouts:
    return rollout.collect(pool, ScriptedActor(), (), PROCESSOR, plan, episodes(seeds), KEY, executed=4, **options)


def assert_same(one: rollout.Rollouts, other: rollout.Rollouts) -> None:
    assert one.episodes == other.episodes and one.first == other.first
    for name in ("success", "unstable", "chunks", "steps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for field in dataclasses.fields(one.nodes):
        np.testing.assert_array_equal(getattr(one.nodes, field.name), getattr(other.nodes, field.name))
    jax.tree.map(np.testing.assert_array_equal, one.looks, other.looks)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("slots", [4, 12, 18])
def test_halves_that_overlap_change_nothing(name, slots):
    """Of one group, of an uneven number, and of more groups than slots: node by node, in the same order."""
    base = fresh_seed(__name__, "halves", name, slots) % 10**8
    seeds = range(base, base + 5)
    outs = []
    for workers, overlap in ((0, False), (2, True), (3, True)):
        with EnvPool(FleetingEnv, slots, workers) as pool:
            outs.append(collected(pool, PLANS[name], seeds, overlap=overlap))
    assert_same(outs[0], outs[1])
    assert_same(outs[0], outs[2])
    assert outs[0].seconds["hidden"] == 0.0


def test_a_real_policy_draws_the_same_in_halves_where_its_batches_are_of_one_size():
    """Both schedules then run the same compiled functions; also the prefix caches lie in the same order."""
    seed = fresh_seed(__name__, "real policy") % 10**8
    actor, params = tiny.acting()
    alike: Actor = object.__new__(Actor)
    alike.__dict__.update({**actor.__dict__, "_sizes": [16]})
    stores = PrefixStore(), PrefixStore()
    outs = [
        rollout.collect(
            pool,
            alike,
            params,
            tiny.processor(),
            PLANS["tree"],
            episodes(range(seed, seed + 4)),
            (seed,),
            executed=8,
            store=store,
            overlap=overlap,
        )
        for pool, store, overlap in ((tiny.pool(16), stores[0], False), (tiny.pool(16), stores[1], True))
    ]
    assert_same(*outs)
    rows = np.arange(stores[0].rows)
    assert len(rows) == len(outs[0].looks.tokens) == stores[1].rows
    jax.tree.map(np.testing.assert_array_equal, stores[0].take(rows), stores[1].take(rows))


class Slow(FragileEnv):
    """A chunk takes a twentieth of a second, and an episode three."""

    def step_chunk(self, actions):

        time.sleep(0.05)
        return super().step_chunk(actions)


class SlowActor(ScriptedActor):
    """A decision takes as long as two of `Slow`'s chunks, and no core."""

    def sample(self, *args):

        time.sleep(0.1)
        return super().sample(*args)


def test_the_halves_do_overlap(tmp_path):
    """Simulation is hidden behind decisions, and is not counted as waiting."""
    base = fresh_seed(__name__, "do overlap") % 10**8
    seconds = []
    for overlap in (False, True):
        with EnvPool(functools.partial(Slow, "", str(tmp_path), 0), 8, 2) as pool:
            how = {"executed": 4, "overlap": overlap}
            out = rollout.collect(
                pool, SlowActor(), (), PROCESSOR, PLANS["none"], episodes((base, base + 1)), KEY, **how
            )
            seconds.append(out.seconds)
    apart, together = seconds
    assert apart["hidden"] == 0.0
    assert together["hidden"] > 0.5 * (together["simulate"] + together["hidden"])
    assert together["simulate"] < 0.6 * apart["simulate"]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("workers", "overlap", "fault"), [(0, False, "value"), (2, True, "value"), (2, True, "die")])
def test_a_lost_group_is_missing_whole_and_the_others_are_as_without_it(name, workers, overlap, fault, tmp_path):
    base = fresh_seed(__name__, "lost", name, fault) // 2 * 2 % 10**8
    seeds = [base, base + 2, base + 1, base + 4, base + 6]
    with EnvPool(functools.partial(FragileEnv, "", str(tmp_path), 0), 12, 0) as pool:
        expected = collected(pool, PLANS[name], seeds[:2] + seeds[3:])
    with EnvPool(functools.partial(FragileEnv, fault, str(tmp_path)), 12, workers) as pool:
        out = collected(pool, PLANS[name], seeds, overlap=overlap)
    assert list(out.lost) == [2] and "while stepping a chunk" in out.lost[2] and out.drawn == 5
    assert out.first == 4 and out.episodes == expected.episodes
    for attribute in ("success", "unstable", "chunks", "steps"):
        np.testing.assert_array_equal(getattr(out, attribute), getattr(expected, attribute))

    def chunks(found: rollout.Rollouts) -> dict:
        nodes, tokens = found.nodes, found.looks.tokens
        keys = zip(nodes.group.tolist(), nodes.chunk.tolist(), nodes.leader.tolist(), strict=True)
        return {
            key: (nodes.size[i], nodes.steps[i], nodes.x[i].tobytes(), tokens[nodes.look[i]].tobytes())
            for i, key in enumerate(keys)
        }

    assert chunks(out) == chunks(expected)


def test_a_group_of_which_nobody_can_begin_is_lost(tmp_path):
    class Unable(FragileEnv):
        def reset(self, episode):
            super().reset(episode)
            if self._odd:
                raise ValueError("no place for it")

    with EnvPool(functools.partial(Unable, "", str(tmp_path), 0), 12, 0) as pool:
        out = collected(pool, PLANS["tree"], [2, 3, 4], overlap=True)
        assert list(out.lost) == [1] and [episode.seed for episode in out.episodes] == [2, 4]
        with pytest.raises(rollout.TooManyLost, match="each of 2 groups was lost: worker 0 failed on slot .*no place"):
            collected(pool, PLANS["tree"], [5, 7])


def test_groups_that_are_drawn_again_follow_from_the_lost_ones_too(tmp_path):
    """A lost group has no success, and is none of the first that count as training success."""
    with EnvPool(functools.partial(FragileEnv, "value", str(tmp_path)), 12, 0) as pool:
        told = []

        def again(outcome):
            told.append(outcome)
            return episodes([8]) if len(outcome.episodes) == 3 else []

        out = collected(pool, PLANS["none"], [2, 3, 4], again=again)
    assert [list(outcome.lost) for outcome in told] == [[1], [1]]
    assert [episode.seed for episode in out.episodes] == [2, 4, 8] and out.first == 2 and out.drawn == 4


@pytest.mark.parametrize(
    ("before", "text"),
    [((2, 95), "3 of 101 groups were lost"), ((2, 294), None), ((0, 0), None), ((3, 294), "4 of 300 groups")],
)
def test_more_than_a_hundredth_of_all_groups_ends_the_run(before, text, tmp_path):
    """But two never do."""
    with EnvPool(functools.partial(FragileEnv, "value", str(tmp_path)), 24, 0) as pool:
        seeds = [2, 4, 5, 6, 8, 10]
        if text is None:
            assert len(collected(pool, PLANS["none"], seeds, before=before).lost) == 1
        else:
            with pytest.raises(rollout.TooManyLost, match=f"{text}.*1%.*ValueError: a bad request"):
                collected(pool, PLANS["none"], seeds, before=before)


def test_workers_killed_at_random_move_nothing():
    """Ten kills over a walk in halves, at moments of their own."""
    base = fresh_seed(__name__, "killed at random") % 10**8
    rng = np.random.default_rng(base)
    seeds = range(base, base + 8)
    with EnvPool(FleetingEnv, 16, 0) as pool:
        expected = collected(pool, PLANS["tree"], seeds)
    with EnvPool(FleetingEnv, 16, 2) as pool:
        finish, left = pool.finish, [10]

        def kill_and_finish(call):
            if left[0] and rng.random() < 0.6:
                left[0] -= 1
                pool._crew.workers[int(rng.integers(2))].kill()
            return finish(call)

        pool.finish = kill_and_finish
        out = collected(pool, PLANS["tree"], seeds, overlap=True)
        assert pool.replaced >= 1 and not out.lost
    assert_same(out, expected)


def test_an_overlap_that_cannot_be_is_refused():
    check(Config(rollout=RolloutConfig(overlap=True)))
    with pytest.raises(ConfigError, match="rollout.overlap: got true with env.workers=0"):
        check(Config(rollout=RolloutConfig(overlap=True), env=EnvConfig(workers=0)))
