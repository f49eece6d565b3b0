"""Converted checkpoints against the models that they came from: openpi's PyTorch code and LeRobot's.

tests/reference holds checkpoints that both saved with their own code, and the actions that they sampled. The second
half runs the real things, where they are installed.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy as tiny
import torch_models as real
from flax import nnx
from seeds import fresh_seed

from z1_jax.checkpoint import Checkpoints
from z1_jax.convert import __main__ as convert
from z1_jax.policy import abstract_params, architecture, named, unnamed
from z1_jax.types import Observation

REFERENCE = pathlib.Path(__file__).parent / "reference"
FLAGS = {
    "openpi_pytorch": ("--heads=4", "--vision-heads=2", "--horizon=5", "--prompt-length=10", "--state-in-prompt"),
    "lerobot": ("--heads=4", "--vision-heads=2", "--pad-state=8"),
}
TOLERANCE = 1e-5  # of the largest action


def run(*arguments: object) -> None:
    convert.convert(convert.parse_arguments([str(argument) for argument in arguments]))


def sample(place: pathlib.Path, given: dict[str, np.ndarray]) -> np.ndarray:
    """Actions of a converted checkpoint by the ODE, in float32."""
    checkpoints = Checkpoints(place)
    config = dataclasses.replace(architecture(checkpoints.document(0)["architecture"]), dtype="float32")
    graphdef, abstract = abstract_params(config, tiny.one_device())
    arrays = checkpoints.load(0, {"params": named(abstract)})["params"]
    params = unnamed(abstract, arrays)
    obs = Observation(*(jnp.asarray(given[n]) for n in ("images", "image_mask", "tokens", "token_mask")))

    @jax.jit
    def step(params, obs, x):
        model = nnx.merge(graphdef, params)
        cache = model.encode_prefix(obs)

        def euler(i, x):
            t = jnp.full((x.shape[0], 1), 1.0 - i / real.STEPS, jnp.float32)
            return x - model.velocity(cache, x[:, None], t)[:, 0] / real.STEPS

        return jax.lax.fori_loop(0, real.STEPS, euler, x)

    return np.asarray(step(params, obs, jnp.asarray(given["noise"])))


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    print(f"largest difference {error:.1e} of the largest action")
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["openpi_pytorch", "lerobot"])
def test_actions_of_saved_checkpoints(tmp_path, name):
    with np.load(REFERENCE / "torch_actions.npz") as file:
        given = dict(file)
    run(REFERENCE / name, tmp_path / "ours", *FLAGS[name])
    expected = given[name]
    assert_close(sample(tmp_path / "ours", given)[..., : expected.shape[-1]], expected)


def test_lerobots_statistics_and_settings(tmp_path):
    run(REFERENCE / "lerobot", tmp_path / "ours", *FLAGS["lerobot"])
    document = Checkpoints(tmp_path / "ours").document(0)
    for key, fields in real.statistics(2).items():
        for field, values in fields.items():
            np.testing.assert_array_equal(document["norm_stats"][key][field], values.astype(np.float64))
    assert document["cameras"] == list(real.CAMERAS) and document["norm_mode"] == "quantile"
    assert (document["executed"], document["denoising_steps"], document["prompt_state_dim"]) == (4, 10, 8)
    assert (document["architecture"]["horizon"], document["architecture"]["prompt_length"]) == (5, 10)


def test_a_lerobot_policy_of_another_kind_is_refused(tmp_path):
    import shutil

    shutil.copytree(REFERENCE / "lerobot", tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text().replace('"pi05"', '"smolvla"'))
    with pytest.raises(ValueError, match="is of a 'smolvla' policy; expected LeRobot's pi05"):
        run(tmp_path / "source", tmp_path / "ours", *FLAGS["lerobot"])


def need(*modules: str) -> None:
    for module in ("torch", *modules):
        pytest.importorskip(module, reason=f"{module} is not installed: the reference actions above stand for it")


def test_openpis_model_of_today(tmp_path):
    need("openpi.models_pytorch.pi0_pytorch")
    seed = fresh_seed(__name__, "test_openpis_model_of_today")
    model, given = real.openpi_model(seed), real.inputs(seed)
    real.openpi_save(model, tmp_path / "source", seed)
    run(tmp_path / "source", tmp_path / "ours", *FLAGS["openpi_pytorch"])
    expected = real.openpi_sample(model, given)
    assert_close(sample(tmp_path / "ours", given), expected)
    run(tmp_path / "ours", tmp_path / "back", "--to=openpi-pytorch")
    from safetensors.torch import load_model

    again = real.openpi_model(seed + 1)
    load_model(again, tmp_path / "back" / "model.safetensors", strict=True)
    np.testing.assert_array_equal(real.openpi_sample(again, given), expected)


def test_lerobots_policy_of_today(tmp_path):
    need("lerobot.policies.pi05.modeling_pi05")
    seed = fresh_seed(__name__, "test_lerobots_policy_of_today")
    policy, given = real.lerobot_policy(seed), real.inputs(seed)
    real.lerobot_save(policy, tmp_path / "source", seed)
    run(tmp_path / "source", tmp_path / "ours", *FLAGS["lerobot"])
    expected = real.lerobot_sample(policy, given)
    assert_close(sample(tmp_path / "ours", given)[..., : real.REAL_ACTIONS], expected)
    run(tmp_path / "ours", tmp_path / "back", "--to=lerobot")
    again = real.lerobot_load(tmp_path / "back")
    np.testing.assert_array_equal(real.lerobot_sample(again, given), expected)
    from lerobot.processor import PolicyProcessorPipeline

    after = PolicyProcessorPipeline.from_pretrained(tmp_path / "back", config_filename="policy_postprocessor.json")
    stats = real.statistics(seed)["actions"]
    np.testing.assert_array_equal(after.steps[0].stats["action"]["q99"], stats["q99"])
