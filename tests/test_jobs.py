"""Jobs in workers: those that die, stop or raise are replaced, and the results are those without."""

import functools
import itertools
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from seeds import fresh_seed
from tiny_env import TinyEnv, TinyExpert, die_once

from envs.base import Episode
from envs.demos import Demonstrator, collect
from envs.jobs import Job, run_jobs
from envs.pool import PoolError

PROFILE = (1.0, 0.5, 0.0)
FAULT_STEP = 8  # of `TinyEnv`; an episode that succeeds before never gets there


def control_steps(seed: int) -> int:
    [one] = collect(Demonstrator(TinyEnv, TinyExpert, PROFILE), [Episode(seed)], stride=2, chunk=4, processes=0)
    return one.control_steps


# One random episode in two gets to the fault: the first of these does.
SEED = next(seed for seed in itertools.count(fresh_seed(__name__)) if control_steps(seed) >= FAULT_STEP)
EPISODES = [Episode(SEED + i) for i in range(6)]


def collected(fault: str = "", flag: str = "", **options: object) -> list:
    demonstrator = Demonstrator(functools.partial(TinyEnv, fault, flag), TinyExpert, PROFILE)
    return list(collect(demonstrator, EPISODES, stride=2, chunk=4, **options))


def assert_same(some: list, others: list) -> None:
    assert [one.seed for one in some] == [episode.seed for episode in EPISODES]
    for one, other in zip(some, others, strict=True):
        assert (one.seed, one.success, one.control_steps) == (other.seed, other.success, other.control_steps)
        for name in ("state", "actions", "step"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fault", ["", "raise", "die", "hang"])
def test_demonstrations_after_a_fault_are_those_without(fault, processes, tmp_path):
    flag = tmp_path / "once"
    got = collected(fault, str(flag), processes=processes, timeout_s=6.0)
    assert flag.exists()
    assert_same(got, collected(processes=0))


@pytest.mark.parametrize(
    ("fault", "told", "timeout_s"),
    [
        ("die", "3 times on seed .* the process died .exit code -9", 30.0),
        ("hang", "3 times on seed .* no answer within 0.5 s", 0.5),
        ("raise", "3 times on seed .*: RuntimeError: the solver diverged$", 30.0),
        ("value", "failed on seed .*: ValueError: a bad request$", 30.0),
    ],
)
def test_a_lasting_fault_is_one_line(fault, told, timeout_s):
    with pytest.raises(PoolError, match=told) as error:
        collected(fault, processes=2, timeout_s=timeout_s)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_from_outside_is_replaced(number, tmp_path):
    jobs = [Job(str(i), functools.partial(slow_work, str(tmp_path), i)) for i in range(4)]

    def strike() -> None:
        while not (pids := list(tmp_path.iterdir())):
            time.sleep(0.01)
        os.kill(int(pids[0].name), number)

    threading.Thread(target=strike, daemon=True).start()
    assert list(run_jobs(TinyEnv, jobs, 2, timeout_s=2.0, start_timeout_s=60.0)) == [0, 1, 4, 9]
    assert len(list(tmp_path.iterdir())) == 3  # two workers, and the one that replaced one


def slow_work(folder: str, number: int, env: TinyEnv):
    pathlib.Path(folder, str(os.getpid())).touch()
    for _ in range(10):
        time.sleep(0.03)
        yield
    return number**2


def test_a_worker_that_dies_once_while_it_is_built_is_replaced(tmp_path):
    jobs = [Job(str(i), functools.partial(slow_work, str(tmp_path), i)) for i in range(3)]
    make = functools.partial(die_once, str(tmp_path / "once"))
    assert list(run_jobs(make, jobs, 2, timeout_s=5.0, start_timeout_s=60.0)) == [0, 1, 4]


def test_few_of_endless_jobs_are_begun(tmp_path):
    begun = itertools.count()
    jobs = (Job(str(i), functools.partial(slow_work, str(tmp_path), i)) for i in begun)
    results = run_jobs(TinyEnv, jobs, 1, timeout_s=5.0, start_timeout_s=60.0)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert next(begun) <= 6
    deadline = time.monotonic() + 5
    pids = [path.name for path in tmp_path.iterdir()]
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
