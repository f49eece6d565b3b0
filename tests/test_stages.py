import dataclasses

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from envs.kitchen import LAYOUT_SPLITS, demos
from z1_jax import stages
from z1_jax.checkpoint import Checkpoints
from z1_jax.collect import parse_arguments
from z1_jax.config import Config, ConfigError, DemosConfig, EnvConfig, InputsConfig, ModelConfig, SftConfig
from z1_jax.data.tokenizer import train_small_tokenizer
from z1_jax.errors import UserError
from z1_jax.models.presets import get_preset
from z1_jax.stages import check_inputs, check_policy, demonstrations, make_env, new_policy, supervised_policy

CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right")


def make_config(seed: int = 0, **demos: object) -> Config:
    return Config(task="OpenDrawer", seed=seed, demos=DemosConfig(**{"episodes": 3, **demos}), env=EnvConfig(workers=0))


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_collection_ends_in_the_same_dataset(stop_after, rng, tmp_path, monkeypatch, capsys):
    config = make_config(seed=int(rng.integers(9_999)))
    whole = demonstrations(config, tmp_path / "whole")

    simulate, simulated = demos.run_episode, []

    def interrupted(env, seed, *args):
        if len(simulated) == stop_after:
            raise KeyboardInterrupt
        simulated.append(seed)
        return simulate(env, seed, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demos, "run_episode", interrupted)
        demonstrations(config, tmp_path / "data")
    assert not (tmp_path / "data").exists() and len(simulated) == stop_after

    def counted(env, seed, *args):
        assert seed not in simulated, "a finished episode was simulated again"
        return simulate(env, seed, *args)

    monkeypatch.setattr(demos, "run_episode", counted)
    resumed = demonstrations(config, tmp_path / "data")
    assert resumed.identity == whole.identity
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("whole", "data")] == []


def test_a_given_dataset_replaces_the_collection_where_it_fits(tmp_path, capsys):
    dataset = demonstrations(make_config(episodes=1), tmp_path / "data")
    config = make_config(episodes=50, dataset=str(tmp_path / "data"))
    capsys.readouterr()
    assert demonstrations(config, tmp_path / "unused").identity == dataset.identity
    assert "the other keys of demos have no effect" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()
    other = dataclasses.replace(config.env, cameras=("robot0_agentview_right", "robot0_eye_in_hand"))
    with pytest.raises(ConfigError, match="env.cameras: got robot0_agentview_right, the dataset .* has"):
        check_inputs(dataclasses.replace(config, env=other))


def test_sft_goes_on_from_a_policy_that_is_given(tmp_path, monkeypatch):
    """It is trained with its own inputs; one that predicts other chunks than the preset's is refused."""
    directory = tmp_path / "checkpoints" / "sft"
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    sft = dataclasses.replace(make_config(), algorithm="sft", init=str(tmp_path))
    sft = dataclasses.replace(sft, env=dataclasses.replace(sft.env, cameras=(tiny.CAMERA,)))
    monkeypatch.setattr(stages, "architecture", lambda config: tiny.CONFIG)
    check_policy(sft, sft.init)
    started = {}
    monkeypatch.setattr(stages, "train_sft", lambda policy, *args, **kwargs: started.update(policy=policy, **kwargs))
    supervised_policy(sft, None, tiny.one_device(), tmp_path / "new", None)
    for a, b in zip(jax.tree.leaves(started["policy"].params), jax.tree.leaves(tiny.policy().params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert started["adapters"] == sft.lora
    shorter = {**tiny.policy().document(), "architecture": {**tiny.policy().document()["architecture"], "horizon": 7}}
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, tiny.policy().parts(), shorter)
    checkpoints.close()
    with pytest.raises(ConfigError, match="model.preset: kitchen predicts chunks of 8 steps, the policy .* of 7"):
        check_policy(sft, sft.init)


def test_a_damaged_sft_policy_is_moved_aside_and_trained_again(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(make_config(), sft=SftConfig(steps=3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    monkeypatch.setattr(stages, "train_sft", lambda *args, **kwargs: "trained")
    monkeypatch.setattr(stages, "new_policy", lambda *args: None)
    assert supervised_policy(config, None, tiny.one_device(), tmp_path, None) != "trained"
    array = next(path for path in sorted((tmp_path / "3" / "params").rglob("*")) if path.stat().st_size > 1000)
    array.write_bytes(array.read_bytes()[:-100])
    assert supervised_policy(config, None, tiny.one_device(), tmp_path, None) == "trained"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "warning: checkpoint" in out and "moved aside" in out
    assert [path.name for path in tmp_path.iterdir()] == ["3.damaged"]


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


def test_too_many_failures_are_told(tmp_path, monkeypatch, capsys):
    simulate = demos.run_episode

    def failing(env, seed, *args):
        return dataclasses.replace(simulate(env, seed, *args), success=False)

    monkeypatch.setattr(demos, "run_episode", failing)
    with pytest.raises(UserError, match="OpenDrawer succeeded only 0 times in 3 tries, 1 wanted"):
        demonstrations(make_config(episodes=1), tmp_path / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "Juggle"}, "task: 'Juggle' does not exist; known: TurnOnSinkFaucet"),
        ({"init": "/nowhere"}, "no policy at /nowhere"),
        ({"demos": DemosConfig(dataset="/nowhere")}, "dataset /nowhere does not exist"),
        ({"env": EnvConfig(cameras=CAMERAS)}, "model.preset=kitchen sees at most 2"),
        ({"inputs": InputsConfig(tokenizer="/nowhere.model")}, "no tokenizer at /nowhere.model; expected PaliGemma's"),
        ({"env": EnvConfig(layouts=("round",))}, "env.layouts: 'round' does not exist; known: straight, .*heldout"),
        ({"env": EnvConfig(styles=("oak", "gold"))}, "env.styles: 'gold' does not exist; known: oak"),
        ({"env": EnvConfig(objects=())}, "env.objects: got nothing, expected one or more of train, heldout"),
    ],
)
def test_what_a_config_names_is_checked_before_the_run(change, message):
    with pytest.raises(UserError, match=message):
        check_inputs(dataclasses.replace(make_config(), **change))


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


def test_the_split_of_a_config_reaches_environments_and_demonstrations(tmp_path, capsys):
    config = make_config(episodes=2)
    heldout = dataclasses.replace(config.env, layouts=("heldout",), styles=("heldout",), objects=("heldout",))
    changed = dataclasses.replace(config, env=heldout)
    env = make_env(changed, "OpenDrawer")()
    env.reset(1)
    assert env.layout in LAYOUT_SPLITS["heldout"] and env.objects == "heldout"
    assert (make_env(config, "OpenDrawer")().layout, make_env(config, "OpenDrawer")().objects) == ("straight", "train")
    dataset = demonstrations(changed, tmp_path / "data")
    assert [dataset.source[key] for key in ("layouts", "styles", "objects")] == [["heldout"]] * 3
    assert dataset.identity != demonstrations(config, tmp_path / "other").identity
    options = ["--layouts=heldout", "--styles=heldout", "--objects=heldout", "--workers=0"]
    assert parse_arguments(["OpenDrawer", "--out=somewhere", *options])[0].env == heldout
