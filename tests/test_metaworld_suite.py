"""Meta-World's adapter without Meta-World: names, protocols, and what is said where the package is missing."""

import contextlib
import importlib.metadata
import pathlib

import mujoco
import pytest

from envs import metaworld, opengl
from envs.base import Episode
from envs.metaworld import compat, protocols, tables
from z1_jax import stages, suites
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def parse(*arguments: str) -> Config:
    config = parse_command_line(["main", f"--config={CONFIGS / 'grpo.py:metaworld_smoke'}", *arguments])
    suites.check_settings(config)
    return config


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    for have, message in (
        ({}, r"Meta-World \(metaworld\) is not installed: pip install 'z1-jax\[metaworld\]' in an environment"),
        ({"metaworld": "2.0.0"}, r"got metaworld 2.0.0, expected 3.…"),
    ):
        installed.update(have)
        with pytest.raises(ValueError, match=message) as caught:
            metaworld.make("reach-v3")
        assert "\n" not in str(caught.value) and "docs/metaworld.md" in str(caught.value)
    for check in (stages.check_inputs, suites.settled):
        with pytest.raises(ConfigError, match=r"config key env.suite: .*expected 3") as error:
            check(parse())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "hint"), [("reach", "did you mean reach-v3"), ("push-v2", "did you mean push-v3")])
def test_a_near_miss_of_a_tasks_name_is_told(given, hint):
    with pytest.raises(ValueError, match=f"unknown Meta-World task '{given}': {hint}"):
        tables.check_task(given)
    with pytest.raises(ValueError, match="'juggle': expected one of assembly-v3, "):
        tables.check_task("juggle")


# The published ones: LeRobot's and RLinf's environments and configs.
@pytest.mark.parametrize(
    ("name", "numbers"),
    [("lerobot", (0, 500, 480, 10, 1000)), ("rlinf", (16, 100, 480, 10, None)), ("quick", (16, 200, 64, 50, None))],
)
def test_protocols(name, numbers):
    one = protocols.protocol(name)
    assert (one.settle_steps, one.max_steps, one.image_size, one.episodes, one.first_seed) == numbers
    assert one.shadows == (name != "quick") and one.averaged == (2 if name == "quick" else 0)
    config = parse("--config.env.horizon=0", f"--config.env.protocol={name}")
    assert suites.planned(config).env.horizon == one.max_steps


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("env.protocol=openpi", ["env.protocol", "'openpi'", "lerobot, rlinf, quick"]),
        ("env.cameras=robot0_agentview_left", ["env.cameras", "corner2, corner"]),
        ("env.objects=heldout", ["env.objects", "leave it out"]),
        ("env.layouts=train", ["env.layouts", "only env.suite=kitchen has"]),
        ("env.train_on=initial_states", ["env.train_on", "only env.suite=libero has"]),
    ],
)
def test_what_metaworld_does_not_offer_is_refused_without_it(argument, parts):
    with pytest.raises(ConfigError) as error:
        parse(f"--config.{argument}")
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_an_unknown_task_is_one_line(monkeypatch):
    monkeypatch.setattr(compat, "versions", lambda: {"metaworld": "3.1.1", "mujoco": "3.3.0", "numpy": "2.0"})
    with pytest.raises(ConfigError, match="config key task: unknown Meta-World task 'reach': did you mean reach-v3"):
        suites.make_env(parse("--config.task=reach"), "reach")


def test_a_mujoco_that_metaworld_cannot_use_is_one_line(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "3.1.1")
    for width, refused in ((11, False), (12, True)):
        monkeypatch.setattr(mujoco, "mjNEQDATA", width)
        with (
            pytest.raises(ValueError, match="does not run under MuJoCo .*12 numbers instead of 11: pip install")
            if (refused)
            else contextlib.nullcontext()
        ):
            compat.check_mujoco()


def test_a_machine_without_opengl_is_told_what_to_install(monkeypatch):
    def missing(library: str) -> None:
        raise OSError(library)

    monkeypatch.setattr(opengl.ctypes, "CDLL", missing)
    monkeypatch.setattr(opengl.sys, "platform", "linux")
    for backend, packages in (("egl", "libegl1 libgl1-mesa-dri"), ("osmesa", "libosmesa6")):
        monkeypatch.setenv("MUJOCO_GL", backend)
        with pytest.raises(ValueError, match=f"Meta-World draws with OpenGL, .*apt-get install {packages}"):
            opengl.check("Meta-World")


def test_a_seed_is_an_episode_in_training_and_evaluation():
    config = parse()
    assert suites.episode_of(config)(config.eval.first_seed + 3) == Episode(config.eval.first_seed + 3, config.task)
    assert suites.label(config) == ""


def test_sets_of_tasks_are_resolved():
    config = suites.with_tasks(parse("--config.tasks=MT10"))
    assert config.every_task == tables.SETS["MT10"]
    with pytest.raises(ConfigError, match="tasks: push-v3 is there twice, as MT10 and as push-v3"):
        suites.with_tasks(parse("--config.tasks=MT10,push-v3"))


def test_a_policys_tokenizer_knows_all_instructions():
    suite = suites.resolve(parse())
    assert len(suite.instructions) == 49  # push-v3 and push-back-v3 share theirs
    assert set(suite.instructions) == set(tables.INSTRUCTIONS.values())
