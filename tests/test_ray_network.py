"""Ray nodes in network namespaces, as on machines with a cable each: one loses its cable, another comes."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from seeds import fresh_seed
from test_pool import random_chunks
from tiny_env import TinyEnv

from envs.base import episodes
from envs.pool import EnvPool

pytest.importorskip("ray", reason="Ray is not installed: pip install 'z1-jax[ray]'")
pytestmark = pytest.mark.slow
MARK = f"z1r{os.getpid() % 10**6}"  # in the names of what this process makes: at most 15 characters each
BRIDGE, NET = f"{MARK}b", "10.77.0"

LEARNER = """
import sys
import numpy as np
from tiny_env import TinyEnv
from envs import ray_workers
from envs.base import episodes
from envs.pool import EnvPool
from envs.ray_workers import RayWorkers

if __name__ == "__main__":
    actions = np.load(sys.argv[2])
    place = RayWorkers({"": TinyEnv}, 0, 4, sys.argv[1])
    with EnvPool(TinyEnv, 8, 4, place=place, timeout_s=15.0) as pool:
        for episode in range(4):
            for count, chunk in enumerate(actions):
                if count == 0:
                    pool.reset(range(8), episodes(range(8)))
                if count == 1:
                    print("nodes:", *(member.node for member in pool._crew.workers.values()), pool.replaced, flush=True)
                    sys.stdin.readline()
                looks = pool.step(range(8), chunk)[1]
            print("states:", [None if look is None else look.state.tolist() for look in looks], flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A namespace with an address in a common network, and a Ray node in it."""

    def __init__(self, number: int, scratch) -> None:
        self.name, self.address, self.link = f"{MARK}n{number}", f"{NET}.{number}", f"{MARK}v{number}"
        self._scratch, self._node = scratch, None
        ip("netns", "add", self.name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")

    def run(self, *command: str, **options) -> subprocess.Popen:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        variables = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], env=os.environ | variables, **options)

    def start_ray(self, *options: str) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.address}"]
        small = ["--num-cpus=0", "--object-store-memory=83886080", f"--temp-dir={self._scratch}"]
        log = pathlib.Path(f"{self._scratch}/{self.name}.log")
        with log.open("w") as written:
            self._node = self.run(*ray, *small, *options, stdout=written, stderr=written)
        until = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < until and self._node.poll() is None, log.read_text()
            time.sleep(0.2)

    def end(self) -> None:
        if self._node is not None:
            self._node.terminate()
            try:
                self._node.wait(30)
            except subprocess.TimeoutExpired:
                self._node.kill()
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    """A head and two hosts with two simulators each, and what makes another one."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no bridge can be made here: {error.stderr.decode().strip()}")
    made: list[Host] = []
    scratch = f"/tmp/z1ray{os.getpid()}"  # a short path: Ray keeps sockets there

    def add(*options: str) -> Host:
        made.append(Host(len(made) + 1, scratch))
        made[-1].start_ray(*options)
        return made[-1]

    try:
        os.makedirs(scratch)
        ip("link", "set", BRIDGE, "up")
        add("--head", "--port=6399", "--include-dashboard=false")
        for _ in range(2):
            add(f"--address={NET}.1:6399", '--resources={"simulator": 2}')
        yield made, add
    finally:
        for host in reversed(made):
            host.end()
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)


def told(process: subprocess.Popen, word: str) -> str:
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError(f"the learner ended: {process.wait()}")


def test_a_host_without_its_cable_is_replaced_and_a_new_one_is_used(hosts, tmp_path):
    made, add = hosts
    seed = fresh_seed(__name__, "test_a_host_without_its_cable_is_replaced_and_a_new_one_is_used")
    actions = random_chunks(seed, 3, 8, 3)
    np.save(tmp_path / "actions.npy", actions)
    with EnvPool(TinyEnv, 8, 0) as local:
        local.reset(range(8), episodes(range(8)))
        expected = [local.step(range(8), chunk)[1] for chunk in actions][-1]
    expected = [None if look is None else look.state.tolist() for look in expected]
    (tmp_path / "learner.py").write_text(textwrap.dedent(LEARNER))
    command = [sys.executable, str(tmp_path / "learner.py"), f"{NET}.1:6399", str(tmp_path / "actions.npy")]
    learner = made[0].run(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go_on() -> float:
        learner.stdin.write("\n")
        learner.stdin.flush()
        began = time.monotonic()
        assert eval(told(learner, "states:")) == expected
        return time.monotonic() - began

    *before, _ = told(learner, "nodes:").split()
    assert len(set(before)) == 2
    ip("link", "set", made[1].link, "down")
    recovery_s = go_on()
    *crowded, replaced = told(learner, "nodes:").split()
    assert len(set(crowded)) == 1 and int(replaced) >= 2
    go_on()
    told(learner, "nodes:")
    add(f"--address={NET}.1:6399", '--resources={"simulator": 2}')
    go_on()
    *after, _ = told(learner, "nodes:").split()
    assert len(set(after)) == 2
    go_on()
    print(f"recovery from a lost cable: {recovery_s:.1f} s; nodes {set(before)} → {set(crowded)} → {set(after)}")
    assert learner.wait(60) == 0
