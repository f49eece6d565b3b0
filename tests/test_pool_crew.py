"""Workers that fail, are late or stop, and several open calls, against environments stepped one by one."""

import functools
import os
import signal
import time

import numpy as np
import pytest
import tiny_env
from seeds import fresh_seed
from tiny_env import FragileEnv, TinyEnv

from envs import pool_crew, pool_workers
from envs.base import Episode, episodes
from envs.pool import EnvPool, PoolError, SlotsLost


def alone(seed: int, chunks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The physics of an episode after some chunks, and what was seen last."""
    env = TinyEnv()
    env.reset(Episode(seed))
    for chunk in chunks:
        env.step_chunk(chunk)
    return env.snapshot().physics, env.observe().images["eye"]


def chunks_of(seed: int, count: int, slots: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, slots, 4, 3))


@pytest.mark.parametrize("fault", ["die", "hang", "raise", "value"])
def test_a_state_that_always_fails_costs_its_slot_alone(fault, tmp_path):
    """Slots 1 and 3 fail at their second chunk; 0, 2 and the rest of a worker's slots do what they would alone."""
    base = fresh_seed(__name__, "always_fails") // 8 * 8
    actions = chunks_of(base, 3, 6)
    with EnvPool(functools.partial(FragileEnv, fault, str(tmp_path)), 6, 2, timeout_s=0.5) as pool:
        pool.reset(range(6), episodes(range(base, base + 6)))
        pool.step(range(6), actions[0])
        with pytest.raises(SlotsLost) as caught:
            pool.step(range(6), actions[1])
        assert sorted(caught.value.lost) == [1, 3, 5]
        assert [answer is None for answer in caught.value.answers] == [False, True] * 3
        assert ("3 times" in caught.value.lost[3]) == (fault != "value")
        results, seen = pool.step([0, 2, 4], actions[2, ::2])
        for i, slot in enumerate([0, 2, 4]):
            physics, image = alone(base + slot, list(actions[:, slot]))
            np.testing.assert_array_equal(pool.snapshot([slot])[0].physics, physics)
            assert results[i].done and seen[i] is None
        for slot in (1, 3, 5):  # as they were before
            np.testing.assert_array_equal(
                pool.snapshot([slot])[0].physics, alone(base + slot, list(actions[:1, slot]))[0]
            )


def test_two_failures_of_a_state_cost_nothing(tmp_path):
    base = fresh_seed(__name__, "two_failures") // 8 * 8
    actions = chunks_of(base, 2, 4)
    with EnvPool(functools.partial(FragileEnv, "die", str(tmp_path), 2), 4, 2) as pool:
        pool.reset(range(4), episodes(range(base, base + 4)))
        for chunk in actions:
            _, seen = pool.step(range(4), chunk)
        for slot in range(4):
            physics, image = alone(base + slot, list(actions[:, slot]))
            np.testing.assert_array_equal(pool.snapshot([slot])[0].physics, physics)
            np.testing.assert_array_equal(seen[slot].images["eye"], image)
        assert pool.replaced == 2


def test_a_state_that_cannot_be_reached_again_is_lost_until_the_slot_begins_anew(tmp_path):
    base = fresh_seed(__name__, "reached_again") // 8 * 8
    actions = chunks_of(base, 2, 4)
    with EnvPool(functools.partial(FragileEnv, "die", str(tmp_path), again=True), 4, 2, timeout_s=5.0) as pool:
        pool.reset([0, 2, 3], episodes([base, base + 2, base + 3]))
        pool._crew.workers[1].kill()
        with pytest.raises(SlotsLost, match="3 times on slot 3 while replaying the episode so far: the process died"):
            pool.step([0, 2, 3], actions[0, :3])
        with pytest.raises(SlotsLost, match="replaying"):
            pool.step([2, 3], actions[1, :2])
        np.testing.assert_array_equal(pool.snapshot([2])[0].physics, alone(base + 2, [actions[0, 1], actions[1, 0]])[0])
        with pytest.raises(SlotsLost, match="replaying"):
            pool.branch([0, 3], [1, 2])
        np.testing.assert_array_equal(pool.snapshot([1])[0].physics, pool.snapshot([0])[0].physics)
        pool.reset([3], episodes([base]))
        pool.step([3], actions[1, :1])
        np.testing.assert_array_equal(pool.snapshot([3])[0].physics, alone(base, [actions[1, 0]])[0])


def test_a_worker_that_dies_while_it_is_built_is_started_again(tmp_path):
    with EnvPool(functools.partial(tiny_env.die_once, str(tmp_path / "once")), 2, 2) as pool:
        pool.reset([0, 1], episodes([1, 2]))
    with pytest.raises(PoolError, match="failed 3 times on slot 0 while building the environment: the process died"):
        EnvPool(functools.partial(os._exit, 3), 1, 1)


def test_a_worker_that_stops_while_it_is_built_is_started_again_in_time(tmp_path):
    began = time.monotonic()
    with EnvPool(functools.partial(tiny_env.stopped, str(tmp_path), 1), 1, 1, start_timeout_s=4.0) as pool:
        pool.reset([0], episodes([1]))
    assert 4.0 < time.monotonic() - began < 20.0
    began = time.monotonic()
    with pytest.raises(PoolError, match="3 times on slot 0 while building the environment: no answer within 1 s"):
        EnvPool(functools.partial(tiny_env.stopped, str(tmp_path), 99), 1, 1, start_timeout_s=1.0)
    assert time.monotonic() - began < 10.0


def second_stops(folder: str) -> TinyEnv:
    """Of all builds of an environment the second one stops."""
    if FragileEnv("", folder)._note("built") == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return TinyEnv()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_stops_is_noticed_by_what_another_one_took(workers, monkeypatch, tmp_path):
    """That of a replacement, and one of two at the start: not after `start_timeout_s`."""
    monkeypatch.setattr(pool_workers, "LEAST_BUILD_S", 0.5)
    began = time.monotonic()
    with EnvPool(functools.partial(second_stops, str(tmp_path)), workers, workers, start_timeout_s=300.0) as pool:
        pool.reset(range(workers), episodes(range(workers)))
        pool._crew.workers[0].kill()
        _, seen = pool.step(range(workers), np.zeros((workers, 4, 3)))
        np.testing.assert_array_equal(seen[0].images["eye"], alone(0, [np.zeros((4, 3))])[1])
    assert time.monotonic() - began < 150.0


class SlowStart(TinyEnv):
    """A reset takes a second, a chunk nothing, but for one that hangs."""

    def reset(self, episode):
        time.sleep(1.0)
        super().reset(episode)


def test_deadlines_follow_what_was_measured(monkeypatch, tmp_path):
    """A hang is noticed long before `timeout_s`, and a reset may take far longer than a chunk."""
    monkeypatch.setattr(pool_crew, "LEAST_S", 0.5)
    with EnvPool(functools.partial(SlowStart, "hang", str(tmp_path / "once")), 1, 1, timeout_s=60.0) as pool:
        pool.reset([0], episodes([1]))
        pool.step([0], np.zeros((1, 4, 3)))
        pool.reset([0], episodes([2]))
        assert pool.replaced == 0
        pool.step([0], np.zeros((1, 4, 3)))
        began = time.monotonic()
        pool.step([0], np.zeros((1, 4, 3)))
        assert pool.replaced == 1 and time.monotonic() - began < 30.0


def run_in_halves(pool: EnvPool, base: int, actions: np.ndarray, between=lambda chunk: None) -> list[np.ndarray]:
    """Two halves of eight slots whose chunks lie at the workers at once; what was seen, in order."""
    halves = [list(range(4)), list(range(4, 8))]
    calls = [pool.begin_reset(half, episodes(range(base + half[0], base + half[0] + 4))) for half in halves]
    seen = []
    for chunk in actions:
        for number, half in enumerate(halves):
            answers = pool.finish(calls[number])
            seen += [answer[1] if isinstance(answer, tuple) else answer for answer in answers]
            calls[number] = pool.begin_step(half, chunk[half])
        between(chunk)
    for call in calls:
        seen += [observation for _, observation in pool.finish(call)]
    return [one.images["eye"] for one in seen if one is not None]


class Unending(TinyEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        return type(result)(result.steps, False, self._t >= tiny_env.HORIZON)


def expected(base: int, actions: np.ndarray) -> list[np.ndarray]:
    return [
        alone(base + slot, list(actions[:count, slot]))[1]
        for count in range(len(actions) + 1)
        for half in (range(4), range(4, 8))
        for slot in half
        if count < 3  # an episode of three chunks shows no end
    ]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_open_calls_give_what_single_environments_do(workers):
    base = fresh_seed(__name__, "open_calls") % 10**6
    actions = chunks_of(base, 3, 8)
    with EnvPool(Unending, 8, workers) as pool:
        seen = run_in_halves(pool, base, actions)
        assert len(seen) == 24
        np.testing.assert_array_equal(seen, expected(base, actions))
        assert set(pool.take_times()) == {"simulate", "render", "wait", "hidden", "busy"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_fails_with_two_open_calls_loses_neither(how):
    base = fresh_seed(__name__, "two_open") % 10**6
    rng = np.random.default_rng(base)
    actions = chunks_of(base, 3, 8)

    def fail(chunk):
        pool._crew.workers[int(rng.integers(2))]._process.send_signal(how)

    with EnvPool(Unending, 8, 2, timeout_s=1.0) as pool:
        seen = run_in_halves(pool, base, actions, fail)
        assert 1 <= pool.replaced <= 6
        np.testing.assert_array_equal(seen, expected(base, actions))


def test_a_call_given_up_leaves_no_trace_and_the_other_half_goes_on():
    base = fresh_seed(__name__, "given_up") % 10**6
    actions = chunks_of(base, 2, 4)
    with EnvPool(TinyEnv, 4, 2) as pool:
        pool.reset(range(4), episodes(range(base, base + 4)))
        given_up = pool.begin_step([0, 1], actions[0, :2])
        kept = pool.begin_step([2, 3], actions[0, 2:])
        pool.step([0], actions[1, :1])
        pool.finish(kept)
        with pytest.raises(ValueError, match="given up"):
            pool.finish(given_up)
        chunks = [[actions[1, 0]], [], [actions[0, 2]], [actions[0, 3]]]
        for slot in range(4):
            np.testing.assert_array_equal(pool.snapshot([slot])[0].physics, alone(base + slot, chunks[slot])[0])


def test_large_messages_to_busy_workers_do_not_stand_still():
    """More than a pipe holds goes each way while the other half's chunk is simulated."""
    base = fresh_seed(__name__, "large") % 10**6
    with EnvPool(TinyEnv, 2, 1, timeout_s=20.0) as pool:
        pool.reset([0, 1], episodes([base, base + 1]))
        chunk = np.zeros((1, 40_000, 3))
        began = time.monotonic()
        calls = [pool.begin_step([slot], chunk) for slot in (0, 1)]
        for call in calls:
            assert pool.finish(call)[0][0].done
        assert time.monotonic() - began < 10.0 and pool.replaced == 0


class Gated(TinyEnv):
    """Chunks of episodes with odd seeds wait until a file is there."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self._gate = gate

    def reset(self, episode):
        self._waits = episode.seed % 2
        super().reset(episode)

    def step_chunk(self, actions):
        while self._waits and not os.path.exists(self._gate):
            time.sleep(0.05)
        return super().step_chunk(actions)


@pytest.mark.parametrize("killed", [None, 0, 1])
def test_the_call_that_is_ready_comes_first_and_holds_what_single_environments_show(killed, tmp_path):
    base = fresh_seed(__name__, "ready") // 2 % 10**6 * 2
    actions = chunks_of(base, 2, 4)
    with EnvPool(functools.partial(Gated, str(tmp_path / "gate")), 4, 2) as pool:
        pool.reset(range(4), episodes(range(base, base + 4)))
        calls = {pool.begin_step([w, w + 2], actions[0, [w, w + 2]]): (w, 0) for w in (1, 0)}
        order, seen = [], {}
        while calls:
            call = pool.ready(list(calls))
            worker, chunk = calls.pop(call)
            order.append(worker)
            if order == [0, 0]:
                (tmp_path / "gate").touch()
            seen[worker, chunk] = [observation.images["eye"] for _, observation in pool.finish(call)]
            if worker == killed and not chunk:
                pool._crew.workers[worker].kill()
            if not chunk:
                calls[pool.begin_step([worker, worker + 2], actions[1, [worker, worker + 2]])] = (worker, 1)
        assert order == [0, 0, 1, 1]
        assert pool.replaced == (killed is not None)
        for (worker, chunk), images in seen.items():
            for slot, image in zip((worker, worker + 2), images, strict=True):
                np.testing.assert_array_equal(image, alone(base + slot, list(actions[: chunk + 1, slot]))[1])
        with pytest.raises(ValueError, match="finished before"):
            pool.ready([call])
        with pytest.raises(ValueError, match="no calls"):
            pool.ready([])
