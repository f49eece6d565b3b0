"""The suites as a config chooses them, without a simulator: refusals, protocol, and policies that have seen no data."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from envs.robocasa import compat, standin, tables
from z1_jax import initial_policy, run_dir, stages, suites
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def parse(file: str, *arguments: str) -> Config:
    config = parse_command_line(["main", f"--config={CONFIGS / file}", *arguments])
    suites.check_settings(config)
    return config


def standin_config(*arguments: str) -> Config:
    return parse("grpo.py:robocasa_standin", *arguments)


@pytest.fixture(params=["v0.2", "v1"])
def installed(request, monkeypatch, tmp_path) -> compat.Installation:
    """As if RoboCasa of a version were installed with its assets."""
    found = compat.Installation(request.param, {"v0.2": "0.2.0", "v1": "1.0.1"}[request.param], tmp_path)
    monkeypatch.setattr(compat, "find", lambda: found)
    monkeypatch.setattr(compat, "check", lambda standins: found)
    monkeypatch.setattr(compat, "versions", lambda: {"robocasa": found.version, "mujoco": "3.3.1"})
    return found


@pytest.mark.parametrize(
    ("file", "arguments", "parts"),
    [
        ("grpo.py", ["--config.env.scenes=1/1"], ["env.scenes", "only env.suite=robocasa has"]),
        ("grpo.py", ["--config.env.protocol=rlinf"], ["env.protocol", "only env.suite=libero and metaworld has"]),
        ("grpo.py", ["--config.env.standins=true"], ["env.standins", "only env.suite=robocasa has"]),
        ("grpo.py", ["--config.eval.objects=heldout"], ["eval.objects", "only env.suite=robocasa has"]),
        ("grpo.py:robocasa", ["--config.env.layouts=train"], ["env.layouts", "only env.suite=kitchen has"]),
        ("grpo.py:robocasa", ["--config.env.scenes="], ["env.scenes", "got nothing", "training"]),
        ("grpo.py:robocasa", ["--config.eval.scenes="], ["eval.scenes", "got nothing", "evaluation"]),
        ("grpo.py:robocasa", ["--config.env.objects=train,heldout"], ["env.objects", "expected one split"]),
        ("grpo.py:robocasa", ["--config.init="], ["demos.dataset", "no scripted expert", "collect --from"]),
        ("sft.py:robocasa", ["--config.demos.dataset="], ["demos.dataset", "no scripted expert"]),
        ("sft.py:robocasa", ["--config.init=random"], ["init: got random with algorithm=sft", "expected grpo"]),
        ("grpo.py", ["--config.env.suite=calvin"], ["env.suite", "'calvin'", "kitchen, robocasa, libero, metaworld"]),
    ],
)
def test_what_a_suite_does_not_offer_is_refused(file, arguments, parts):
    with pytest.raises(ConfigError) as error:
        parse(file, *arguments)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("task=OpenDrawr", ["config key task", "unknown RoboCasa task"]),
        ("env.scenes=99/1", ["config key env.scenes", "unknown RoboCasa scene '99/1'"]),
        ("eval.scenes=test", ["config key eval.scenes", "unknown RoboCasa scene 'test'"]),
        ("env.objects=A", ["config key env.objects", "train, heldout, all"]),
        ("eval.objects=B", ["config key eval.objects", "train, heldout, all"]),
        ("env.cameras=robot0_agentview_left,top", ["config key env.cameras", "'top' does not exist"]),
        ("env.version=0.1.0", ["config key env.version: got 0.1.0, installed is RoboCasa"]),
        ("env.executed=9", ["config key env.executed", "at most 8"]),
        ("group.prefix_chunks=4", ["group.prefix_chunks", "4 chunks of 4"]),
    ],
)
def test_names_that_robocasa_does_not_have(argument, parts, installed):
    with pytest.raises(ConfigError) as error:
        stages.check_inputs(standin_config(f"--config.{argument}"))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_a_missing_installation_names_the_key(monkeypatch):
    def absent(standins):
        raise ValueError("RoboCasa is not installed: pip install it")

    monkeypatch.setattr(compat, "check", absent)
    for check in (stages.check_inputs, suites.settled):
        with pytest.raises(ConfigError, match="config key env.suite: RoboCasa is not installed: pip install it"):
            check(standin_config())
    suites.settled(Config())  # the kitchen asks nobody


def test_an_environment_gets_what_the_config_says(installed):
    config = standin_config("--config.task=PnPCounterToCab", "--config.env.objects=all")
    made = suites.make_env(config, config.task)
    name = {"v0.2": "PnPCounterToCab", "v1": "PickPlaceCounterToCabinet"}[installed.api]
    assert made.args == (name,)
    assert made.keywords == {
        "cameras": config.env.cameras,
        "image_size": 64,
        "horizon": 16,
        "scenes": ("1/1",),
        "objects": "all",
        "heldout_scenes": ("evaluation",),
        "heldout_objects": "heldout",
        "heldout_seed": config.eval.first_seed,
        "standins": True,
    }
    assert suites.episode_steps(config) == 16
    own = dataclasses.replace(config, env=dataclasses.replace(config.env, horizon=0))
    assert suites.episode_steps(own) == {"v0.2": 500, "v1": 750}[installed.api]


def test_a_run_belongs_to_one_version_of_robocasa(installed, tmp_path):
    config = suites.settled(standin_config(f"--config.run_dir={tmp_path / 'run'}"))
    assert config.env.version == installed.version
    run_dir.claim_directory(config)
    run_dir.claim_directory(config)
    other = dataclasses.replace(config, env=dataclasses.replace(config.env, version="9.9"))
    with pytest.raises(ConfigError, match="belongs to another config .env.version"):
        run_dir.claim_directory(other)


def test_the_benchmarks_settings_stand_in_the_preset():
    config = parse("grpo.py:robocasa")
    left, wrist, right = "robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right"
    assert config.inputs.slots == config.env.cameras == (left, wrist, right)  # base, left wrist, right wrist
    assert (config.model.preset, config.env.executed, config.flow.steps) == ("pi05", 5, 10)
    assert (config.eval.episodes, config.eval.scenes, config.eval.objects) == (50, ("evaluation",), "heldout")
    for file, *arguments in (("sft.py:robocasa",), ("eval.py:robocasa", "--config.checkpoint=somewhere")):
        other = parse(file, *arguments)
        assert (other.env, other.eval, other.inputs) == (config.env, config.eval, config.inputs)


@pytest.mark.parametrize(
    ("version", "steps", "missing"),
    [("", 700, "PickPlaceCounterToSink"), ("0.2.0", 700, "OpenCabinet"), ("1.0.1", 600, "OpenSingleDoor")],
)
def test_a_plan_needs_no_robocasa(version, steps, missing, monkeypatch):
    """Horizons as its repository has them: PnPCounterToSink 700 in v0.2, PickPlaceCounterToSink 600 in v1.0.1."""

    def absent() -> compat.Installation:
        raise ValueError("RoboCasa is not installed")

    monkeypatch.setattr(compat, "find", absent)
    arguments = ("--config.task=PnPCounterToSink", f"--config.env.version={version}")
    config = parse("grpo.py:robocasa", *arguments)
    with pytest.raises(ConfigError, match="not installed"):
        suites.make_env(config, config.task)
    assert suites.planned(config).env == dataclasses.replace(config.env, horizon=steps)
    given = dataclasses.replace(config, env=dataclasses.replace(config.env, horizon=40))
    assert suites.planned(given) == given
    with pytest.raises(ConfigError, match="config key task: .*RoboCasa"):
        suites.planned(dataclasses.replace(config, task=missing))


def test_a_plan_takes_the_version_that_is_installed(installed):
    config = parse("grpo.py:robocasa", "--config.task=CoffeePressButton")
    assert suites.planned(config).env.horizon == 300
    other = parse("grpo.py:robocasa", "--config.env.version=0.9")
    with pytest.raises(ConfigError, match=f"env.version: got 0.9, installed is RoboCasa {installed.version}"):
        suites.planned(other)


def test_the_protocol_says_what_success_depends_on_and_figures_are_labelled(installed, tmp_path, capsys):
    config = standin_config(f"--config.run_dir={tmp_path}", "--config.eval.episodes=50", "--config.env.horizon=0")
    policy = tiny.policy(3)
    run_dir.conclude(config, policy, tmp_path, run_dir.StageClock(tmp_path / "wall.json"), {}, "It succeeded in 0.0 %")
    summary = json.loads((tmp_path / "summary.json").read_text())
    protocol = summary["protocol"]
    assert protocol["suite"] == "robocasa" and protocol["versions"]["robocasa"] == installed.version
    assert protocol["scenes"] == [f"{a}/{b}" for a, b in tables.SCENES[installed.api]["evaluation"]]
    assert protocol["episodes_per_scene"] == {"v0.2": 10, "v1": 5}[installed.api]
    assert protocol["objects"] == {"v0.2": "heldout (B)", "v1": "heldout (target)"}[installed.api]
    assert protocol["horizon"] == {"v0.2": 500, "v1": 600}[installed.api]
    assert protocol["slots"] == list(policy.processor.cameras) and protocol["image_size"] == 64
    assert protocol["executed_steps_per_chunk"] == policy.executed and protocol["denoising_steps"] == 4
    for text in (
        summary["sentence"],
        protocol["assets"],
        (tmp_path / "report.html").read_text(),
        capsys.readouterr().out,
    ):
        assert standin.LABEL in text
    assert "standins" in standin_config().directory.name

    real = dataclasses.replace(config, env=dataclasses.replace(config.env, standins=False))
    assert suites.label(real) == "" and suites.facts(real)["assets"] == "downloaded"


def test_an_untrained_policy_takes_the_ranges_of_state_and_action(rng):
    config = standin_config("--config.env.executed=3")
    mesh = stages.make_mesh(config)
    with jax.set_mesh(mesh):
        policy = initial_policy.untrained_policy(config, mesh)
    assert policy.executed == 3
    low, high = map(np.array, zip(*tables.state_bounds(), strict=True))
    states = rng.uniform(low, high, (50, tables.STATE_DIM))
    expected = 2 * (states - low) / (high - low) - 1
    np.testing.assert_allclose(policy.processor.model_states(states), expected, atol=1e-4)
    actions = rng.uniform(-1, 1, (7, policy.config.horizon, tables.ACTION_DIM))
    np.testing.assert_allclose(policy.processor.model_actions(actions), actions, atol=1e-4)
    assert policy.processor.counted_dims.all()
    # Any instruction of the suite fits into the prompt, with the state.
    long = "Pick the bell pepper from the counter and place it in the microwave."
    tokens, mask = policy.processor.prompts([long], states[:1])
    assert mask.sum() < tokens.shape[1]
    with pytest.raises(ConfigError, match="env.suite=kitchen has an expert"):
        suites.assumed_statistics(Config(init="random"))


# --- LIBERO ---


def libero_config(*arguments: str) -> Config:
    return parse("grpo.py:libero_smoke", *arguments)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("env.protocol=openvla", ["env.protocol", "'openvla'", "openpi, rlinf, lerobot"]),
        ("env.train_on=all", ["env.train_on", "'all'", "placements, initial_states"]),
        ("env.cameras=robot0_agentview_left", ["env.cameras", "agentview, robot0_eye_in_hand"]),
        ("env.objects=heldout", ["env.objects", "leave it out"]),
        ("eval.episodes=51", ["eval.episodes", "got 51", "at most the 50 initial states"]),
        ("env.layouts=train", ["env.layouts", "only env.suite=kitchen has"]),
        ("env.standins=true", ["env.standins", "only env.suite=robocasa has"]),
        ("task=libero_10/0", ["demos.dataset", "no scripted expert"]),
    ],
)
def test_what_libero_does_not_offer_is_refused_without_it(argument, parts):
    with pytest.raises(ConfigError) as error:
        libero_config(f"--config.{argument}")
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_liberos_tasks_without_an_expert_can_start_untrained():
    config = libero_config("--config.task=libero_10/0", "--config.init=random")
    stats = suites.assumed_statistics(config)
    assert stats["state"].dim == 8 and stats["actions"].dim == 7
    np.testing.assert_array_equal(stats["state"].q99[6:], [0.045, 0.005])


def test_held_out_seeds_are_liberos_initial_states():
    config = libero_config()
    episode_of, first = suites.episode_of(config), config.eval.first_seed
    assert [episode_of(first + n).init_state for n in (0, 49)] == [0, 49]
    assert len({episode_of(first + n).seed for n in range(50)}) == 50  # each has its own noise of the sampler
    assert episode_of(first - 1).init_state is None
    with pytest.raises(ValueError, match="initial state 50: LIBERO has 0 to 49"):
        episode_of(first + 50)


def test_a_plan_needs_no_libero():
    horizons = {
        protocol: suites.planned(
            libero_config("--config.env.horizon=0", f"--config.env.protocol={protocol}")
        ).env.horizon
        for protocol in ("openpi", "rlinf", "lerobot")
    }
    assert horizons == {"openpi": 280, "rlinf": 240, "lerobot": 280}


def test_a_label_says_what_training_starts_from():
    assert suites.label(libero_config()) == ""
    label = suites.label(libero_config("--config.env.train_on=initial_states"))
    assert label == "trained on the evaluation's own initial states"


def test_a_missing_libero_is_one_line(monkeypatch):
    from envs.libero import compat as libero_compat

    def absent():
        raise ValueError(f"LIBERO is not installed: {libero_compat.INSTALL}")

    monkeypatch.setattr(libero_compat, "find", absent)
    for check in (stages.check_inputs, suites.settled):
        with pytest.raises(ConfigError, match=r"config key env.suite: .*pip install 'z1-jax\[libero\]'") as error:
            check(libero_config())
        assert "\n" not in str(error.value)
