"""Environments that break the interface, one field each, behind the real pool: one line, at once, and no trace."""

import dataclasses
import functools
import time

import numpy as np
import pytest
from seeds import fresh_seed
from tiny_env import BROKEN, HORIZON, BrokenEnv, TinyEnv

from envs import kitchen
from envs.base import Episode, episodes
from envs.contract import check_observation, check_result
from envs.pool import EnvPool, PoolError

EXPECTED = {
    "no observation": "observation: got None, expected an EnvObservation",
    "images are a list": "cameras of images: got list, expected eye",
    "missing camera": "cameras of images: got none, expected eye",
    "extra camera": "cameras of images: got eye, hand, expected eye",
    "small image": "images['eye']: got uint8 [3, 4, 3], expected uint8 [4, 4, 3]",
    "grey image": "images['eye']: got uint8 [4, 4], expected uint8 [4, 4, 3]",
    "float image": "images['eye']: got float32 [4, 4, 3], expected uint8 [4, 4, 3]",
    "NaN state": "state: got nan in dimension 1, expected finite numbers",
    "infinite state": "state: got -inf in dimension 0, expected finite numbers",
    "wide state": "state: got float32 [3], expected float32 [2]",
    "double state": "state: got float64 [2], expected float32 [2]",
    "state is a list": "state: got list, expected float32 [2]",
    "no instruction": "instruction: got None, expected a string",
    "no result": "result of a chunk: got None, expected a ChunkResult",
    "NaN steps": "steps: got nan, expected an integer from 0 to 4, the actions given",
    "negative steps": "steps: got -1, expected an integer from 0 to 4, the actions given",
    "too many steps": "steps: got 5, expected an integer from 0 to 4, the actions given",
    "too few steps": "steps: got 3 of 4 and done False, expected 4, or done True",
    "success None": "success: got None, expected True or False",
    "success 1": "success: got 1.0, expected True or False",
    "done None": "done: got None, expected True or False",
    "success that goes on": "done: got False with success True, expected True: success ends an episode",
    "NaN seconds": "simulate_s: got nan, expected seconds, 0 or more",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_output_names_slot_field_got_and_expected(workers):
    """One pool for all kinds: after each the environments are rebuilt and go on as if nothing had been asked."""
    assert EXPECTED.keys() == BROKEN.keys()
    seed = fresh_seed(__name__, "test_a_broken_output_names_slot_field_got_and_expected")
    actions = np.random.default_rng(seed).normal(size=(2, 2, 4, 3))
    for kind, text in EXPECTED.items():
        with EnvPool(functools.partial(BrokenEnv, kind), 2, workers, timeout_s=20.0) as pool:
            pool.reset([0, 1], episodes([seed, seed + 1]))
            with pytest.raises(PoolError) as caught:
                pool.step([1], actions[0, :1])
            assert str(caught.value) == (f"worker 0 failed on slot 1 while stepping a chunk: the environment's {text}")
            assert pool.replaced == 0, "a worker was replaced for what its environment did"
            single = TinyEnv()
            single.reset(Episode(seed + 1))
            np.testing.assert_array_equal(pool.snapshot([1])[0].physics, single.snapshot().physics)


def test_the_first_observation_and_frames_are_checked_too():
    with EnvPool(functools.partial(BrokenEnv, "NaN state", 0), 1, 1) as pool:
        with pytest.raises(PoolError, match="slot 0 while resetting: the environment's state: got nan in dimension 1"):
            pool.reset([0], episodes([3]))
    with EnvPool(functools.partial(BrokenEnv, "frame"), 1, 1) as pool:
        pool.reset([0], episodes([3]))
        with pytest.raises(PoolError, match=r"while rendering: .* frame: got None, expected uint8 \[8, 8, 3\]"):
            pool.render([0], "eye", 8)
    with EnvPool(functools.partial(BrokenEnv, "snapshot"), 1, 1) as pool:
        pool.reset([0], episodes([3]))
        with pytest.raises(PoolError, match="taking a snapshot: .* snapshot: got None, expected a Snapshot"):
            pool.snapshot([0])


class EndlessEnv(TinyEnv):
    """Neither succeeds nor ends; `over` steps count beyond the horizon."""

    def __init__(self, over: int = 0):
        super().__init__()
        self._over = over

    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        over = self._over if self._t >= HORIZON else 0
        return dataclasses.replace(result, steps=result.steps + over, success=False, done=self._over > 0)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(
    ("over", "text"),
    [
        (0, "done: got False at the horizon, expected True"),
        (2, "steps: got 4, expected at most 2: the episode has no more to its horizon"),
    ],
)
def test_an_episode_ends_at_its_horizon(branched, over, text):
    """Also that of a branch, and of a worker that was replaced."""
    with EnvPool(functools.partial(EndlessEnv, over), 2, 2) as pool:
        pool.reset([0], episodes([3]))
        for _ in range(2):
            pool.step([0], np.zeros((1, 5, 3)))
        if branched:
            pool.branch([0], [1])
            pool._crew.workers[1].kill()
        with pytest.raises(PoolError, match=text):
            pool.step([int(branched)], np.zeros((1, 2 + over, 3)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"task": None}, "spec.task: got None, expected a string"),
        ({"cameras": ()}, r"spec.cameras: got \(\), expected a tuple of one or more names"),
        ({"cameras": ("eye", "eye")}, r"spec.cameras: got \('eye', 'eye'\), expected each name once"),
        ({"image_size": 4.0}, "spec.image_size: got 4.0, expected an integer of at least 1"),
        ({"state_dim": 0}, "spec.state_dim: got 0, expected an integer of at least 1"),
        ({"horizon": float("nan")}, "spec.horizon: got nan, expected an integer"),
        ({"control_hz": float("nan")}, "spec.control_hz: got nan, expected a number above 0"),
        ({"control_hz": 0}, "spec.control_hz: got 0, expected a number above 0"),
        (None, "spec: got None, expected an EnvSpec"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changes, text):
    for workers in (0, 1):
        with pytest.raises(PoolError, match=f"while building the environment: the environment's {text}"):
            EnvPool(functools.partial(of_another_spec, changes), 2, workers)


def of_another_spec(changes):
    env = TinyEnv()
    env.spec = None if changes is None else dataclasses.replace(env.spec, **changes)
    return env


def of_changing_spec(flag):
    """The second of a pool has another horizon than the first."""
    env = TinyEnv()
    try:
        open(flag, "x").close()
    except FileExistsError:
        env.spec = dataclasses.replace(env.spec, horizon=7)
    return env


def test_all_environments_of_a_pool_are_alike(tmp_path):
    text = "slot 1 while building the environment: the environment's spec.horizon: got 7, expected 12 as in the pool's"
    with pytest.raises(PoolError, match=text):
        EnvPool(functools.partial(of_changing_spec, str(tmp_path / "flag")), 2, 1)


def test_a_check_takes_microseconds():
    """Beside a chunk of the kitchen, which takes tens of milliseconds with its pictures."""
    env = kitchen.make("TurnOnSinkFaucet")
    env.reset(Episode(1))
    result, observation = env.step_chunk(np.zeros((8, env.spec.action_dim))), env.observe()
    began = time.perf_counter()
    for _ in range(1000):
        check_result(result, 8, 100)
        check_observation(observation, env.spec)
    mean_s = (time.perf_counter() - began) / 1000
    print(f"{1e6 * mean_s:.1f} µs")
    assert mean_s < 1e-3
