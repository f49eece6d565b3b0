"""The pool against the same environments stepped one by one in this process, with and without injected faults."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tiny_env
from seeds import fresh_seed
from tiny_env import TinyEnv

from envs import kitchen
from envs.base import EnvObservation, Episode, episodes
from envs.pool import EnvPool, PoolError, SlotsLost
from envs.pool_workers import Processes


def make_kitchen():
    return functools.partial(kitchen.make, "TurnOnSinkFaucet")


def assert_same_observation(one: EnvObservation | None, other: EnvObservation | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        np.testing.assert_array_equal(one.state, other.state)
        assert one.instruction == other.instruction and one.images.keys() == other.images.keys()
        for name in one.images:
            np.testing.assert_array_equal(one.images[name], other.images[name])


def random_chunks(seed: int, chunks: int, slots: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(chunks, slots, 4, width))


def branched_run(pool: EnvPool, seed: int) -> list:
    """Four episodes from two prefixes: every result, in order."""
    actions = random_chunks(seed, 4, 4, pool.spec.action_dim)
    record = list(pool.reset([0, 3], episodes([seed, seed + 1])))
    for chunk in range(2):
        results, observations = pool.step([3, 0], actions[chunk, :2])
        record += [(r.steps, r.success, r.done) for r in results] + observations
        if chunk == 0:
            pool.branch([0, 3], [1, 2])
    for chunk in (2, 3):
        results, observations = pool.step([2, 1], actions[chunk, 2:])
        record += [(r.steps, r.success, r.done) for r in results] + observations
    return record + [s.physics for s in pool.snapshot([0, 1, 2, 3])]


def assert_same_record(one: list, other: list) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif isinstance(a, tuple):
            assert a == b
        else:
            assert_same_observation(a, b)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_as_single_environments_do(num_workers):
    seed = fresh_seed(__name__, "test_steps_as_single_environments_do")
    singles = [TinyEnv() for _ in range(3)]
    with EnvPool(TinyEnv, 3, num_workers) as pool:
        assert pool.spec == singles[0].spec
        first = pool.reset([2, 0, 1], episodes([seed + 2, seed, seed + 1]))
        for slot, single in enumerate(singles):
            single.reset(Episode(seed + slot))
        for slot, observation in zip([2, 0, 1], first, strict=True):
            assert_same_observation(observation, singles[slot].observe())
        for actions in random_chunks(seed, 3, 2, 3):  # slot 1 rests
            results, observations = pool.step([2, 0], actions)
            for i, slot in enumerate([2, 0]):
                expected = singles[slot].step_chunk(actions[i])
                assert (results[i].steps, results[i].success, results[i].done) == (
                    expected.steps,
                    expected.success,
                    expected.done,
                )
                assert_same_observation(observations[i], None if expected.done else singles[slot].observe())
        frame = pool.render([1], "eye", 5)[0]
        np.testing.assert_array_equal(frame, singles[1].render("eye", 5))


@pytest.mark.parametrize("make", [lambda: TinyEnv, make_kitchen], ids=["tiny", "kitchen"])
def test_branches_replay_their_source_bit_for_bit(make):
    seed = fresh_seed(__name__, "test_branches_replay_their_source_bit_for_bit")
    with EnvPool(make(), 5, 2) as pool:
        actions = random_chunks(seed, 2, 1, pool.spec.action_dim) * 0.3
        pool.reset([0, 1, 2, 3, 4], episodes(range(seed, seed + 5)))
        pool.step([1], actions[0])
        pool.branch([1, 1, 1], [4, 2, 1])  # across workers, within one, and onto itself
        results, observations = pool.step([1, 2, 4], np.repeat(actions[1], 3, axis=0))
        assert len({(r.steps, r.success, r.done) for r in results}) == 1
        for other in observations[1:]:
            assert_same_observation(observations[0], other)
        snapshots = pool.snapshot([1, 2, 4, 3])
        np.testing.assert_array_equal(snapshots[0].physics, snapshots[1].physics)
        np.testing.assert_array_equal(snapshots[0].physics, snapshots[2].physics)
        assert not np.array_equal(snapshots[0].physics, snapshots[3].physics)
        pool.restore([3], [snapshots[0]])
        np.testing.assert_array_equal(pool.snapshot([3])[0].physics, snapshots[0].physics)


def test_kitchen_gives_the_same_in_workers_and_in_process():
    make, seed = make_kitchen(), fresh_seed(__name__, "test_kitchen_gives_the_same_in_workers_and_in_process")
    print("seed", seed)
    records = []
    for num_workers in (0, 2):
        with EnvPool(make, 4, num_workers) as pool:
            records.append(branched_run(pool, seed))
    assert_same_record(*records)


def test_a_swap_uses_the_states_before_the_call():
    with EnvPool(TinyEnv, 2, 2) as pool:
        pool.reset([0, 1], episodes([5, 6]))
        before = pool.snapshot([0, 1])
        pool.branch([0, 1], [1, 0])
        after = pool.snapshot([0, 1])
    np.testing.assert_array_equal(after[0].physics, before[1].physics)
    np.testing.assert_array_equal(after[1].physics, before[0].physics)


@pytest.mark.parametrize(
    ("fault", "num_workers"), [("raise", 0), ("raise", 2), ("die", 2), ("hang", 2)], ids=lambda value: str(value)
)
def test_results_after_a_fault_are_those_without(tmp_path, fault, num_workers):
    seed = fresh_seed(__name__, "test_results_after_a_fault_are_those_without")
    with EnvPool(TinyEnv, 4, num_workers) as pool:
        expected = branched_run(pool, seed)
    faulty = functools.partial(TinyEnv, fault, str(tmp_path / "once"))
    with EnvPool(faulty, 4, num_workers, timeout_s=1.0) as pool:
        got = branched_run(pool, seed)
        assert pool.replaced == 1
    assert (tmp_path / "once").exists()
    assert_same_record(got, expected)


@pytest.mark.parametrize("make", [lambda: TinyEnv, make_kitchen], ids=["tiny", "kitchen"])
def test_a_worker_killed_between_calls_is_replaced(make):
    seed = fresh_seed(__name__, "test_a_worker_killed_between_calls_is_replaced")
    states = []
    for victim in (None, seed % 2):
        with EnvPool(make(), 3, 2) as pool:
            actions = random_chunks(seed, 3, 3, pool.spec.action_dim) * 0.3
            pool.reset([0, 1, 2], episodes(range(seed, seed + 3)))
            pool.step([0, 1, 2], actions[0])
            pool.branch([0], [1])
            pool.step([0, 1, 2], actions[1])
            if victim is not None:
                process = pool._crew.workers[victim]._process
                process.kill()
                process.wait()
            observations = pool.step([0, 1, 2], actions[2])[1]
            states.append(observations + [snapshot.physics for snapshot in pool.snapshot([0, 1, 2])])
            assert pool.replaced == (victim is not None)
    assert_same_record(*states)


def test_a_stopped_worker_that_reads_no_more_is_replaced():
    """Also where the message to it is larger than what the system keeps for it."""
    with EnvPool(TinyEnv, 2, 2, timeout_s=0.5) as pool:
        pool.reset([0, 1], episodes([3, 4]))
        snapshots = pool.snapshot([0, 1])
        ballast = np.zeros(5_000_000, np.uint8)
        heavy = [dataclasses.replace(s, extra={**s.extra, "ballast": ballast}) for s in snapshots]
        pool._crew.workers[1]._process.send_signal(signal.SIGSTOP)
        pool.restore([0, 1], heavy)
        assert pool.replaced == 1
        for one, other in zip(pool.snapshot([0, 1]), snapshots, strict=True):
            np.testing.assert_array_equal(one.physics, other.physics)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a chosen moment, without ending the test run should it escape."""


