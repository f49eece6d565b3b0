import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_policy as tiny

from z1_jax import stages
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import (
    Config,
    ConfigError,
    DemosConfig,
    EnvConfig,
    EvalConfig,
    FlowConfig,
    InputsConfig,
    ModelConfig,
    SftConfig,
)
from z1_jax.data.tokenizer import train_small_tokenizer
from z1_jax.initial_policy import check_policy, dataset_statistics, given_policy, new_policy
from z1_jax.metrics import MetricsWriter
from z1_jax.models.presets import get_preset
from z1_jax.rl.actor import act, make_actor
from z1_jax.run_dir import claim_directory, policy_identity
from z1_jax.stages import demonstrations

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
WRIST = "robot0_eye_in_hand"


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
        tokenizer=str(tmp_path / "own.model"), state_in_prompt=False, norm="z_score", slots=("none", WRIST)
    )
    config = dataclasses.replace(config, inputs=inputs, env=EnvConfig(workers=0, cameras=(WRIST,), image_size=32))
    policy = new_policy(config, dataset, tiny.one_device())
    seen = policy.processor
    assert seen.tokenizer.model_bytes == (tmp_path / "own.model").read_bytes()
    assert (seen.norm_mode, seen.state_in_prompt, seen.cameras) == ("z_score", False, (None, WRIST))
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


def stored(directory: pathlib.Path, step: int, **changes: object) -> str:
    checkpoints = Checkpoints(directory)
    checkpoints.save(step, tiny.policy().parts(), {**tiny.policy().document(), **changes})
    checkpoints.close()
    return str(directory)


def test_a_policy_acts_with_as_many_denoising_steps_as_it_was_made_for(tmp_path):
    ten = stored(tmp_path / "ten", 3, denoising_steps=10)
    four = stored(tmp_path / "four", 3)
    config = parse_command_line(
        ["", f"--config={CONFIGS / 'eval.py'}", f"--config.checkpoint={ten}", f"--config.env.cameras={tiny.CAMERA}"]
    )
    assert config.flow.steps == 0 and stages.check_inputs(config).flow.steps == 10
    assert given_policy(config, ten, tiny.one_device()).denoising_steps == 10
    asked = dataclasses.replace(config, flow=FlowConfig(steps=6))
    assert stages.check_inputs(asked) == asked
    assert given_policy(asked, ten, tiny.one_device()).document()["denoising_steps"] == 6
    two = dataclasses.replace(config, compare=four)
    with pytest.raises(ConfigError, match="flow.steps: got 0, but .*/ten acts with 10 and .*/four acts with 4: give"):
        stages.check_inputs(two)


def chains(policy) -> np.ndarray:
    """The chains [4, K + 1, H, A] of one observation under four ids, by the ODE sampler."""
    mesh = tiny.one_device()
    graphdef, *params = policy.split("expert")
    actor = make_actor(policy, graphdef, FlowConfig(steps=2), mesh, 4)
    ids = np.arange(4)[:, None, None]
    acted = act(actor, (params[0], params[1]), policy.processor, [tiny.make_env().observe()] * 4, ids, (0,), executed=8)
    return acted.chain.x[:, 0]


def test_the_temperature_is_the_policys_own_or_the_configs(tmp_path):
    mesh = tiny.one_device()
    cold, plain = stored(tmp_path / "cold", 3, temperature=0.25), stored(tmp_path / "plain", 3)
    config = Config(algorithm="grpo", env=EnvConfig(cameras=(tiny.CAMERA,)))
    assert given_policy(config, plain, mesh).temperature == 1 and "temperature" not in tiny.policy().document()
    own = given_policy(config, cold, mesh)
    assert own.temperature == own.document()["temperature"] == 0.25
    zero = given_policy(dataclasses.replace(config, flow=FlowConfig(temperature=0.0)), cold, mesh)
    assert zero.temperature == zero.document()["temperature"] == 0  # not lost for being nothing
    full = chains(given_policy(config, plain, mesh))
    np.testing.assert_array_equal(chains(own)[:, 0], np.float32(0.25) * full[:, 0])
    still = chains(zero)
    assert not still[:, 0].any() and (still == still[:1]).all() and not (full == full[:1]).all()
    identities = {policy_identity(path) for path in (cold, plain, stored(tmp_path / "zero", 3, temperature=0.0))}
    assert len(identities) == 3


def test_a_policy_of_other_environments_is_refused(tmp_path):
    narrow = {"mean": [0.0] * 7, "std": [1.0] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7}
    path = stored(tmp_path, 3, norm_stats={**tiny.policy().document()["norm_stats"], "actions": narrow})
    config = Config(algorithm="eval", env=EnvConfig(cameras=(tiny.CAMERA,)))
    with pytest.raises(ConfigError, match="kitchen has actions of width 12, the policy .* of width 7"):
        check_policy(config, path)
    check_policy(dataclasses.replace(config, eval=EvalConfig(episodes=0)), path)


