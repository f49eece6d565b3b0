"""The few names of `import z1_jax`, and the examples of the documentation that use them."""

import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_policy

import z1_jax
from envs.base import ChunkResult, Episode, episodes
from envs.pool import EnvPool
from envs.suite import SingleEnv
from z1_jax.api import ActingPolicy
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import ConfigError, EvalConfig, FlowConfig
from z1_jax.errors import UserError
from z1_jax.evaluation import evaluate
from z1_jax.rl.rollout import BrokenIteration

ROOT = pathlib.Path(__file__).parents[1]
FIRST = EvalConfig().first_seed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one policy, of random parameters."""
    directory = tmp_path_factory.mktemp("run")
    policy = tiny_policy.policy()
    checkpoints = Checkpoints(directory / "checkpoints" / "grpo")
    checkpoints.save(3, policy.parts(), policy.document())
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def acting(run):
    return z1_jax.load_policy(run)


def code_of(document: str, holding: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (code,) = [block for block in blocks if holding in block]
    return code


def test_the_names_are_shown_and_importing_them_costs_no_jax():
    code = "import sys, z1_jax; print(dir(z1_jax)); assert not {'jax', 'mujoco'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("load_policy", "make_env", "Episode"):
        assert name in shown and callable(getattr(z1_jax, name))
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        _ = z1_jax.load_polcy


def test_it_acts_as_its_evaluation(acting, tmp_path):
    """The same outcomes and steps, episode by episode."""
    count = 4
    found = evaluate(
        tiny_policy.policy(),
        tiny_policy.pool(count),
        tiny_policy.one_device(),
        EvalConfig(episodes=count),
        FlowConfig(steps=4),
        tmp_path / "rows.jsonl",
        title="tiny",
    )
    policy, env = acting, tiny_policy.make_env()
    assert (policy.cameras, policy.executed, policy.action_dim, policy.state_dim) == ((tiny_policy.CAMERA,), 8, 12, 16)
    for seed, success, steps in zip(found.seeds, found.success, found.steps, strict=True):
        env.reset(Episode(int(seed)))
        result, taken, chunk = ChunkResult(0, False, False), 0, 0
        while not result.done:
            actions = policy.act(env.observe(), seed=int(seed), chunk=chunk)
            assert actions.shape == (8, 12) and actions.dtype == np.float32
            result = env.step_chunk(actions)
            taken, chunk = taken + result.steps, chunk + 1
        assert (result.success, taken) == (success, steps)


def test_noise_follows_from_its_numbers_and_an_observation_may_be_a_mapping(acting):
    policy, env = acting, tiny_policy.make_env()
    env.reset(Episode(5))
    look = env.observe()
    mapping = {"images": look.images, "state": look.state.tolist(), "instruction": look.instruction}
    first = policy.act(look, seed=1)
    np.testing.assert_array_equal(first, policy.act(mapping, seed=1))
    for other in ({"seed": 2}, {"seed": 1, "chunk": 1}, {"seed": 1, "noise_seed": 1}):
        assert np.abs(policy.act(look, **other) - first).max() > 1e-3
    assert np.abs(policy.act({**mapping, "state": np.ones(16)}, seed=1) - first).max() > 1e-4


def test_mistakes_are_one_line(acting, tmp_path):
    policy = acting
    good = {
        "images": {tiny_policy.CAMERA: np.zeros((28, 28, 3), np.uint8)},
        "state": np.zeros(16),
        "instruction": "turn on the sink faucet",
    }
    for observation, message in (
        ({"images": {}, "state": []}, "got an observation of images, state: expected images, state, instruction"),
        (None, "got an observation of NoneType"),
        ({**good, "images": {}}, f"no camera '{tiny_policy.CAMERA}'"),
        ({**good, "state": np.zeros(3)}, "states have shape"),
        ({**good, "state": np.full(16, np.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.act(observation)
    with pytest.raises(ValueError, match="seed=-1"):
        policy.act(good, seed=-1)
    with pytest.raises(UserError, match="no policy at"):
        z1_jax.load_policy(tmp_path)


def test_a_policy_that_draws_no_numbers_says_so(acting):
    acting = ActingPolicy(acting.policy.with_params(jax.tree.map(lambda x: x * np.nan, acting.policy.params)))
    env = tiny_policy.make_env()
    env.reset(Episode(5))
    with pytest.raises(BrokenIteration, match="drew numbers that are not finite"):
        acting.act(env.observe())


def test_environments_by_name():
    env = z1_jax.make_env("CloseDrawer", image_size=16, horizon=8, cameras=("robot0_agentview_left",))
    env.reset(z1_jax.Episode(3))
    look = env.observe()
    assert (env.spec.task, env.spec.horizon, look.images["robot0_agentview_left"].shape) == (
        "CloseDrawer",
        8,
        (16, 16, 3),
    )
    assert z1_jax.make_env(suite="examples.reach:Reach").spec.task == "Reach"
    for given, message in (
        ({"task": "Juggle"}, "config key task: 'Juggle' does not exist"),
        ({"task": "OpenDrawer", "suite": "nowhere"}, "config key env.suite: 'nowhere'"),
        ({"task": "OpenDrawer", "image_sise": 8}, "config key env.image_sise does not exist; did you mean"),
        ({"task": "OpenDrawer", "workers": 2}, "config key env.workers: has no effect on a single environment"),
        ({}, "config key task: got nothing, expected one of .*OpenDrawer"),
        ({"task": "OpenDrawer", "image_size": 0}, "config key env.image_size: got 0"),
        ({"task": "OpenDrawer", "evaluation": {"scenes": ("1/1",)}}, "eval.scenes: got .*only env.suite=robocasa has"),
    ):
        with pytest.raises(ConfigError, match=message):
            z1_jax.make_env(**given)


def test_the_documents_example_runs(run, monkeypatch, capsys):
    code = code_of("docs/python.md", "load_policy")
    assert "runs/grpo-TurnOnSinkFaucet-seed0" in code
    made = z1_jax.make_env
    monkeypatch.setattr(z1_jax, "make_env", lambda task: made(task, horizon=16), raising=False)
    exec(code.replace("runs/grpo-TurnOnSinkFaucet-seed0", str(run)), {})
    assert capsys.readouterr().out.strip() in ("True", "False")


def test_the_documents_least_environment_is_one():
    code = code_of("docs/own-environment.md", "class Push")
    assert len([line for line in code.splitlines() if line.strip()]) <= 26
    module = types.ModuleType("least")
    exec(code + code_of("docs/own-environment.md", "class Copied"), module.__dict__)
    assert not SingleEnv(module.Push, "least:Push").branches
    suite = SingleEnv(module.Copied, "least:Copied")
    assert suite.branches and suite.tasks == ("Push",) and suite.instructions == ("push the line to the right",)
    with EnvPool(module.Copied, 4, 0) as pool:
        pool.reset(range(4), episodes(range(4)))
        for _ in range(2):
            pool.branch([0, 2], [1, 3])
            results, _ = pool.step(range(4), np.ones((4, 4, 1)))
            assert results[0] == results[1] and results[2] == results[3]
        results, _ = pool.step(range(4), np.ones((4, 4, 1)))
        assert all(result.success and result.done for result in results)
