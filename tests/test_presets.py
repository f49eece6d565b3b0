"""Every preset of every config file passes the checks of its own run; presets travel with the package."""

import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import RANDOM, Config, ConfigError, flat
from z1_jax.errors import UserError
from z1_jax.plan import __main__ as plan
from z1_jax.stages import check_inputs

ROOT = pathlib.Path(__file__).parents[1]
FILES = {name: importlib.import_module(f"z1_jax.presets.{name}").PRESETS for name in ("grpo", "sft", "eval")}
EVERY = [(name, preset) for name, presets in FILES.items() for preset in presets]


def parsed(name: str, preset: str, *more: str) -> Config:
    given = ["--config.checkpoint=/nowhere"] * (name == "eval")
    return parse_command_line(["", f"--config=configs/{name}.py:{preset}", *given, *more])


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_a_preset_passes_the_checks_of_its_run(name, preset):
    """But for what is not here: a checkpoint, a dataset, RoboCasa, LIBERO."""
    config = parsed(name, preset)
    if config.algorithm != "eval":
        plan.checked(config)
    absent = [config.init * (config.init != RANDOM), config.demos.dataset, config.checkpoint]
    if not any(absent) and config.env.suite == "kitchen":
        check_inputs(config)
    else:
        with pytest.raises(
            UserError, match="no policy at .*(checkpoints/pi05|/nowhere)|[Rr]obo[Cc]asa|LIBERO|Meta-World|not exist"
        ):
            check_inputs(config)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_prefix_longer_than_the_episode_is_refused_by_the_plan_too(command):
    check = plan.checked if command == "plan" else check_inputs
    with pytest.raises(ConfigError, match="group.prefix_chunks: got 2, but an episode of 40 steps has 2 chunks of 20"):
        check(parsed("grpo", "kitchen", "--config.model.preset=pi05", "--config.env.executed=20"))
    with pytest.raises(ConfigError, match="env.executed: got 51"):
        plan.checked(parsed("grpo", "full", "--config.env.executed=51"))


def test_a_clones_files_are_the_packages_presets():
    """configs/NAME.py adds nothing and hides nothing, so that a wheel without it runs the same."""
    for name, presets in FILES.items():
        tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
        assert [type(node) for node in tree.body] == [ast.Expr, ast.ImportFrom, ast.Assign]
        for preset in presets:
            clone = parse_command_line(
                ["", f"--config={ROOT / 'configs' / name}.py:{preset}", *["--config.checkpoint=x"] * (name == "eval")]
            )
            assert flat(clone) == flat(parsed(name, preset)) | ({"checkpoint": "x"} if name == "eval" else {})


def elsewhere(folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_commands_find_presets_outside_a_clone(tmp_path):
    done = elsewhere(tmp_path, "-m", "z1_jax.train", "--config.task=Juggle")
    assert done.returncode == 2 and "'Juggle' does not exist; known: TurnOnSinkFaucet" in done.stderr
    done = elsewhere(
        tmp_path, "-m", "z1_jax.evaluate", "--config=configs/eval.py:smoke", "--config.checkpoint=/nowhere"
    )
    assert done.returncode == 2 and "no policy at /nowhere" in done.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "grpo.py").write_text("def get_config():\n    raise ValueError('mine')")
    done = elsewhere(tmp_path, "-m", "z1_jax.train", "--config=configs/grpo.py")
    assert "config file configs/grpo.py failed: ValueError: mine" in done.stderr
    assert "'Juggle' does not exist" in elsewhere(tmp_path, "-m", "z1_jax.train", "--config.task=Juggle").stderr


USE = """
import functools, sys
import z1_jax
from envs.kitchen import make
from envs.base import episodes
from envs.kitchen.demos import collect
from envs.pool import EnvPool

with EnvPool(functools.partial(make, "CloseDrawer"), 2, 1) as pool:
    pool.reset([0, 1], episodes([0, 1]))
assert len([episode for episode in collect("CloseDrawer", range(2), processes=2)]) == 2
print(sys.modules["envs"].__file__)
"""


def test_an_envs_folder_in_the_working_directory_is_not_taken_for_ours(tmp_path):
    """Neither by a command nor by its workers."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise RuntimeError('the folder was imported')")
    done = elsewhere(tmp_path, "-c", USE)
    assert done.returncode == 0 and done.stdout.strip() == str(ROOT / "envs" / "__init__.py"), done.stderr
    (tmp_path / "envs" / "__init__.py").write_text("")
    done = elsewhere(tmp_path, "-c", "import envs, z1_jax")
    assert "z1_jax needs its own package envs, but" in done.stderr


def test_console_scripts_are_the_commands(tmp_path):
    code = "import sys; from z1_jax import scripts; sys.argv[:] = ['z1', *{}]; scripts.{}()"
    for name, arguments, told in (
        ("train", ["--config.task=Juggle"], "'Juggle' does not exist"),
        ("evaluate", ["--config.checkpoint=/nowhere"], "no policy at /nowhere"),
        ("plan", ["--devices=0"], "--devices: got 0"),
        ("convert", ["/nowhere", "/tmp/there"], "nothing at /nowhere"),
        ("collect", ["OpenDrawer"], "--out"),
        ("report", ["/nowhere"], "is not a directory"),
    ):
        done = elsewhere(tmp_path, "-c", code.format(arguments, name))
        assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and told in done.stderr, done.stderr


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_a_preset_is_what_it_was(name, preset):
    """A run directory belongs to its config, and a default that moves must not stop the runs that are there.

    The values of 0.1.0 at d698625, but for smoke, full's env.executed, eval.videos of evaluations, and
    sft:robocasa, which is for one device.
    """
    kept = json.loads((ROOT / "tests" / "reference" / "presets.json").read_text())
    values = flat(parsed(name, preset)) | ({"checkpoint": ""} if name == "eval" else {})
    assert {key: values[key] for key in kept["common"]} == kept["common"] | kept["presets"][f"{name}:{preset}"]
