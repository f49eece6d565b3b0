"""python -m z1_jax.plan [--config=FILE]: what a run costs before it is paid for. Compiles its functions, runs none.

Memory and operations per device, the least time on a named accelerator, whether it fits, and what would make it fit.
Works for any number of devices on a machine that has none of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from z1_jax import rendering, sharding
from z1_jax.config.checks import check_horizon
from z1_jax.config.command_line import Parser, parse_command_line
from z1_jax.config.schema import Config, ConfigError
from z1_jax.errors import UserError
from z1_jax.initial_policy import check_executed, configured_model, with_own_steps
from z1_jax.models.choices import trains_vlm
from z1_jax.models.pi05 import Pi05Config, cache_bytes
from z1_jax.plan import accelerators, jaxpr, programs, scaling
from z1_jax.plan.accelerators import Accelerator
from z1_jax.plan.programs import Program
from z1_jax.plan.xla import Compiled, compile_only_mesh, compile_program, prepare_cuda
from z1_jax.process import USABLE_MEMORY, require_algorithm, run_main
from z1_jax.rl.trainer import most_looks
from z1_jax.stages import check_batches
from z1_jax.suites import episode_steps, least_episode_steps, planned

GB = 1e9
# The estimate knows neither layout copies nor gaps between buffers. XLA's own assignment for a GPU was 1.27 times the
# estimate for the update of full-size π0.5 (16 nodes), 1.67 times for its SFT step (batch 32, fsdp 2).
ALLOWANCE = 1.7
# Memory of a host, as a multiple of its devices': a desktop with a card of 24 GB has 64. --host-memory says better.
HOST_PER_DEVICE = 2.7
NOTE = (
    "Bytes are of one device, in units of 10^6 or 10^9. 'estimate' is read from the traced program and supposes the "
    "fusions of an accelerator's compiler; planned with is 1.7 times that, which GPU compilations of full-size π0.5 "
    "stayed below, or 'compiled' where that is for a GPU: XLA's buffer assignment for the named target. One for cpu "
    "says little about a GPU: XLA's CPU compiler widens bfloat16 to float32 and fuses otherwise. Nothing is measured."
)
_COUNTS = (
    "on paper: matrix products from the shapes, nothing recomputed; the floor is theirs, and the optimiser's traffic. "
    "traced: those of the program itself, loops times their trips, recomputation included. compiled: XLA's count, "
    "which takes each loop's body once and element-wise work too, with the further trips added from the traced one."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One function of the run, per device."""

    name: str
    parameters: int
    optimizer: int
    gradients: int
    inputs: int
    outputs: int
    temporary_estimate: int  # gradients and activations
    flops_analytic: float  # the least work, nothing recomputed
    flops_traced: float  # matrix products of the traced function, loops times their trips, recomputation included
    flops_traced_once: float  # the same with each loop's body counted once
    floor_ms: float
    optimizer_ms: float  # of the floor: the optimiser's memory traffic
    prepared: int = 0  # of the copy of the parameters that decisions read
    compiled: Compiled | None = None

    @property
    def temporary(self) -> int:
        """Bytes to plan with: the compiler's where it is the target's own, else the estimate with an allowance."""
        if self.compiled and self.compiled.target != "cpu":
            return self.compiled.temporary
        return int(ALLOWANCE * self.temporary_estimate)

    @property
    def activations(self) -> int:
        """What of the temporary bytes is not gradients."""
        return max(self.temporary - self.gradients, 0)

    @property
    def total(self) -> int:
        return self.parameters + self.prepared + self.optimizer + self.inputs + self.outputs + self.temporary


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command prints."""

    accelerator: Accelerator
    memory: float  # bytes that a device may use
    devices: int
    rows: list[Row]
    cache_bytes: int  # of one observation
    host_cache_bytes: int  # of an iteration at most; 0 where nothing is kept
    host_memory: float  # bytes that the run may take of its host
    rendering: int  # bytes of a device that renderers take
    recomputed: bool  # update.prefix_cache=auto, whose caches would not fit the host
    changes: list[tuple[str, float]]  # settings that would need less, with the bytes they need

    @property
    def peak(self) -> int:
        return max(row.total for row in self.rows)

    @property
    def room(self) -> float:
        """Bytes that a device may use for what the run computes."""
        return self.memory - self.rendering

    @property
    def fits(self) -> bool:
        return self.peak <= self.room and self.host_cache_bytes <= self.host_memory


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
        mesh = _mesh(config, count)
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


def make_plan(
    config: Config,
    model: Pi05Config,
    accelerator: Accelerator,
    memory: float,
    devices: int,
    compile_for: str = "no",
    host_memory: float = math.inf,
) -> Plan:
    """The plan of a run on `devices` devices with `memory` bytes each, and `host_memory` bytes of all hosts.

    Caches that `update.prefix_cache=auto` would keep are recomputed where the hosts cannot hold them, as in the run.

    Raises:
        UserError: a mesh or batch that does not divide.
    """
    mesh = _mesh(config, devices)
    recomputed = config.update.prefix_cache == "auto" and host_caches(config, model) > host_memory
    if recomputed:
        config = _with(config, "update", prefix_cache="recompute")
    rows = estimated_rows(config, model, mesh, accelerator)
    if compile_for != "no":
        target = accelerator.name if compile_for == "cuda" else "cpu"
        where = compile_only_mesh(mesh, target) if compile_for == "cuda" else mesh
        compiled = [compile_program(program, target) for program in programs.trace_programs(config, model, where)]
        rows = [dataclasses.replace(row, compiled=c) for row, c in zip(rows, compiled, strict=True)]
    caches = host_caches(config, model)
    if caches and config.update.prefix_cache == "device":
        share = caches // (mesh.shape["data"] * mesh.shape["fsdp"])
        rows = [row if row.name == "sft_step" else dataclasses.replace(row, inputs=row.inputs + share) for row in rows]
        caches = 0
    plan = Plan(
        accelerator=accelerator,
        memory=memory,
        devices=devices,
        rows=rows,
        cache_bytes=cache_bytes(model),
        host_cache_bytes=caches,
        host_memory=host_memory,
        rendering=rendering.renderer_bytes(config),
        recomputed=recomputed,
        changes=[],
    )
    return plan if plan.fits else dataclasses.replace(plan, changes=changes(config, model, plan))


def host_caches(config: Config, model: Pi05Config) -> int:
    """Bytes of an iteration's prefix caches at most; 0 where none are kept."""
    if not keeps_caches(config):
        return 0
    looks = most_looks(config, episode_steps(config), config.env.executed or model.horizon)
    return looks * cache_bytes(model)


