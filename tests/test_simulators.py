"""Slots that share simulators, and many tasks in one pool, against one environment for each slot."""

import collections
import dataclasses
import functools

import numpy as np
import pytest
from tiny_env import TinyEnv

from envs import kitchen
from envs.base import Episode, copies
from envs.pool import EnvPool, PoolError
from envs.simulators import Simulators

ALIVE: collections.Counter = collections.Counter()


class Counted(TinyEnv):
    """A task of its own name and horizon, which counts how many of it are alive in this process."""

    def __init__(self, task: str = "A", horizon: int = 12):
        super().__init__()
        self.spec = dataclasses.replace(self.spec, task=task, horizon=horizon)
        self._task = task
        ALIVE[task] += 1

    def reset(self, episode):
        super().reset(dataclasses.replace(episode, seed=episode.seed + sum(map(ord, self._task))))

    def snapshot(self):
        return dataclasses.replace(super().snapshot(), env=self._task)

    def restore(self, snapshot):
        if snapshot.env != self._task:
            raise ValueError(f"a snapshot of {snapshot.env}")
        super().restore(snapshot)

    def close(self):
        ALIVE[self._task] -= 1


class Uncopied:
    """The same without snapshot and restore."""

    def __init__(self):
        self._env = TinyEnv()
        self.spec = self._env.spec
        self.reset, self.observe, self.step_chunk = self._env.reset, self._env.observe, self._env.step_chunk
        self.close = self._env.close


TASKS = {task: functools.partial(Counted, task, 12 + 4 * number) for number, task in enumerate("ABC")}
KITCHEN = {task: functools.partial(kitchen.make, task) for task in ("CloseDrawer", "TurnOnSinkFaucet")}


def walk(pool: EnvPool, rng: np.random.Generator, tasks: list[str]) -> list:
    """Random calls: resets into random tasks, chunks, branches, snapshots, restores; all that came back, in order."""
    slots = pool.num_envs
    record = []

    def begin(chosen):
        names = rng.choice(tasks, len(chosen))
        seeds = rng.integers(10**6, size=len(chosen))
        episodes = [Episode(int(seed), str(task)) for seed, task in zip(seeds, names, strict=True)]
        record.extend((look.state, *look.images.values()) for look in pool.reset(chosen, episodes))

    begin(list(range(slots)))
    kept = pool.snapshot([0])
    for _ in range(12):
        chosen = rng.permutation(slots)[: rng.integers(1, slots + 1)].tolist()
        what = rng.choice(["step", "step", "step", "reset", "branch", "restore", "render"])
        if what == "reset":
            begin(chosen)
        elif what == "branch":
            pool.branch(rng.integers(slots, size=len(chosen)).tolist(), chosen)
        elif what == "restore":
            pool.restore(chosen[:1], kept)
            kept = pool.snapshot([int(rng.integers(slots))])
        elif what == "render":
            record.extend((frame,) for frame in pool.render(chosen, next(iter(pool.spec.cameras)), 4))
        else:
            actions = rng.normal(size=(len(chosen), 3, pool.spec.action_dim)) * 0.3
            for result, look in zip(*pool.step(chosen, actions), strict=True):
                record.append((result.steps, result.success, result.done))
                record.extend([] if look is None else [(look.state, *look.images.values())])
    record.extend((snapshot.physics,) for snapshot in pool.snapshot(list(range(slots))))
    return record


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("simulators", [1, 2, 3, 7])
def test_sharing_moves_no_number(simulators, seed):
    """Of fifty random walks over three tasks, each against the same one with a simulator a slot."""
    ALIVE.clear()
    for number in range(50):
        records = []
        for most in (0, simulators):
            with EnvPool(TASKS, 5, 0, simulators=most) as pool:
                records.append(walk(pool, np.random.default_rng([seed, number]), list(TASKS)))
                assert sum(ALIVE.values()) <= (most or 5)
        assert_same(*records)
    assert not sum(ALIVE.values())  # all were closed


def test_sharing_moves_no_number_in_the_kitchen(seed):
    """Across workers, too, with more tasks than simulators: they are built anew as they are needed."""
    records = []
    for workers, simulators in ((0, 0), (2, 2), (2, 1)):
        with EnvPool(KITCHEN, 5, workers, simulators=simulators) as pool:
            records.append(walk(pool, np.random.default_rng(seed), list(KITCHEN)))
    assert_same(records[0], records[1])
    assert_same(records[0], records[2])


