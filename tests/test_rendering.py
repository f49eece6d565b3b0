"""What renderers take of a card beside JAX: counted, and told by a plan."""

import dataclasses

import pytest

from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config
from z1_jax.plan import rendering
from z1_jax.plan.__main__ import main
from z1_jax.suites import with_tasks


@pytest.fixture(autouse=True)
def on_a_card(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)


def config_of(*keys: str, preset: str = "libero_smoke") -> Config:
    keys = [f"--config.{key}" for key in keys]
    return with_tasks(parse_command_line(["train.py", f"--config=configs/grpo.py:{preset}", *keys]))


def test_each_worker_has_a_context_and_each_simulator_a_renderer():
    one = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=8", "env.simulators=1"))
    assert one == rendering.PROCESS_BYTES + 460_000_000
    assert rendering.renderer_bytes(config_of("env.workers=2", "env.parallel=8", "env.simulators=1")) == 2 * one
    three = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=8", "env.simulators=3"))
    assert three - one == 2 * 460_000_000
    few = rendering.renderer_bytes(config_of("env.workers=1", "env.parallel=2", "env.simulators=3"))
    assert few - one == 460_000_000, "no more simulators than environments"
    ten_tasks = rendering.renderer_bytes(config_of(preset="libero"))  # 64 environments in 8 workers
    assert ten_tasks == 8 * (rendering.PROCESS_BYTES + 8 * 460_000_000)


@pytest.mark.parametrize("where", ["kitchen", "osmesa", "ray", "no evaluation"])
def test_nothing_is_counted_that_does_not_draw_on_a_card(monkeypatch, where):
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


@pytest.mark.parametrize(
    ("needed", "peak", "told"),
    [
        (1e9, 60e9, "which the 8% that JAX leaves hold"),
        (20e9, 30e9, "start the run with XLA_CLIENT_MEM_FRACTION=0.75, or take another card"),
        (30e9, 60e9, "too much beside 60.0 GB on one card; take another card"),
    ],
)
def test_what_to_do_about_them(needed, peak, told):
    assert told in rendering.advice(int(needed), int(peak), 80e9)


def test_a_plan_tells(capsys):
    main(["plan.py", "--config=configs/grpo.py:libero_smoke", "--config.model.preset=tiny", "--compile=no"])
    assert "rendering: about 0.7 GB more of the card that draws" in capsys.readouterr().out