def keeps_caches(config: Config) -> bool:
    """Whether an iteration keeps the prefix caches of its observations: only while the VLM is frozen."""
    frozen = not trains_vlm(config.train.scope, config.lora.vlm_rank)  # auto begins with the expert
    return config.algorithm == "grpo" and frozen and config.update.prefix_cache != "recompute"


def _mesh(config: Config, devices: int) -> jax.sharding.Mesh:
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=jax.devices()[:devices])
    check_batches(config, mesh)
    return mesh


def estimated_rows(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh, accelerator: Accelerator) -> list[Row]:
    """The functions of a run by tracing alone."""
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    whole = programs.trace_programs(config, model, mesh)
    local = programs.trace_programs(programs.local_config(config, mesh), model, alone)
    shares = programs.gradient_shares(model, mesh)
    rows = [_row(p, q, shares, mesh.size, accelerator) for p, q in zip(whole, local, strict=True)]
    prepared = programs.prepared_bytes(config, model, mesh) if config.algorithm == "grpo" else 0
    return [row if row.name == "sft_step" else dataclasses.replace(row, prepared=prepared) for row in rows]


def _row(
    program: Program,
    local: Program,
    shares: dict[tuple[int, ...], float],
    devices: int,
    accelerator: Accelerator,
) -> Row:
    flops = jaxpr.count_flops(local.traced.jaxpr.jaxpr)
    work = program.work
    optimizer_ms = accelerator.memory_ms(work.optimizer_bytes / devices)
    computing = max(accelerator.compute_ms(work.flops / devices), accelerator.memory_ms(work.weight_bytes))
    return Row(
        name=program.name,
        parameters=program.parameters,
        optimizer=program.optimizer,
        gradients=program.gradients,
        inputs=program.inputs,
        outputs=program.outputs,
        temporary_estimate=int(programs.estimated_temporary(local, shares)),
        flops_analytic=work.flops / devices,
        flops_traced=flops.total,
        flops_traced_once=flops.bodies_once,
        floor_ms=computing + optimizer_ms,
        optimizer_ms=optimizer_ms,
    )


