"""What renderers take of a card: counted, planned with, and left to them by JAX."""

import dataclasses
import os
import pathlib
import stat

import pytest

from z1_jax import process, rendering
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config
from z1_jax.initial_policy import configured_model
from z1_jax.plan.__main__ import checked, main
from z1_jax.plan.accelerators import get_accelerator
from z1_jax.plan.planning import make_plan


def config_of(*keys: str) -> Config:
    return parse_command_line(["train.py", "--config=configs/grpo.py:libero_smoke", *(f"--config.{k}" for k in keys)])


def test_each_worker_has_a_context_and_each_simulator_a_renderer(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    one = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=8", "env.simulators=1"))
    assert one == rendering.PROCESS_BYTES + 460_000_000
    assert rendering.renderer_bytes(config_of("env.workers=2", "env.parallel=8", "env.simulators=1")) == 2 * one
    three = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=8", "env.simulators=3"))
    assert three - one == 2 * 460_000_000
    few = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=2", "env.simulators=3"))
    assert few - one == 460_000_000, "no more simulators than environments"


@pytest.mark.parametrize("where", ["kitchen", "osmesa", "ray", "no evaluation"])
def test_nothing_is_left_for_what_does_not_draw_on_a_card(monkeypatch, where):
    config = config_of()
    if where == "kitchen":
        config = Config()
    elif where == "osmesa":
        monkeypatch.setenv("MUJOCO_GL", "osmesa")
    elif where == "ray":
        config = config_of("rollout.backend=ray")
    else:
        config = dataclasses.replace(config, algorithm="sft", eval=dataclasses.replace(config.eval, episodes=0))
    assert rendering.renderer_bytes(config) == 0


def fake_driver(monkeypatch, tmp_path: pathlib.Path, says: str) -> None:
    """A program nvidia-smi that prints so."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_jax_leaves_room_on_the_smallest_card(monkeypatch, tmp_path):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    fake_driver(monkeypatch, tmp_path, "24576\n81920")
    config = config_of("env.workers=2", "env.parallel=2")
    assert rendering.share(config) == pytest.approx(2 * 710e6 / (24576 * 2**20))
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    process.start_jax(lambda: rendering.share(config))
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.865"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    process.start_jax(lambda: rendering.share(config))
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5", "who says a fraction gets it"


@pytest.mark.parametrize("says", ["", "NVIDIA-SMI has failed"])
def test_without_a_card_nothing_is_left(monkeypatch, tmp_path, says):
    fake_driver(monkeypatch, tmp_path, says)
    assert rendering.least_card_bytes() == 0
    assert rendering.share(config_of()) == 0


def test_a_plan_counts_them(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    config = checked(config_of("model.preset=tiny"))
    model, card = configured_model(config), get_accelerator("H100")
    alone = make_plan(config, model, card, 1e12, 1)
    assert alone.rendering == 710_000_000 and alone.fits
    assert make_plan(config, model, card, alone.peak + alone.rendering, 1).fits
    assert not make_plan(config, model, card, alone.peak + alone.rendering - 1, 1).fits


def test_the_plan_says_so(capsys, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    main(["plan.py", "--config=configs/grpo.py:libero_smoke", "--config.model.preset=tiny", "--compile=no"])
    assert "rendering: 710.0 MB of a card" in capsys.readouterr().out