def test_each_slot_is_its_own_environment(seed):
    """Against environments that are alone, not only against another pool."""
    rng = np.random.default_rng(seed)
    alone = [TASKS[task]() for task in "ABCAB"]
    with EnvPool(TASKS, 5, 0, simulators=2) as pool:
        looks = pool.reset(range(5), [Episode(slot, task) for slot, task in enumerate("ABCAB")])
        for slot, env in enumerate(alone):
            env.reset(Episode(slot))
            np.testing.assert_array_equal(env.observe().state, looks[slot].state)
        for _ in range(3):
            actions = rng.normal(size=(5, 4, 3))
            results, _ = pool.step(range(5), actions)
            for slot, env in enumerate(alone):
                assert env.step_chunk(actions[slot]).done == results[slot].done
        for env, snapshot in zip(alone, pool.snapshot(range(5)), strict=True):
            np.testing.assert_array_equal(env.snapshot().physics, snapshot.physics)


@pytest.mark.parametrize("simulators", [0, 1])
def test_a_replaced_worker_has_all_its_slots_again(simulators, seed):
    records = []
    for killed in (False, True):
        rng = np.random.default_rng(seed)
        with EnvPool(TASKS, 4, 2, simulators=simulators) as pool:
            pool.reset(range(4), [Episode(slot, task) for slot, task in enumerate("CABC")])
            pool.step(range(4), rng.normal(size=(4, 2, 3)))
            pool.branch([0], [3])
            if killed:
                pool._crew.workers[1].kill()
            pool.step(range(4), rng.normal(size=(4, 2, 3)))
            records.append([(snapshot.physics,) for snapshot in pool.snapshot(range(4))])
            assert pool.replaced == killed
    assert_same(*records)


def test_memory_does_not_grow_with_tasks_times_slots():
    """One simulator a slot, whatever it did before: those of tasks that nobody is at are closed."""
    ALIVE.clear()
    tasks = {f"T{number}": functools.partial(Counted, f"T{number}") for number in range(20)}
    with EnvPool(tasks, 4, 0) as pool:
        for number in range(20):
            pool.reset(range(4), [Episode(slot, f"T{(number + slot) % 20}") for slot in range(4)])
            assert sum(ALIVE.values()) == 4
    ALIVE.clear()
    with EnvPool(tasks, 40, 0, simulators=3) as pool:
        pool.reset(range(40), [Episode(slot, f"T{slot % 20}") for slot in range(40)])
        assert sum(ALIVE.values()) == 3


def test_simulators_of_a_task_are_used_again():
    built = []

    def make(task):
        built.append(task)
        return Counted(task)

    simulators = Simulators({task: functools.partial(make, task) for task in "AB"}, 2)
    for _ in range(3):
        for slot, task in enumerate("ABAB"):
            simulators.begin(slot, task).reset(Episode(slot))
        for slot in (3, 1, 0, 2):
            simulators.of(slot).step_chunk(np.zeros((1, 3)))
    assert sorted(built) == ["A", "B"] and len(simulators) == 2


def test_what_cannot_be_copied_is_not_shared():
    assert not copies(Uncopied())
    with EnvPool(Uncopied, 2, 0) as pool:
        pool.reset([0, 1], [Episode(0), Episode(1)])
    with pytest.raises(PoolError, match="snapshot and restore: got none, expected both where slots take turns"):
        EnvPool(Uncopied, 2, 0, simulators=1)


def test_tasks_that_do_not_fit_together_are_refused():
    wide = {**TASKS, "wide": functools.partial(of_width, 7)}
    for slots in (2, 4):  # also where no slot begins with the task
        with pytest.raises(
            PoolError, match="wide: the environment's spec.action_dim: got 7, expected 3 as in the pool's"
        ):
            EnvPool(wide, slots, 0)
    with EnvPool(TASKS, 2, 0) as pool:
        assert pool.spec.horizon == 20 and {task: spec.horizon for task, spec in pool.specs.items()} == {
            "A": 12,
            "B": 16,
            "C": 20,
        }
        with pytest.raises(ValueError, match="got an episode of 'D': expected one of A, B, C"):
            pool.reset([0], [Episode(0, "D")])
        with pytest.raises(ValueError, match="got an episode of '': expected one of A, B, C"):
            pool.reset([0], [Episode(0)])


def of_width(width):
    env = TinyEnv()
    env.spec = dataclasses.replace(env.spec, action_dim=width)
    return env
