"""Demonstrations: which labels an episode gets, and that collecting in processes changes nothing."""

import itertools

import numpy as np
import pytest

from envs.base import LABELS, Episode
from envs.kitchen import make
from envs.kitchen.demos import collect, disturb, run_episode
from envs.kitchen.experts import make_expert


@pytest.fixture
def seed(rng) -> int:
    return int(rng.integers(2**31))


def test_recorded_labels_are_the_clean_experts_at_the_states_that_followed(seed):
    env = make("OpenDrawer", image_size=8)
    episode = run_episode(env, seed, noise=0.2, stride=4, chunk=8, labels="recorded")
    assert episode.noise in (0.0, 0.2, 0.4)
    count = len(episode.step)
    assert count == -(-episode.control_steps // 4)
    assert episode.actions.shape == (count, 8, 12) and episode.state.shape == (count, 16)
    assert all(images.shape == (count, 8, 8, 3) for images in episode.images.values())
    np.testing.assert_array_equal(episode.step, 4 * np.arange(count))
    # Overlapping chunks tell the same story: the second half of one is the first half of the next.
    np.testing.assert_array_equal(episode.actions[:-1, 4:], episode.actions[1:, :4])
    env.reset(Episode(seed))
    np.testing.assert_array_equal(episode.actions[0, 0], make_expert(env).act())
    np.testing.assert_array_equal(episode.state[0], env.observe().state)
    last = episode.actions[-1, (episode.control_steps - 1) % 4]
    np.testing.assert_array_equal(episode.actions[-1, -1], last)


def test_undisturbed_labels_are_what_the_expert_does_from_the_visited_states(seed):
    env = make("OpenDrawer", image_size=8)
    episode = run_episode(env, seed, noise=0.2, stride=4, chunk=8, labels="undisturbed")
    recorded = run_episode(env, seed, noise=0.2, stride=4, chunk=8, labels="recorded")
    np.testing.assert_array_equal(episode.state, recorded.state)  # branches leave no trace in the episode
    np.testing.assert_array_equal(episode.actions[:, 0], recorded.actions[:, 0])
    assert (episode.noise == 0) == np.array_equal(episode.actions, recorded.actions)
    expert = make_expert(env)
    for step, state, labels in zip(episode.step, episode.state, episode.actions, strict=True):
        _, noise = disturb(seed, 0.2)  # the episode once more, up to this observation; then nothing disturbs
        env.reset(Episode(seed))
        for _ in range(step):
            assert not env.step_chunk((expert.act() + next(noise))[None]).done
        np.testing.assert_array_equal(state, env.observe().state)
        done = False
        for i, label in enumerate(labels):
            action = labels[i - 1] if done else expert.act()  # after the end the last one is repeated
            np.testing.assert_array_equal(label, action)
            done = done or env.step_chunk(action[None]).done


@pytest.mark.parametrize("labels", LABELS)
def test_without_noise_labels_are_what_was_executed(seed, labels):
    env = make("TurnOnSinkFaucet", image_size=8)
    episode = run_episode(env, seed, noise=0.0, labels=labels)
    env.reset(Episode(seed))
    executed = np.concatenate(episode.actions[::2])[: episode.control_steps]
    assert env.step_chunk(executed).success == episode.success


def test_unknown_labels_are_refused(seed):
    with pytest.raises(ValueError, match="labels must be one of recorded, undisturbed; got 'clean'"):
        run_episode(make("OpenDrawer", image_size=8), seed, labels="clean")


def test_collect_keeps_the_order_of_seeds_and_equals_one_process(seed):
    seeds = [seed + i for i in (3, 0, 5, 1)]
    options = {"image_size": 8}
    alone = list(collect("TurnOnStove", seeds, processes=0, options=options))
    shared = list(collect("TurnOnStove", seeds, processes=2, options=options))
    assert [episode.seed for episode in shared] == seeds
    for one, two in zip(alone, shared, strict=True):
        assert (one.success, one.control_steps, one.noise) == (two.success, two.control_steps, two.noise)
        np.testing.assert_array_equal(one.actions, two.actions)
        np.testing.assert_array_equal(one.state, two.state)


def test_collect_of_an_endless_stream_stops_when_asked(seed):
    stream = collect("TurnOnStove", itertools.count(seed), processes=2, options={"image_size": 8})
    assert next(stream).seed == seed
    stream.close()
