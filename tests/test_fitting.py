"""Sizes that no memory holds are refused in a line, and what XLA itself fits into a device is not."""

import dataclasses

import pytest
import tiny_policy
from seeds import fresh_seed

from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import ConfigError
from z1_jax.models.presets import get_preset
from z1_jax.plan import fitting, programs
from z1_jax.plan.xla import compile_program

STEPS = 40  # of an episode


def config(*settings: str, file: str = "grpo"):
    return parse_command_line(["train", f"--config=configs/{file}.py", *(f"--config.{text}" for text in settings)])


def check(monkeypatch, chosen, memory: int, model=None, host: int = 0) -> None:
    monkeypatch.setattr(fitting, "_device_bytes", lambda mesh: memory)
    monkeypatch.setattr(fitting, "host_bytes", lambda: host or memory)
    fitting.check_memory(chosen, model or get_preset("kitchen"), tiny_policy.one_device(), STEPS)


@pytest.mark.parametrize(
    ("settings", "memory", "told"),
    [
        (("sft.batch_size=65536",), 25e9, r"sft.batch_size: got 65536, .* at least 1\d\d\.\d GB of .* has 25.0 GB"),
        (("sft.batch_size=1024", "sft.flows=1024"), 25e9, r"sft.batch_size: got 1024, .*expected at most about \d+;"),
        (("update.batch_size=1048576",), 25e9, "update.batch_size: got 1048576, for which rl_update needs"),
        (("update.batch_size=65536", "update.micro_batch=65536"), 5e9, "update.micro_batch: got 65536, for which rl_u"),
        (("env.parallel=4096",), 4e8, "env.parallel: got 4096, for which encode needs at least"),
        (("group.count=9999", "group.size=1024", "env.parallel=1024"), 25e9, "group.count: got 9999 groups of 1024,"),
        (("group.count=9999", "update.prefix_cache=device"), 5e9, "update.prefix_cache: got device, where the caches"),
    ],
)
def test_what_cannot_fit_is_one_line_that_names_the_key(monkeypatch, settings, memory, told):
    with pytest.raises(ConfigError, match="^config key " + told) as error:
        check(monkeypatch, config(*settings), int(memory), host=int(25e9))
    assert "\n" not in str(error.value)
    check(monkeypatch, config(), int(memory))


def test_a_policy_that_is_too_large_is_one_line(monkeypatch):
    chosen = config(file="sft")
    with pytest.raises(ConfigError, match="config key model.preset: .* whose parameters and optimiser take 40.2 GB"):
        check(monkeypatch, chosen, int(16e9), model=get_preset("pi05"))


def test_small_runs_are_not_traced(monkeypatch):
    monkeypatch.setattr(programs, "trace_programs", lambda *_: pytest.fail("traced"))
    check(monkeypatch, config(), int(4e9))


def test_what_xla_fits_is_not_refused(monkeypatch):
    """With the memory that XLA's own assignment for this machine takes, and a quarter of it is too little."""
    seed = fresh_seed(__name__)
    batch, flows, micro = 8 * (1 + seed % 3), 1 + seed % 4, 8 * (1 + seed % 2)
    chosen = config(f"sft.batch_size={batch}", f"sft.flows={flows}", f"update.micro_batch={micro}")
    chosen = dataclasses.replace(chosen, update=dataclasses.replace(chosen.update, batch_size=2 * micro))
    model, mesh = tiny_policy.CONFIG, tiny_policy.one_device()
    monkeypatch.setattr(fitting, "_BYTES_PER_FLOP", 1e9)  # always traced
    most = max(
        p.parameters + p.optimizer + p.inputs + p.outputs + compile_program(p, "cpu").temporary
        for p in programs.trace_programs(chosen, model, mesh)
    )
    check(monkeypatch, chosen, most, model, host=int(1e9))
    with pytest.raises(ConfigError, match="config key"):
        check(monkeypatch, chosen, most // 4, model, host=int(1e9))
