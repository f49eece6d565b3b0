import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from envs import demos
from envs.base import Episode
from envs.kitchen import LAYOUT_SPLITS
from z1_jax import initial_policy, stages
from z1_jax.checkpoint import Checkpoints
from z1_jax.collect.__main__ import parse_arguments
from z1_jax.config.schema import Config, ConfigError, DemosConfig, EnvConfig, InputsConfig, SftConfig
from z1_jax.errors import UserError
from z1_jax.initial_policy import check_policy
from z1_jax.stages import check_inputs, demonstrations, supervised_policy
from z1_jax.suites import make_env
from z1_jax.worlds import World

CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right")


def make_config(seed: int = 0, **demos: object) -> Config:
    return Config(task="OpenDrawer", seed=seed, demos=DemosConfig(**{"episodes": 3, **demos}), env=EnvConfig(workers=0))


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_collection_ends_in_the_same_dataset(stop_after, rng, tmp_path, monkeypatch, capsys):
    config = make_config(seed=int(rng.integers(9_999)))
    whole = demonstrations(config, tmp_path / "whole")

    simulate, simulated = demos.run_episode, []

    def interrupted(who, env, episode, *args):
        if len(simulated) == stop_after:
            raise KeyboardInterrupt
        simulated.append(episode)
        return simulate(who, env, episode, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demos, "run_episode", interrupted)
        demonstrations(config, tmp_path / "data")
    assert not (tmp_path / "data").exists() and len(simulated) == stop_after

    def counted(who, env, episode, *args):
        assert episode not in simulated, "a finished episode was simulated again"
        return simulate(who, env, episode, *args)

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
    """It is trained with its own inputs, and predicts chunks of its own length, whatever the preset's."""
    directory = tmp_path / "checkpoints" / "sft"
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    sft = dataclasses.replace(make_config(), algorithm="sft", init=str(tmp_path))
    sft = dataclasses.replace(sft, env=dataclasses.replace(sft.env, cameras=(tiny.CAMERA,)))
    monkeypatch.setattr(initial_policy, "configured_model", lambda config: tiny.CONFIG)
    check_policy(sft, sft.init)
    started = {}
    monkeypatch.setattr(stages, "dataset_world", lambda dataset, tasks: World("", tasks=("Juggle",)))
    monkeypatch.setattr(stages, "train_sft", lambda policy, *args, **kwargs: started.update(policy=policy, **kwargs))
    supervised_policy(sft, None, tiny.one_device(), tmp_path / "new", None)
    for a, b in zip(jax.tree.leaves(started["policy"].params), jax.tree.leaves(tiny.policy().params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert started["adapters"] == sft.lora and started["policy"].world["tasks"] == ["Juggle"]
    shorter = {**tiny.policy().document(), "architecture": {**tiny.policy().document()["architecture"], "horizon": 7}}
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, tiny.policy().parts(), shorter)
    checkpoints.close()
    check_policy(dataclasses.replace(sft, env=dataclasses.replace(sft.env, executed=7)), sft.init)
    with pytest.raises(ConfigError, match="env.executed: got 8, but the policy predicts chunks of 7 steps"):
        check_policy(dataclasses.replace(sft, env=dataclasses.replace(sft.env, executed=8)), sft.init)
    assert stages.demonstrations_source(sft)["chunk"] == 7


def test_a_damaged_sft_policy_is_moved_aside_and_trained_again(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(make_config(), sft=SftConfig(steps=3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    monkeypatch.setattr(stages, "train_sft", lambda *args, **kwargs: "trained")
    monkeypatch.setattr(initial_policy, "new_policy", lambda *args: tiny.policy())
    monkeypatch.setattr(stages, "dataset_world", lambda dataset, tasks: World(""))
    assert supervised_policy(config, None, tiny.one_device(), tmp_path, None) != "trained"
    array = next(path for path in sorted((tmp_path / "3" / "params").rglob("*")) if path.stat().st_size > 1000)
    array.write_bytes(array.read_bytes()[:-100])
    assert supervised_policy(config, None, tiny.one_device(), tmp_path, None) == "trained"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "warning: checkpoint" in out and "moved aside" in out
    assert [path.name for path in tmp_path.iterdir()] == ["3.damaged"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"dataset": "another"}, {"batch_size": 8}, {"records": 5}])
def test_a_finished_sft_policy_of_another_run_is_refused(change, tmp_path):
    config = dataclasses.replace(make_config(), sft=SftConfig(steps=3))
    dataset = types.SimpleNamespace(identity="mine", records_of=lambda tasks: None)
    loader = {"dataset": "mine", "seed": 0, "batch_size": config.sft.batch_size, "position": {"next_index": 3}}
    for name, told in (("own", loader), ("copied", {**loader, **change})):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(3, tiny.policy().parts(), {**tiny.policy().document(), "loader": told})
        checkpoints.close()
    supervised_policy(config, dataset, tiny.one_device(), tmp_path / "own", None)
    (key,) = change
    with pytest.raises(UserError, match=f"copied/3 was trained with {key}={change[key]!r}, .*: it is another run's"):
        supervised_policy(config, dataset, tiny.one_device(), tmp_path / "copied", None)
    assert (tmp_path / "copied" / "3").is_dir()


def test_too_many_failures_are_told(tmp_path, monkeypatch, capsys):
    simulate = demos.run_episode

    def failing(*args):
        return dataclasses.replace(simulate(*args), success=False)

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


def test_the_split_of_a_config_reaches_environments_and_demonstrations(tmp_path, capsys):
    config = make_config(episodes=2)
    heldout = dataclasses.replace(config.env, layouts=("heldout",), styles=("heldout",), objects=("heldout",))
    changed = dataclasses.replace(config, env=heldout)
    env = make_env(changed, "OpenDrawer")()
    env.reset(Episode(1))
    assert env.layout in LAYOUT_SPLITS["heldout"] and env.objects == "heldout"
    assert (make_env(config, "OpenDrawer")().layout, make_env(config, "OpenDrawer")().objects) == ("straight", "train")
    dataset = demonstrations(changed, tmp_path / "data")
    assert [dataset.source[key] for key in ("layouts", "styles", "objects")] == [["heldout"]] * 3
    assert dataset.identity != demonstrations(config, tmp_path / "other").identity
    options = ["--layouts=heldout", "--styles=heldout", "--objects=heldout", "--workers=0"]
    assert parse_arguments(["OpenDrawer", "--out=somewhere", *options])[0].env == heldout


def test_a_run_that_began_under_an_older_rule_of_what_is_constant_goes_on_under_it(tmp_path, monkeypatch, capsys):
    """Checkpoints from before name no rule: what moved less than 1e-3 was held."""
    config = make_config(episodes=1)
    dataset = demonstrations(config, tmp_path / "data")
    document = tiny.policy().document()
    old = {key: {k: v for k, v in value.items() if k != "rule"} for key, value in document["norm_stats"].items()}
    checkpoints = Checkpoints(tmp_path / "sft")
    checkpoints.save(2, tiny.policy().parts(), {**document, "norm_stats": old})
    checkpoints.close()
    started = []
    monkeypatch.setattr(stages, "train_sft", lambda policy, *args, **kwargs: started.append(policy))
    for directory in ("sft", "fresh"):
        supervised_policy(config, dataset, tiny.one_device(), tmp_path / directory, None)
    rules = [{key: value.rule for key, value in policy.processor.stats.items()} for policy in started]
    assert rules == [{"state": "millimetre", "actions": "millimetre"}, {"state": "millimetre", "actions": "guard"}]
