import dataclasses

import pytest
import tiny_policy as tiny

from z1_jax.checkpoint import Checkpoints
from z1_jax.config import Config, ConfigError, DemosConfig, EnvConfig, InputsConfig, ModelConfig
from z1_jax.data.tokenizer import train_small_tokenizer
from z1_jax.models.presets import get_preset
from z1_jax.policies import check_policy, new_policy
from z1_jax.stages import demonstrations

CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right")


def make_config(seed: int = 0, **demos: object) -> Config:
    return Config(task="OpenDrawer", seed=seed, demos=DemosConfig(**{"episodes": 3, **demos}), env=EnvConfig(workers=0))


def test_a_preset_of_another_size_than_the_policy_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    config = get_preset("mid", prompt_length=48)
    document = {**tiny.policy().document(), "architecture": dataclasses.asdict(config)}
    checkpoints.save(3, tiny.policy().parts(), document)
    checkpoints.close()
    given = Config(algorithm="eval", env=EnvConfig(cameras=(tiny.CAMERA,)))
    for preset in ("kitchen", "mid"):  # the default gives way; the policy's own, with prompts of another length
        check_policy(dataclasses.replace(given, model=ModelConfig(preset=preset)), str(tmp_path))
    with pytest.raises(
        ConfigError, match="model.preset: got pi05, whose vision is .* keeps its own, .*leave model.preset"
    ):
        check_policy(dataclasses.replace(given, model=ModelConfig(preset="pi05")), str(tmp_path))
    with pytest.raises(ConfigError, match="model.dtype: got bfloat16; .* computes in float32 and keeps that: leave"):
        check_policy(dataclasses.replace(given, model=ModelConfig(dtype="bfloat16")), str(tmp_path))


def test_a_fresh_policy_sees_as_the_config_says(tmp_path, capsys):
    config = make_config(episodes=1)
    dataset = demonstrations(config, tmp_path / "data")
    train_small_tokenizer(["open the drawer"], tmp_path / "own.model", vocab_size=480)
    inputs = InputsConfig(
        tokenizer=str(tmp_path / "own.model"), state_in_prompt=False, norm="z_score", slots=("none", CAMERAS[1])
    )
    config = dataclasses.replace(config, inputs=inputs, env=EnvConfig(workers=0, cameras=CAMERAS[1:2], image_size=32))
    policy = new_policy(config, dataset, tiny.one_device())
    seen = policy.processor
    assert seen.tokenizer.model_bytes == (tmp_path / "own.model").read_bytes()
    assert (seen.norm_mode, seen.state_in_prompt, seen.cameras) == ("z_score", False, (None, CAMERAS[1]))
    record = dataset.records([0])[0]
    observation = seen.observation([record])
    assert observation.images.shape == (1, 1, 64, 64, 3)  # frames of any size, one for each camera
    assert observation.token_mask.sum() < 30  # no state
    stats = dataset.stats["actions"]
    expected = (record.actions - stats.mean) / (stats.std + 1e-6)
    moving = ~stats.constant
    got = seen.model_actions(record.actions)[..., : stats.dim]
    assert abs(got - expected)[..., moving].max() < 1e-4


def test_input_settings_that_a_policy_would_ignore_are_refused(tmp_path):
    policy = tiny.policy()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, policy.parts(), policy.document())
    checkpoints.close()
    train_small_tokenizer(["dance"], tmp_path / "other.model")
    config = Config(env=EnvConfig(cameras=(tiny.CAMERA,), image_size=tiny.PIXELS))
    check_policy(config, str(tmp_path))
    for key, value in (
        ("norm", "z_score"),
        ("state_in_prompt", False),
        ("slots", ("none", tiny.CAMERA)),
        ("tokenizer", str(tmp_path / "other.model")),
    ):
        with pytest.raises(ConfigError, match=f"inputs.{key}: got .* keeps it: leave inputs.{key} out"):
            check_policy(dataclasses.replace(config, inputs=InputsConfig(**{key: value})), str(tmp_path))
    check_policy(dataclasses.replace(config, inputs=InputsConfig(slots=(tiny.CAMERA,))), str(tmp_path))
