"""What the functions of a run cost, traced and compiled; whether that fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from z1_jax import sharding
from z1_jax.config.schema import Config
from z1_jax.errors import UserError
from z1_jax.models.choices import trains_vlm
from z1_jax.models.pi05 import Pi05Config, cache_bytes
from z1_jax.plan import jaxpr, programs, rendering
from z1_jax.plan.accelerators import Accelerator
from z1_jax.plan.programs import Program
from z1_jax.plan.xla import Compiled, compile_only_mesh, compile_program
from z1_jax.rl.prefix_cache import HOST_SHARE
from z1_jax.rl.trainer import most_looks
from z1_jax.stages import check_batches
from z1_jax.suites import episode_steps

# The estimate knows neither layout copies nor gaps between buffers. XLA's own assignment for a GPU was 1.27 times the
# estimate for the update of full-size π0.5 (16 nodes), 1.67 times for its SFT step (batch 32, fsdp 2).
ALLOWANCE = 1.7


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
    rendering: int  # bytes of a card that renderers take besides, by an estimate
    recomputed: bool  # update.prefix_cache=auto, whose caches would not fit the host
    changes: list[tuple[str, float]]  # settings that would need less, with the bytes they need

    @property
    def peak(self) -> int:
        return max(row.total for row in self.rows)

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory and self.host_cache_bytes <= self.host_memory


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
    mesh = mesh_of(config, devices)
    recomputed = config.update.prefix_cache == "auto" and host_caches(config, model) > HOST_SHARE * host_memory
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


def mesh_of(config: Config, devices: int) -> jax.sharding.Mesh:
    """The mesh of the run.

    Raises:
        UserError: it or a batch does not divide.
    """
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
    flops = jaxpr.count_flops(local.traced.jaxpr.jaxpr, local.trips)
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
        rows = estimated_rows(config, model, mesh_of(config, plan.devices), plan.accelerator)
        found.append((label, max(row.total for row in rows)))
        if found[-1][1] <= plan.memory:
            return found
    for name, changed, smaller, devices in _steps(config, model, plan):
        try:
            rows = estimated_rows(changed, smaller, mesh_of(changed, devices), plan.accelerator)
        except UserError:  # a mesh or batch that does not divide
            continue
        label = f"{label} + {name}" if label else name
        found.append((label, max(row.total for row in rows)))
        if found[-1][1] <= plan.memory:
            break
    return found


def _steps(config: Config, model: Pi05Config, plan: Plan) -> Iterator[tuple[str, Config, Pi05Config, int]]:
    """Settings that save memory, each on top of the one before: what costs least time first."""
    devices = plan.devices
    mesh = mesh_of(config, devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]  # rows that go through the network at once are a multiple of it

    def step(name: str) -> tuple[str, Config, Pi05Config, int]:
        return name, config, model, devices

    if model.dtype != "bfloat16":
        model = dataclasses.replace(model, dtype="bfloat16")
        yield step("model.dtype=bfloat16")
    if model.remat != "full":
        model = dataclasses.replace(model, remat="full")
        yield step("model.remat=full")
    largest = max(plan.rows, key=lambda row: row.total)
    worst, update, rows = largest.name, config.update, config.update.micro_batch
    if worst == "rl_update" and rows % (2 * shards) == 0:  # the same training
        rows //= 2
        config = _with(config, "update", micro_batch=rows)
        yield step(f"update.micro_batch={rows}")
    if largest.prepared:  # the same training, decisions take twice as long
        model = dataclasses.replace(model, acting="plain")
        config = _with(config, "model", acting="plain")
        yield step("model.acting=plain")
    if worst == "rl_update":
        if rows < update.batch_size:  # one micro-batch: only its caches, and no sum of gradients before it
            config = _with(config, "update", batch_size=rows)
            yield step(f"update.batch_size={rows}")
        elif rows > 1 and (rows // 2) % shards == 0:
            config = _with(config, "update", micro_batch=rows // 2, batch_size=rows // 2)
            yield step(f"update.micro_batch={rows // 2} and update.batch_size={rows // 2}")
    elif worst == "sft_step" and config.sft.batch_size > 1:
        rows = config.sft.micro_batch or config.sft.batch_size
        if rows % (2 * shards) == 0:  # the same training
            rows //= 2
            config = _with(config, "sft", micro_batch=rows)
            yield step(f"sft.micro_batch={rows}")
        elif not config.sft.micro_batch and (rows // 2) % shards == 0:
            rows //= 2
        if rows < config.sft.batch_size:  # one micro-batch: no sum of gradients before it
            config = _with(config, "sft", batch_size=rows)
            yield step(f"sft.batch_size={rows}")
    elif config.env.parallel > config.group.size:
        groups = max(config.env.parallel // (2 * config.group.size), 1)
        config = _with(config, "env", parallel=groups * config.group.size)
        yield step(f"env.parallel={config.env.parallel}")
    if config.algorithm == "grpo" and config.train.scope != "expert":
        config = _with(config, "train", scope="expert")
        yield step("train.scope=expert")
    devices *= 2
    config = _with(config, "mesh", fsdp=2 * config.mesh.fsdp)
    yield step(f"mesh.fsdp={config.mesh.fsdp} on {devices} devices")


def _with(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