def test_a_policy_without_statistics_takes_those_of_its_own_kind_of_actions(tmp_path):
    """Also without environments to evaluate in, and where its actions are relative to the state."""
    bare = stored(tmp_path / "bare", 3, norm_stats={})
    env = EnvConfig(cameras=(tiny.CAMERA,), workers=0)
    with pytest.raises(ConfigError, match="config key compare: .* has no normalisation statistics"):
        check_policy(Config(algorithm="eval", checkpoint="x", compare=bare, env=env), bare)
    dataset = demonstrations(make_config(episodes=1), tmp_path / "data")
    config = Config(algorithm="sft", init=bare, env=env, demos=DemosConfig(dataset=str(dataset.path)))
    for episodes in (2, 0):
        assert stages.check_inputs(dataclasses.replace(config, eval=EvalConfig(episodes=episodes))).init
    relative = stored(tmp_path / "relative", 3, norm_stats={}, relative_actions={"mask": [True, False]})
    offsets = given_policy(config, relative, tiny.one_device(), dataset).processor.stats["actions"]
    records = dataset.records(range(len(dataset)))
    expected = np.concatenate([record.actions[:, 0] - record.state[0] for record in records])
    assert offsets.mean[0] == pytest.approx(expected.mean()) and offsets.mean[1] == dataset.stats["actions"].mean[1]


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_keeps_to_the_checkpoint_that_it_began_with(relative, tmp_path, monkeypatch):
    """Also where the run that `init` names goes on and adds others."""
    monkeypatch.chdir(tmp_path)
    given = "other" if relative else str(tmp_path / "other")
    sft = tmp_path / "other" / "checkpoints" / "sft"
    stored(sft, 3)
    env, model = EnvConfig(cameras=(tiny.CAMERA,)), ModelConfig()
    config = Config(init=given, env=env, model=model, run_dir=str(tmp_path / "mine"))
    began = stages.check_inputs(config)
    assert began.init == f"{given}/checkpoints/sft/3"
    claim_directory(began)
    stored(sft, 4)
    assert stages.check_inputs(config) == began
    assert stages.check_inputs(dataclasses.replace(config, init=began.init)) == began
    fresh = dataclasses.replace(config, run_dir=str(tmp_path / "another"))
    assert stages.check_inputs(fresh).init == f"{given}/checkpoints/sft/4"
    elsewhere = dataclasses.replace(config, init=f"{given}/checkpoints/sft/4")
    with pytest.raises(ConfigError, match="belongs to another config .init is"):
        claim_directory(stages.check_inputs(elsewhere))


def test_cameras_that_no_environment_has_lead_to_the_conversion(tmp_path):
    """A policy that was converted without --cameras has the names of openpi's slots; the cure is no config key."""
    path = stored(tmp_path, 3, cameras=["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"])
    config = Config(algorithm="eval", env=EnvConfig(cameras=("robot0_agentview_left", WRIST)))
    with pytest.raises(
        ConfigError, match=f"convert it again with --cameras=robot0_agentview_left,{WRIST},none"
    ) as told:
        check_policy(config, path)
    assert "set --config.env.cameras" not in str(told.value)
    with pytest.raises(ConfigError, match=f"set --config.env.cameras={tiny.CAMERA}"):  # a name that there is
        check_policy(config, stored(tmp_path / "named", 3))


def test_a_policy_without_statistics_acts_only_after_sft(tmp_path, capsys):
    path = stored(tmp_path / "bare", 3, norm_stats={})
    env = EnvConfig(workers=0, cameras=(tiny.CAMERA,), image_size=tiny.PIXELS)
    for algorithm, key in (("eval", "checkpoint"), ("grpo", "init")):
        with pytest.raises(ConfigError, match=f"config key {key}: .* has no normalisation statistics; SFT on"):
            check_policy(dataclasses.replace(Config(env=env), algorithm=algorithm), path)
    config = make_config(episodes=2)
    dataset = demonstrations(config, tmp_path / "data")
    sft = SftConfig(steps=1, batch_size=4, flows=1)
    config = dataclasses.replace(config, algorithm="sft", init=path, env=env, sft=sft)
    assert stages.check_inputs(config).init.endswith("/bare/3")
    config = dataclasses.replace(config, demos=DemosConfig(dataset=str(dataset.path)), eval=EvalConfig(episodes=0))
    assert stages.check_inputs(config).init.endswith("/bare/3")
    with MetricsWriter(tmp_path / "run") as writer:
        trained = stages.supervised_policy(config, dataset, tiny.one_device(), tmp_path / "sft", writer)
    assert "has no normalisation statistics: it takes those of" in capsys.readouterr().out
    for key, stats in dataset_statistics(dataset, None).items():
        np.testing.assert_array_equal(trained.processor.stats[key].mean, stats.mean)
    saved = given_policy(dataclasses.replace(config, algorithm="eval"), str(tmp_path / "sft"), tiny.one_device())
    np.testing.assert_array_equal(saved.processor.stats["actions"].q99, trained.processor.stats["actions"].q99)
    # One that has statistics keeps its own.
    own = given_policy(config, stored(tmp_path / "own", 3), tiny.one_device(), dataset)
    np.testing.assert_array_equal(own.processor.stats["state"].q99, tiny.processor().stats["state"].q99)