@pytest.mark.parametrize("when", ["before the answers", "between two answers"])
def test_an_interrupted_call_leaves_no_trace(monkeypatch, when):
    actions = random_chunks(11, 2, 2, 3)
    wait = Processes.wait

    def interrupt(self, members, timeout_s):
        if when == "before the answers" or len(members) == 1:
            raise Interrupted
        return wait(self, members, timeout_s)[:1]

    with EnvPool(TinyEnv, 2, 2) as pool:
        pool.reset([0, 1], episodes([1, 2]))
        pool.step([0, 1], actions[0])
        before = [snapshot.physics for snapshot in pool.snapshot([0, 1])]
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Processes, "wait", interrupt)
            pool.step([0, 1], actions[1])
        after = [snapshot.physics for snapshot in pool.snapshot([0, 1])]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise", "failed 3 times on slot 1 while stepping a chunk: RuntimeError: the solver diverged"),
        ("value", "failed on slot 1 while stepping a chunk: ValueError: a bad request"),
        ("die", "failed 3 times on slot 1 while stepping a chunk: the process died (exit code -9)"),
        ("hang", "failed 3 times on slot 1 while stepping a chunk: no answer within 0.5 s"),
    ],
)
def test_a_lasting_fault_is_one_line_and_leaves_no_trace_in_its_slot(fault, text):
    with EnvPool(functools.partial(TinyEnv, fault), 2, 2, timeout_s=0.5) as pool:
        actions = random_chunks(3, 2, 2, 3)
        pool.reset([0, 1], episodes([1, 2]))
        pool.step([1], actions[0, :1])
        before = pool.snapshot([1])[0].physics
        other = TinyEnv()
        other.reset(Episode(1))
        with pytest.raises(SlotsLost) as caught:
            pool.step([0, 1], actions[1])
        assert str(caught.value) == f"worker 1 {text}" and caught.value.lost == {1: str(caught.value)}
        (result, observation), missing = caught.value.answers
        assert missing is None and result.steps == other.step_chunk(actions[1, 0]).steps
        assert_same_observation(observation, other.observe())
        after = [snapshot.physics for snapshot in pool.snapshot([0, 1])]
        np.testing.assert_array_equal(after, [other.snapshot().physics, before])
        pool.reset([1], episodes([9]))
        pool.step([1], actions[0, :1])