def changes(config: Config, model: Pi05Config, plan: Plan) -> list[tuple[str, float]]:
    """Settings that need less memory, each on top of those before it, and the bytes they need; the last fits."""
    found: list[tuple[str, float]] = []
    label = ""
    if plan.host_cache_bytes > plan.host_memory:
        config = _with(config, "update", prefix_cache="recompute")
        label = "update.prefix_cache=recompute"
        found.append(
            (
                label,
                max(row.total for row in estimated_rows(config, model, _mesh(config, plan.devices), plan.accelerator)),
            )
        )
        if found[-1][1] <= plan.room:
            return found
    for name, changed, smaller, devices in _steps(config, model, plan):
        try:
            rows = estimated_rows(changed, smaller, _mesh(changed, devices), plan.accelerator)
        except UserError:  # a mesh or batch that does not divide
            continue
        label = f"{label} + {name}" if label else name
        found.append((label, max(row.total for row in rows)))
        if found[-1][1] <= plan.room:
            break
    return found


def _steps(config: Config, model: Pi05Config, plan: Plan) -> Iterator[tuple[str, Config, Pi05Config, int]]:
    """Settings that save memory, each on top of the one before: what costs least time first."""
    devices = plan.devices

    def step(name: str) -> tuple[str, Config, Pi05Config, int]:
        return name, config, model, devices

    if model.dtype != "bfloat16":
        model = dataclasses.replace(model, dtype="bfloat16")
        yield step("model.dtype=bfloat16")
    if model.remat != "full":
        model = dataclasses.replace(model, remat="full")
        yield step("model.remat=full")
    worst = max(plan.rows, key=lambda row: row.total).name
    if worst == "rl_update":
        update = config.update
        if update.batch_size > update.micro_batch:  # one micro-batch: no second gradient, and only its caches
            config = _with(config, "update", batch_size=update.micro_batch)
            yield step(f"update.batch_size={update.micro_batch}")
        if update.micro_batch > 1:
            half = update.micro_batch // 2
            config = _with(config, "update", micro_batch=half, batch_size=half)
            yield step(f"update.micro_batch={half} and update.batch_size={half}")
    elif worst == "sft_step" and config.sft.batch_size > 1:
        config = _with(config, "sft", batch_size=config.sft.batch_size // 2)
        yield step(f"sft.batch_size={config.sft.batch_size}")
    elif config.env.parallel > config.group.size:
        config = _with(config, "env", parallel=max(config.env.parallel // 2, config.group.size))
        yield step(f"env.parallel={config.env.parallel}")
    if config.algorithm == "grpo" and config.train.scope != "expert":
        config = _with(config, "train", scope="expert")
        yield step("train.scope=expert")
    devices *= 2
    config = _with(config, "mesh", fsdp=2 * config.mesh.fsdp)
    yield step(f"mesh.fsdp={config.mesh.fsdp} on {devices} devices")


def _with(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def document(plan: Plan) -> dict[str, Any]:
    """The plan for machines: bytes, operations and milliseconds per device."""
    return {
        "accelerator": dataclasses.asdict(plan.accelerator),
        "devices": plan.devices,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "functions": [
            {**dataclasses.asdict(row), "temporary": row.temporary, "activations": row.activations, "total": row.total}
            for row in plan.rows
        ],
        "prefix_cache_bytes": plan.cache_bytes,
        "rendering_bytes": plan.rendering,
        "host_cache_bytes": plan.host_cache_bytes,
        "host_memory_bytes": None if math.isinf(plan.host_memory) else plan.host_memory,
        "prefix_caches_recomputed": plan.recomputed,
        "changes": [{"settings": name, "bytes": nbytes} for name, nbytes in plan.changes],
        "note": NOTE,
    }


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    accelerator = plan.accelerator
    text = [
        f"{plan.devices} × {accelerator.name}: {accelerator.tflops:g} TFLOP/s bfloat16, "
        f"{accelerator.bandwidth:g} GB/s, {accelerator.memory:g} GB ({accelerator.source})",
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
        "",
        f"prefix cache: {_bytes(plan.cache_bytes)} an observation"
        + (f"; at most {_bytes(plan.host_cache_bytes)} of host memory an iteration" * bool(plan.host_cache_bytes))
        + (f"; recomputed: those of an iteration exceed the hosts' {_bytes(plan.host_memory)}" * plan.recomputed),
        *([f"rendering: {_bytes(plan.rendering)} of a card, an estimate from textures"] if plan.rendering else []),
        *_verdict(plan),
        "",
    ]
    return text + textwrap.wrap(NOTE, 118)


def _memory_lines(plan: Plan) -> list[str]:
    unit, scale = ("GB", GB) if plan.peak >= GB else ("MB", 1e6)
    names = ("params", "acting", "optim", "inputs", "results", "grads", "activ.", "total", "estimate")
    text = [f"{f'{unit} per device':17}" + "".join(f"{name:>9}" for name in names) + "   compiled"]
    for row in plan.rows:
        parts = (
            row.parameters,
            row.prepared,
            row.optimizer,
            row.inputs,
            row.outputs,
            row.gradients,
            row.activations,
            row.total,
        )
        numbers = "".join(f"{part / scale:9.2f}" for part in (*parts, row.temporary_estimate))
        compiled = row.compiled
        text.append(
            f"{row.name:17}{numbers}"
            + (f"{compiled.temporary / scale:9.2f} for {compiled.target}, {compiled.seconds:.0f} s" if compiled else "")
        )
    return [*text, "estimate, compiled: gradients and activations together, by two ways (see below)"]


def _time_lines(plan: Plan) -> list[str]:
    unit, scale = ("TFLOP", 1e12) if max(row.flops_traced for row in plan.rows) >= 1e11 else ("MFLOP", 1e6)
    text = [f"{f'{unit} per device':17}{'on paper':>9}{'traced':>9}{'compiled':>9}{'floor':>12}{'optimiser':>12}"]
    for row in plan.rows:
        counted = row.compiled and row.compiled.flops_with_trips(row.flops_traced, row.flops_traced_once)
        text.append(
            f"{row.name:17}{row.flops_analytic / scale:9.3f}{row.flops_traced / scale:9.3f}"
            + (f"{counted / scale:9.3f}" if counted else f"{'-':>9}")
            + f"{row.floor_ms:9.3f} ms{row.optimizer_ms:9.3f} ms"
        )
    return [*text, *textwrap.wrap(_COUNTS, 118)]


def _bytes(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:.0f} bytes"


def _verdict(plan: Plan) -> list[str]:
    worst = max(plan.rows, key=lambda row: row.total)
    need = f"{worst.name} needs {_bytes(plan.peak)} of the {_bytes(plan.room)} that a device may use"
    if plan.host_cache_bytes > plan.host_memory:
        caches = f"prefix caches need {_bytes(plan.host_cache_bytes)} of the hosts' {_bytes(plan.host_memory)}"
        need = f"{need}, {caches} (--host-memory)" if plan.peak > plan.room else f"{caches} (--host-memory)"
    if plan.fits:
        return [f"fits: {need}"]
    text = [f"does not fit: {need}. What would need less:"]
    for name, nbytes in plan.changes:
        text.append(f"  {_bytes(nbytes):>10}  {'fits' if nbytes <= plan.room else '    '}  {name}")
    return text


if __name__ == "__main__":
    run_main(main)
