"""The Python API: found without JAX, decides as evaluation does, refuses in a line; README's example runs."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_policy as tiny

import z1_jax
from envs.base import EnvObservation, Episode
from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.schema import ConfigError
from z1_jax.evaluation import ALONE
from z1_jax.rl import rollout

ROOT = pathlib.Path(__file__).parents[1]
RUN = "runs/grpo-OpenDrawer-seed0"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run directory."""
    root = tmp_path_factory.mktemp("home")
    checkpoints = Checkpoints(root / RUN / "checkpoints" / "grpo")
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    return root


def test_importing_the_package_loads_no_jax_and_shows_the_names():
    code = "import sys, z1_jax; assert {'load_policy', 'make_env'} <= set(dir(z1_jax)); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'load_polcy'"):
        z1_jax.load_polcy  # noqa: B018


def test_a_loaded_policy_decides_as_evaluation_does(home):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    actor, params = tiny.acting()
    chunks = rollout.collect(
        tiny.pool(16), actor, params, tiny.processor(), ALONE, [Episode(seed)], (5,), executed=8, stochastic=False
    )
    expected = tiny.processor().env_actions(chunks.nodes.x[:, -1, :8])
    policy, env = z1_jax.load_policy(home / RUN), tiny.make_env()
    assert (policy.cameras, policy.executed) == ((tiny.CAMERA,), 8)
    env.reset(Episode(seed))
    for chunk, actions in enumerate(expected):
        got = policy.act(env.observe(), seed=(5, seed, chunk, 0))
        assert got.dtype == np.float32 and got.shape == (8, 12)
        np.testing.assert_allclose(got, actions, atol=1e-4)
        result = env.step_chunk(actions)
    assert result.done and result.success == chunks.success[0, 0]
    assert policy._actor.traces == {"encode": 1, "sample": 1}


def test_the_seed_is_that_of_the_noise(home):
    policy, env = z1_jax.load_policy(home / RUN), tiny.make_env()
    env.reset(Episode(1))
    look = env.observe()
    np.testing.assert_array_equal(policy.act(look), policy.act(look, seed=0))
    assert np.abs(policy.act(look) - policy.act(look, seed=1)).max() > 1e-3
    for wrong in (-1, 0.5, (), [[1]]):
        with pytest.raises(ValueError, match="expected a whole number from 0 on"):
            policy.act(look, seed=wrong)
    with pytest.raises(ValueError, match="observation has no camera"):
        policy.act(EnvObservation({"other": look.images[tiny.CAMERA]}, look.state, look.instruction))


def test_environments_are_those_of_a_config():
    env = z1_jax.make_env("OpenDrawer", image_size=32, cameras=["robot0_eye_in_hand"], styles=["slate"])
    assert (env.spec.task, env.spec.image_size, env.spec.cameras) == ("OpenDrawer", 32, ("robot0_eye_in_hand",))
    assert z1_jax.make_env(suite="examples.reach:Reach").spec.task == "Reach"


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("Juggle", {}, "task: 'Juggle' does not exist"),
        ("", {}, "task: got nothing, expected one of "),
        ("OpenDrawer", {"parallel": 4}, "env.parallel: has no effect"),
        ("OpenDrawer", {"image_siz": 4}, "env.image_siz does not exist; did you mean env.image_size"),
        ("OpenDrawer", {"image_size": 0}, "env.image_size: got 0, expected"),
        ("OpenDrawer", {"scenes": ("training",)}, "env.scenes: got .'training'., which only env.suite=robocasa has"),
        ("Reach", {"suite": "examples.nowhere:Reach"}, "env.suite: .* cannot be imported"),
    ],
)
def test_what_makes_no_environment_is_one_line(task, keys, message):
    with pytest.raises(ConfigError, match=f"^config key {message}") as error:
        z1_jax.make_env(task, **keys)
    assert "\n" not in str(error.value)


def test_no_policy_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no policy at"):
        z1_jax.load_policy(tmp_path)


def test_the_readmes_example_runs(home, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert RUN in example
    monkeypatch.chdir(home)
    names: dict = {}
    exec(example, names)
    assert names["done"] and names["actions"].shape == (8, 12)