def test_an_environment_that_cannot_be_built_is_reported():
    for num_workers in (0, 2):
        with pytest.raises(PoolError, match="while building the environment: OSError: no scene file"):
            EnvPool(functools.partial(TinyEnv, "build"), 2, num_workers)
    with pytest.raises(ValueError, match="make_env cannot be sent"):
        EnvPool(lambda: TinyEnv(), 2, 1)


def test_bad_requests_are_refused_before_they_reach_a_worker():
    with EnvPool(TinyEnv, 2, 0) as pool:
        with pytest.raises(ValueError, match="slot 0 has no episode"):
            pool.step([0], np.zeros((1, 4, 3)))
        pool.reset([0, 1], episodes([1, 2]))
        with pytest.raises(ValueError, match="slot 2 does not exist"):
            pool.reset([2], episodes([1]))
        with pytest.raises(ValueError, match="repeat"):
            pool.reset([1, 1], episodes([1, 2]))
        with pytest.raises(ValueError, match="2 slots and 1 episodes"):
            pool.reset([0, 1], episodes([1]))
        with pytest.raises(ValueError, match=r"expected \[2 slots, chunk, 3\]"):
            pool.step([0, 1], np.zeros((2, 4, 7)))
        with pytest.raises(ValueError, match="slot 1 are not finite"):
            pool.step([0, 1], np.stack([np.zeros((4, 3)), np.full((4, 3), np.nan)]))
        with pytest.raises(ValueError, match="repeat"):
            pool.branch([0, 0], [1, 1])
        pool.step([], np.zeros((0, 4, 3)))
    with pytest.raises(ValueError, match="closed"):
        pool.reset([0], episodes([1]))
    with pytest.raises(ValueError, match="num_envs=0"):
        EnvPool(TinyEnv, 0, 1)


def test_times_add_up_to_the_calls():
    with EnvPool(TinyEnv, 4, 2) as pool:
        pool.take_times()
        start = time.perf_counter()
        pool.reset([0, 1, 2, 3], episodes([1, 2, 3, 4]))
        pool.step([0, 1, 2, 3], random_chunks(0, 1, 4, 3)[0])
        wall = time.perf_counter() - start
        times = pool.take_times()
        assert times.pop("hidden") == 0.0  # nothing was done meanwhile
        assert times.pop("busy") >= times["simulate"] + times["render"]
        assert all(value > 0 for value in times.values()) and times.keys() == {"simulate", "render", "wait"}
        assert 0.5 * wall < sum(times.values()) <= wall
        assert set(pool.take_times().values()) == {0.0}


def test_the_actions_buffer_may_be_reused():
    buffer = random_chunks(0, 1, 1, 3)[0]
    with EnvPool(TinyEnv, 1, 1) as pool:
        pool.reset([0], episodes([7]))
        pool.step([0], buffer)
        expected = pool.snapshot([0])[0].physics
        buffer[:] = 1e3
        pool._crew.workers[0].kill()
        np.testing.assert_array_equal(pool.snapshot([0])[0].physics, expected)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_close_reaps_every_worker():
    pool = EnvPool(TinyEnv, 3, 3)
    pids = [member._process.pid for member in pool._crew.workers.values()]
    assert len(pids) == 3 and all(map(running, pids))
    pool.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # not even as zombies
    pool.close()


@pytest.mark.parametrize("how", ["killed", "ctrl-c", "killed, workers stopped"])
def test_workers_end_with_their_parent(how):
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(tiny_env.__file__)!r})
        from tiny_env import TinyEnv
        from envs.pool import EnvPool
        if __name__ != "__main__":
            raise SystemExit("a worker must not run the main module again")
        with EnvPool(TinyEnv, 2, 2) as pool:
            print(*[member._process.pid for member in pool._crew.workers.values()], flush=True)
            time.sleep(100)
    """)
    # Stopped workers stay in this process's group: the kernel itself ends those of a group that nobody is left for.
    own = None if "stopped" in how else 0
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=own,
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if how == "ctrl-c":
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the workers too
        else:
            for pid in pids if "stopped" in how else ():
                os.kill(pid, signal.SIGSTOP)
            parent.kill()
        parent.wait(timeout=10)
        deadline = time.monotonic() + 5
        while any(map(running, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(running, pids))
    finally:
        parent.kill()
        parent.stdout.close()
