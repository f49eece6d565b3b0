"""python -m z1_jax.plan [--config=FILE]: what a run costs before it is paid for. Compiles its functions, runs none.

Memory and operations per device, the least time on a named accelerator, whether it fits, and what would make it fit.
Works for any number of devices on a machine that has none of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

import jax

from z1_jax.config.checks import check_horizon
from z1_jax.config.command_line import Parser, parse_command_line
from z1_jax.config.schema import Config, ConfigError
from z1_jax.errors import UserError
from z1_jax.initial_policy import check_executed, configured_model, with_own_steps
from z1_jax.models.pi05 import Pi05Config
from z1_jax.plan import accelerators, scaling
from z1_jax.plan.accelerators import Accelerator
from z1_jax.plan.planning import Row, estimated_rows, host_caches, make_plan, mesh_of
from z1_jax.plan.text import GB, document, lines
from z1_jax.plan.xla import prepare_cuda
from z1_jax.process import USABLE_MEMORY, require_algorithm, run_main
from z1_jax.suites import least_episode_steps, planned

# Memory of a host, as a multiple of its devices': a desktop with a card of 24 GB has 64. --host-memory says better.
HOST_PER_DEVICE = 2.7


def main(argv: Sequence[str]) -> int | None:
    """Plans the config of the command line; exits with 1 where it does not fit."""
    options, rest = parse_options(argv)
    config = parse_command_line(rest)
    require_algorithm(config, ("grpo", "sft"), "plan")
    config = checked(config)
    accelerator = accelerators.get_accelerator(options.accelerator)
    memory = options.memory * GB if options.memory else USABLE_MEMORY * accelerator.memory * GB
    if options.compile == "cuda":
        prepare_cuda(accelerator.name)
    provide_devices(2 * options.devices)  # twice: a wider mesh is one of the changes to look at
    model = configured_model(config)
    parts = []
    if options.processes > 1:
        parts = over_processes(config, model, accelerator, memory, options.devices, options.processes)
    host = (options.host_memory or HOST_PER_DEVICE * accelerator.memory * options.devices) * GB
    plan = make_plan(config, model, accelerator, memory, options.devices, options.compile, host)
    if options.json:
        told = [{"refused": part} if isinstance(part, str) else dataclasses.asdict(part) for part in parts]
        print(json.dumps(document(plan) | ({"processes": told} if told else {}), indent=1), flush=True)
    else:
        more = ["", *scaling.lines(parts, accelerator, memory)] if parts else []
        print("\n".join([*lines(plan), *more]), flush=True)
    return None if plan.fits else 1


def over_processes(
    config: Config, model: Pi05Config, accelerator: Accelerator, memory: float, devices: int, processes: int
) -> list[scaling.Part | str]:
    """How the run grows to `processes` with `devices` in all; see `scaling`."""

    def plan_of(count: int) -> tuple[jax.sharding.Mesh, list[Row], int]:
        mesh = mesh_of(config, count)
        return mesh, estimated_rows(config, model, mesh, accelerator), host_caches(config, model)

    return scaling.grown(config, model, accelerator, memory, devices, processes, plan_of)


def checked(config: Config) -> Config:
    """The config to plan with, after those checks of its run that need only the config.

    Raises:
        ConfigError: the run would be refused.
    """
    config = planned(config)
    horizon = configured_model(config).horizon
    check_executed(config, horizon)
    if config.algorithm == "grpo":
        check_horizon(config, least_episode_steps(config), config.env.executed or horizon)
    return with_own_steps(config)


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the rest of the command line for the config.

    Raises:
        ConfigError: an option that is not understood, or out of range.
    """
    parser = Parser(
        prog="python -m z1_jax.plan",
        usage="%(prog)s [--config=FILE.py[:PRESET]] [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        epilog="Without a config: --config=configs/grpo.py. python -m z1_jax.train --help lists the keys.",
    )
    parser.add_argument("--devices", type=int, default=1, help="of the whole run (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=1, help="of the whole run: how it grows to so many (%(default)s)"
    )
    parser.add_argument("--accelerator", default="H200", help=f"{', '.join(accelerators.ACCELERATORS)} (%(default)s)")
    parser.add_argument("--memory", type=float, default=0.0, help="GB a device may use (92 %% of the accelerator's)")
    parser.add_argument(
        "--host-memory", type=float, default=0.0, help=f"GB of the hosts ({HOST_PER_DEVICE:g} times their devices')"
    )
    parser.add_argument(
        "--compile",
        choices=("cpu", "cuda", "no"),
        default="cpu",
        help="cuda: XLA's GPU compiler for that accelerator, without one; needs jax's CUDA plugin (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    options, rest = parser.parse_known_args(list(argv[1:]))
    if not 1 <= options.devices <= 4096:
        raise ConfigError(f"--devices: got {options.devices}, expected 1 … 4096")
    if options.processes < 1 or options.devices % options.processes:
        raise ConfigError(
            f"--processes: got {options.processes}, expected a divisor of --devices={options.devices}: each process "
            "has as many devices"
        )
    if not 0 <= options.memory <= 1e6:  # nan neither
        raise ConfigError(
            f"--memory: got {options.memory:g}, expected GB above 0, at most 1e6; 0 for the accelerator's"
        )
    if not 0 <= options.host_memory <= 1e7:
        raise ConfigError(f"--host-memory: got {options.host_memory:g}, expected GB above 0, at most 1e7")
    return options, [argv[0], *rest]


def provide_devices(count: int) -> None:
    """Makes sure of `count` CPU devices, virtual ones; must come before anything else touches JAX.

    Raises:
        UserError: JAX has started with fewer.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started
        pass
    if len(jax.devices()) < count:
        raise UserError(
            f"{count} virtual devices wanted, JAX has {len(jax.devices())}: XLA_FLAGS sets "
            "--xla_force_host_platform_device_count; unset it"
        )


if __name__ == "__main__":
    run_main(main)
