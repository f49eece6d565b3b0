"""LIBERO behind the door of all suites; what needs the package is skipped without it."""

import dataclasses
import json

import numpy as np
import pytest

from envs import demos
from envs.base import Episode
from envs.libero import compat, tables
from envs.libero.suite import LeRobot, LiberoSuite, RLinf
from envs.suite import SettingError, Suite
from z1_jax import suites
from z1_jax.config.schema import Config, ConfigError

try:
    compat.find()
    WHY = ""
except ValueError as error:
    WHY = str(error)
needs_libero = pytest.mark.skipif(bool(WHY), reason=WHY)
TASK = "libero_object/pick_up_the_milk_and_place_it_in_the_basket"


def config(task: str = TASK, suite: str = "LiberoSuite", **env) -> Config:
    given = {"suite": f"envs.libero.suite:{suite}", "cameras": tables.CAMERAS, "image_size": 32, **env}
    return dataclasses.replace(Config(), task=task, env=dataclasses.replace(Config().env, **given))


def made(cls=LiberoSuite, **env):
    return cls(config(**env).env, config().eval)


def test_what_is_missing_is_one_line_about_a_key(monkeypatch):
    monkeypatch.setattr(compat, "_version", lambda package: None)
    with pytest.raises(ConfigError, match=r"config key env.suite: LIBERO .* is not installed") as caught:
        suites.resolve(config())
    assert "\n" not in str(caught.value)


def test_a_seed_of_an_evaluation_is_an_initial_state():
    suite, first = made(), config().eval.first_seed
    assert suite.episode(TASK, 5) == Episode(5, TASK)
    assert suite.episode(TASK, first + 49) == Episode(7, TASK, init_state=49)
    assert made(RLinf).episode(TASK, first) == Episode(0, TASK, init_state=0)
    assert made(LeRobot).horizon("libero_spatial/x") == 280 and made().horizon("libero_spatial/x") == 220
    assert made(horizon=33).horizon("libero_spatial/x") == 33
    with pytest.raises(SettingError, match="50 initial states a task; got number 50") as caught:
        suite.episode(TASK, first + 50)
    assert caught.value.key == "eval.episodes"
    with pytest.raises(SettingError, match="rlinf sets no number of steps for libero_90") as caught:
        made(RLinf).horizon("libero_90/x")
    assert caught.value.key == "env.horizon"


@needs_libero
def test_it_is_a_suite_and_says_what_a_result_depends_on():
    suite = suites.resolve(config())
    assert isinstance(suite, Suite) and len(suite.tasks) == 290 and len(suite.sets) == 21
    assert "pick up the milk and place it in the basket" in suite.instructions
    facts = suites.facts(config())
    assert json.loads(json.dumps(facts)) == facts
    assert facts["libero_protocol"] == "openpi" and facts["horizon"] == 280 and "mujoco" in facts["versions"]
    assert suites.facts(config(suite="RLinf"))["libero_protocol"] == "rlinf"
    for wrong, message in (
        (config("libero_object/milk"), "'libero_object/milk' does not exist"),
        (config(cameras=("top",)), "'top' does not exist; known: agentview"),
    ):
        with pytest.raises(ConfigError, match=message):
            suites.make_env(wrong, wrong.task)
    assert suite.demonstrator(suite.sets["libero_10"][0]) is None


@needs_libero
def test_its_experts_demonstrate(rng):
    demonstrator = suites.demonstrator(config())
    env = demonstrator.make_env()
    seed = int(rng.integers(1000, 800_000_000))
    found = demos.run_episode(demonstrator, env, suites.episode_of(config())(seed), noise=0.1, stride=20)
    env.close()
    assert found.actions.shape[1:] == (8, 7) and found.state.shape[1] == 8 and np.abs(found.actions).max() <= 1
    assert found.instruction == "pick up the milk and place it in the basket" and found.success
