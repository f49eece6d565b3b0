"""A pool whose workers are actors of a real Ray cluster of several nodes, against the local pool; what ends them."""

import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from seeds import fresh_seed
from test_pool import assert_same_record, branched_run, random_chunks
from tiny_env import TinyEnv

from envs import ray_cluster, ray_workers
from envs.base import episodes
from envs.pool import EnvPool, PoolError
from envs.ray_cluster import RESOURCE, HeadWatch, refusal
from envs.ray_workers import RayWorkers

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'z1-jax[ray]'")
SMALL = {"num_cpus": 0, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A head without simulators and two nodes with two each, which this process has joined."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 2}
    made = Cluster(True, head_node_args={**SMALL, "include_dashboard": False, "_system_config": soon})
    try:
        for _ in range(2):
            made.add_node(resources={RESOURCE: 2}, **SMALL)
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def pool_of(factory, slots: int, workers: int, timeout_s=20.0, start_timeout_s=60.0, simulators=0) -> EnvPool:
    factories = factory if isinstance(factory, dict) else {"": factory}
    place = RayWorkers(factories, simulators, workers, start_timeout_s=start_timeout_s, name="test")
    return EnvPool(factory, slots, workers, timeout_s, start_timeout_s, simulators, place)


def tiny_record(pool: EnvPool, seed: int) -> list:
    """Two episodes of each slot: every result, observation and state, in order."""
    record, slots = [], list(range(pool.num_envs))
    for episode in range(2):
        record += list(pool.reset(slots, episodes([seed + episode + slot for slot in slots])))
        for chunk in random_chunks(seed + episode, 2, len(slots), 3):
            results, observations = pool.step(slots, chunk)
            record += [(r.steps, r.success, r.done) for r in results] + observations
    return record + [snapshot.physics for snapshot in pool.snapshot(slots)]


def test_gives_what_the_local_pool_gives(cluster):
    seed = fresh_seed(__name__, "test_gives_what_the_local_pool_gives")
    with EnvPool(TinyEnv, 4, 2) as local:
        expected = branched_run(local, seed)
    with pool_of(TinyEnv, 4, 3) as pool:
        assert_same_record(branched_run(pool, seed), expected)
        assert pool.replaced == 0
        assert {frame.shape for frame in pool.render([0, 3], "eye", 6)} == {(6, 6, 3)}
        times = pool.take_times()
        assert times["simulate"] > 0 and times["wait"] > 0
        with pytest.raises(ValueError, match="not finite"):
            pool.step([0], np.full((1, 2, 3), np.nan))


def test_slots_take_turns_in_an_actors_simulator(cluster):
    seed = fresh_seed(__name__, "test_slots_take_turns_in_an_actors_simulator")
    with EnvPool(TinyEnv, 6, 0) as local:
        expected = tiny_record(local, seed)
    with pool_of(TinyEnv, 6, 2, simulators=1) as pool:
        assert_same_record(tiny_record(pool, seed), expected)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_that_ends_is_replaced_from_the_journals(cluster, ending):
    seed = fresh_seed(__name__, f"test_an_actor_that_ends_is_replaced_from_the_journals {ending}")
    actions = random_chunks(seed, 3, 4, 3)
    with EnvPool(TinyEnv, 4, 2) as local:
        local.reset([0, 1, 2, 3], episodes(range(seed, seed + 4)))
        expected = [local.step([0, 1, 2, 3], chunk) for chunk in actions]
    with pool_of(TinyEnv, 4, 2, timeout_s=3.0) as pool:
        pool.reset([0, 1, 2, 3], episodes(range(seed, seed + 4)))
        got = [pool.step([0, 1, 2, 3], actions[0])]
        pid = pool._crew.workers[1]._facts["pid"]
        os.kill(pid, ending)
        began = time.monotonic()
        got += [pool.step([0, 1, 2, 3], chunk) for chunk in actions[1:]]
        assert pool.replaced == 1 and time.monotonic() - began < 30
    for (results, seen), (right, looks) in zip(got, expected, strict=True):
        assert [(r.steps, r.success, r.done) for r in results] == [(r.steps, r.success, r.done) for r in right]
        assert_same_record(seen, looks)
    assert not alive(pid)


def alive(pid: int, patience_s: float = 10.0) -> bool:
    """Whether a process is there, after a while in which it may end."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def test_a_lost_node_costs_nothing_and_a_new_one_is_used(cluster, monkeypatch):
    """Four actors take all four units. A node ends: its actors crowd the other. Another comes: they move there."""
    monkeypatch.setattr(ray_workers, "CROWD_AFTER_S", 5.0)
    seed = fresh_seed(__name__, "test_a_lost_node_costs_nothing_and_a_new_one_is_used")
    slots, actions = list(range(8)), random_chunks(seed, 3, 8, 3)

    def episode(pool: EnvPool, between=lambda: None) -> list:
        record = list(pool.reset(slots, episodes(range(seed, seed + 8))))
        for number, chunk in enumerate(actions):
            if number == 1:
                between()
            results, observations = pool.step(slots, chunk)
            record += [(r.steps, r.success, r.done) for r in results] + observations
        return record

    with EnvPool(TinyEnv, 8, 2) as local:
        expected = episode(local)
    with pool_of(TinyEnv, 8, 4) as pool:
        lost = next(node for node in cluster.list_all_nodes() if node.node_id == pool._crew.workers[0].node)
        hit = [index for index in range(4) if pool._crew.workers[index].node == lost.node_id]
        assert len(hit) == 2

        def lose() -> None:
            cluster.remove_node(lost, allow_graceful=False)
            assert not any(alive(pool._crew.workers[index]._facts["pid"]) for index in hit)

        assert_same_record(episode(pool, lose), expected)
        assert pool.replaced == 2 and all(pool._crew.workers[index].crowded for index in hit)
        assert len({member.node for member in pool._crew.workers.values()}) == 1
        added = cluster.add_node(resources={RESOURCE: 2}, **SMALL)
        assert_same_record(episode(pool), expected)
        assert [pool._crew.workers[index].node for index in hit] == [added.node_id] * 2
        assert pool.replaced == 4 and not any(member.crowded for member in pool._crew.workers.values())
        assert_same_record(episode(pool), expected)
        assert pool.replaced == 4


def test_too_few_units_are_told_in_time(cluster):
    began = time.monotonic()
    with pytest.raises(PoolError, match="no host took it within 5 s: the cluster has 4 units .* this pool wants 6"):
        pool_of(TinyEnv, 6, 6, start_timeout_s=5.0)
    assert time.monotonic() - began < 15


def test_an_environment_that_the_actors_cannot_import(cluster, tmp_path):
    """A module that only this process knows."""
    (tmp_path / "homemade.py").write_text("from tiny_env import TinyEnv\n\ndef make():\n    return TinyEnv()\n")
    spec = importlib.util.spec_from_file_location("homemade", tmp_path / "homemade.py")
    sys.modules["homemade"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        with pytest.raises(PoolError, match="cannot import it .*No module named 'homemade'.* install there"):
            pool_of(module.make, 2, 2)
    finally:
        del sys.modules["homemade"]


def test_hosts_of_other_versions_are_refused(cluster, monkeypatch):
    mine = ray_workers.facts() | {"numpy": "0.1"}
    monkeypatch.setattr(ray_workers, "facts", lambda: mine)
    with pytest.raises(PoolError, match=rf"has numpy {np.__version__}, this process 0\.1: .* make them alike"):
        pool_of(TinyEnv, 2, 2)


def test_an_exception_of_the_environment_is_told(cluster):
    with pool_of(functools.partial(TinyEnv, "value"), 2, 2) as pool:
        pool.reset([0, 1], episodes([1, 2]))
        with pytest.raises(PoolError, match="ValueError: a bad request"):
            for _ in range(3):
                pool.step([0, 1], np.zeros((2, 4, 3)))


def test_what_cannot_be_sent_is_refused_at_once(cluster):
    with socket.socket() as held, pytest.raises(ValueError, match="cannot be sent to an actor"):
        pool_of(functools.partial(TinyEnv, held), 1, 1)


def test_actors_have_names_that_say_which_environments_they_hold(cluster):
    with pool_of({"a": TinyEnv, "b": TinyEnv}, 4, 2) as pool:
        named = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)}
        assert {"test simulator 0 slots 0,2 start 1", "test simulator 1 slots 1,3 start 1"} <= named
        assert pool._crew._place.summary().startswith("2 simulator actors of Ray on ")


def test_actors_end_with_the_pool(cluster):
    with pool_of(TinyEnv, 4, 4) as pool:
        pids = [member._facts["pid"] for member in pool._crew.workers.values()]
        assert all(alive(pid, 0.1) for pid in pids)
    assert not any(alive(pid) for pid in pids)
    assert ray.is_initialized(), "who had joined before stays"


LEARNER = """
import sys, time
import numpy as np
from tiny_env import TinyEnv
from envs.base import episodes
from envs.pool import EnvPool
from envs.ray_workers import RayWorkers

if __name__ == "__main__":
    address, seed, wait = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    place = RayWorkers({"": TinyEnv}, 0, 2, address, name="pool")
    with EnvPool(TinyEnv, 2, 2, place=place, timeout_s=20.0) as pool:
        for _ in range(20):
            pool.reset([0, 1], episodes([seed, seed + 1]))
            for _ in range(3):
                looks = pool.step([0, 1], np.zeros((2, 3, 3)))[1]
        print(*[member._facts["pid"] for member in pool._crew.workers.values()], flush=True)
        print([None if look is None else look.state.tolist() for look in looks], flush=True)
        time.sleep(wait)
"""


def learner(cluster, tmp_path, seed: int, wait_s: float) -> subprocess.Popen:
    script = tmp_path / "learner.py"
    script.write_text(textwrap.dedent(LEARNER))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, str(script), cluster.address, str(seed), str(wait_s)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_learners_share_a_cluster_and_a_killed_one_leaves_no_actor(cluster, tmp_path):
    seed = fresh_seed(__name__, "test_two_learners_share_a_cluster_and_a_killed_one_leaves_no_actor")
    both = [learner(cluster, tmp_path, seed, 0.0), learner(cluster, tmp_path, seed + 1, 600.0)]
    told = [[process.stdout.readline() for _ in range(2)] for process in both]
    assert both[0].wait(60) == 0
    with EnvPool(TinyEnv, 2, 0) as local:
        for (_, states), first in zip(told, (seed, seed + 1), strict=True):
            local.reset([0, 1], episodes([first, first + 1]))
            looks = [local.step([0, 1], np.zeros((2, 3, 3)))[1] for _ in range(3)][-1]
            assert eval(states) == [None if look is None else look.state.tolist() for look in looks]
    both[1].kill()
    both[1].wait()
    pids = [int(pid) for told_one in told for pid in told_one[0].split()]
    assert len(set(pids)) == 4 and not any(alive(pid, 20.0) for pid in pids)


HEADLESS = """
import os, pathlib, signal
import numpy as np
from tiny_env import TinyEnv
from envs import ray_cluster
from envs.base import PoolError, episodes
from envs.pool import EnvPool
from envs.ray_workers import RayWorkers

def newest_head():
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"gcs_server" in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it has just ended
            continue
    return max(found)

if __name__ == "__main__":
    ray_cluster.HEAD_EVERY_S, ray_cluster.HEAD_GONE_S = 0.5, 2.0
    place = RayWorkers({"": TinyEnv}, 0, 2)
    with EnvPool(TinyEnv, 2, 2, place=place, timeout_s=20.0) as pool:
        pool.reset([0, 1], episodes([0, 1]))
        os.kill(newest_head(), signal.SIGKILL)
        try:
            while True:
                pool.step([0, 1], np.zeros((2, 1, 3)))
                pool.reset([0, 1], episodes([0, 1]))
        except PoolError as error:
            print(error)
"""


def test_a_head_that_no_longer_listens_is_gone(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "HEAD_EVERY_S", 0.05)
    monkeypatch.setattr(ray_cluster, "HEAD_GONE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as head:
        watch = HeadWatch(f"127.0.0.1:{head.getsockname()[1]}")
        time.sleep(1.0)
        assert not watch.gone
    until = time.monotonic() + 10
    while not watch.gone and time.monotonic() < until:
        time.sleep(0.05)
    assert "is gone (" in watch.gone and "start Ray again, then the same command continues" in watch.gone
    with pool_of(TinyEnv, 2, 1) as pool:
        pool.reset([0, 1], episodes([1, 2]))
        pool._crew._place._head.gone = watch.gone
        with pytest.raises(PoolError, match="the head of the Ray cluster at .* is gone"):
            pool.step([0, 1], np.zeros((2, 1, 3)))


@pytest.mark.slow
def test_a_head_that_is_killed_is_told(tmp_path):
    script = tmp_path / "headless.py"
    script.write_text(HEADLESS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout.splitlines()[-1]
    assert told.startswith("the head of the Ray cluster at ") and "start Ray again" in told


def test_where_no_cluster_answers(monkeypatch):
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 4.0)
    with socket.socket() as silent:
        silent.bind(("", 0))
        silent.listen()
        began = time.monotonic()
        told = refusal(f"127.0.0.1:{silent.getsockname()[1]}")
        assert "answered within 4 s" in told.text and time.monotonic() - began < 8


def test_a_cluster_is_asked_what_it_has(cluster):
    told = refusal(cluster.address)
    assert told.text == "" and told.units == 4
