"""How a run's memory, traffic and time grow with its processes, on paper: `python -m z1_jax.plan --processes=N`.

Each device sends and receives in rings; an axis of the mesh that stays within a host uses the host's links, another one
the network. Global batches stay as they are. Simulation is not in it: it divides by the processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from z1_jax.config.schema import Config
from z1_jax.errors import UserError
from z1_jax.models.pi05 import Pi05Config, cache_bytes, itemsize
from z1_jax.plan import analytic
from z1_jax.plan.accelerators import Accelerator


@dataclasses.dataclass(frozen=True)
class Link:
    """Bytes that a device sends in a ring, 10^9 a second, while it receives as many."""

    within: float  # a host
    between: float  # hosts
    source: str


LINKS = {
    "H200": Link(450, 50, "NVLink 4 900 GB/s both ways, a 400 Gb/s adapter a GPU (NVIDIA DGX H200 datasheet)"),
    "H100": Link(450, 50, "NVLink 4 900 GB/s both ways, a 400 Gb/s adapter a GPU (NVIDIA DGX H100 datasheet)"),
    "A100": Link(300, 25, "NVLink 3 600 GB/s both ways, a 200 Gb/s adapter a GPU (NVIDIA DGX A100 datasheet)"),
    "TPUv5e": Link(100, 100, "1,600 Gb/s over four links, of which a ring uses two (Google Cloud documentation)"),
    "TPUv5p": Link(200, 200, "4,800 Gb/s over six links, of which a ring uses two (Google Cloud documentation)"),
    "TPUv6e": Link(224, 224, "3,584 Gb/s over four links, of which a ring uses two (Google Cloud documentation)"),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device receives in one call of a function, in bytes: over its host's links, and over the network."""

    within: float
    between: float

    def ms(self, link: Link) -> float:
        return self.within / link.within / 1e6 + self.between / link.between / 1e6


@dataclasses.dataclass(frozen=True)
class Part:
    """One function of a run over a number of processes."""

    processes: int
    devices: int
    mesh: dict[str, int]
    function: str
    memory: int  # bytes of a device
    host_cache: int  # bytes of a process's prefix caches
    floor_ms: float
    traffic: Traffic
    traffic_ms: float
    limit: str  # what takes longest, or does not fit


def get_link(accelerator: Accelerator) -> Link:
    """Raises UserError where nothing is known of that accelerator's links."""
    if accelerator.name not in LINKS:
        raise UserError(f"--processes: nothing is known of {accelerator.name}'s links; known: {', '.join(LINKS)}")
    return LINKS[accelerator.name]


def counts(processes: int) -> list[int]:
    """1, 2, 4 … and the number itself."""
    return sorted({*(2**n for n in range(processes.bit_length()) if 2**n <= processes), processes})


def traffic_of(
    row: Any, config: Config, model: Pi05Config, mesh: jax.sharding.Mesh, processes: int, cached: bool
) -> Traffic:
    """What one call of a function moves, for each device; an upper bound, as nothing is kept from call to call.

    Parameters that are spread over fsdp are gathered for the forward pass and again for the backward one, their
    gradients are summed and spread again; over data the gradients are summed (a ring moves them twice). A batch of RL
    also brings the nodes that its own process has no room for: a quarter of a process's part, at least.

    Args:
        row: of the plan, with the bytes of one device; cached: the update finds prefix caches, and reads no VLM.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    local = mesh.size // processes
    moved = {"within": 0.0, "between": 0.0}

    def add(nbytes: float, crosses: bool) -> None:
        moved["between" if crosses else "within"] += nbytes

    fsdp_crosses, data_crosses = fsdp * tensor > local, processes > 1
    gathered = {
        "sft_step": 2 * row.parameters,
        "rl_update": 2 * (row.gradients if cached else row.parameters),
        "encode": row.parameters,
        "denoise": config.flow.steps * analytic.expert_parameters(model) * itemsize(model.dtype) / (fsdp * tensor),
    }[row.name]
    times = {
        "rl_update": config.update.batch_size // config.update.micro_batch,
        "sft_step": config.sft.batch_size // (config.sft.micro_batch or config.sft.batch_size),
    }.get(row.name, 1)
    if fsdp > 1:
        add(times * gathered * (fsdp - 1), fsdp_crosses)
        add(times * row.gradients * (fsdp - 1), fsdp_crosses)
    if data > 1:
        add(times * row.gradients * 2 * (data - 1) / data, data_crosses)
    if row.name == "rl_update" and processes > 1:
        room = config.update.batch_size // processes
        add(processes * math.ceil(room / 4) * _node_bytes(config, model, cached), True)
    return Traffic(**moved)


def _node_bytes(config: Config, model: Pi05Config, cached: bool) -> int:
    seen = cache_bytes(model) if cached else model.cameras * model.vision.image_size**2 * 3
    return seen + 4 * (config.flow.steps + 1) * model.horizon * model.action_dim


def grown(
    config: Config,
    model: Pi05Config,
    accelerator: Accelerator,
    memory: float,
    devices: int,
    processes: int,
    plan_of: Callable[[int], tuple[jax.sharding.Mesh, Sequence[Any], int]],
) -> list[Part | str]:
    """The functions of a run over 1, 2, 4 … `processes`, each with as many devices; a text where one is impossible.

    Args:
        memory: bytes that a device may use.
        plan_of: number of devices -> mesh, rows of the plan, and bytes of an iteration's prefix caches.
    """
    link, each = get_link(accelerator), devices // processes
    found: list[Part | str] = []
    for count in counts(processes):
        try:
            mesh, rows, caches = plan_of(count * each)
        except UserError as error:
            found.append(f"{count} processes: {error}")
            continue
        for row in rows:
            traffic = traffic_of(row, config, model, mesh, count, caches > 0)
            found.append(
                Part(
                    processes=count,
                    devices=count * each,
                    mesh=dict(mesh.shape),
                    function=row.name,
                    memory=row.total,
                    host_cache=-(-caches // count),
                    floor_ms=row.floor_ms,
                    traffic=traffic,
                    traffic_ms=traffic.ms(link),
                    limit=_limit(row, traffic, link, memory),
                )
            )
    return found


def _limit(row: Any, traffic: Traffic, link: Link, memory: float) -> str:
    if row.total > memory:
        return "memory: does not fit"
    times = {
        "optimiser's memory traffic": row.optimizer_ms,
        "computing": row.floor_ms - row.optimizer_ms,
        "links within a host": traffic.within / link.within / 1e6,
        "network": traffic.between / link.between / 1e6,
    }
    return max(times, key=lambda name: times[name])


def lines(parts: Sequence[Part | str], accelerator: Accelerator, memory: float) -> list[str]:
    """A table for people."""
    link = get_link(accelerator)
    text = [
        f"over processes, on paper: a device moves {link.within:g} GB/s within a host, {link.between:g} between hosts "
        f"({link.source}); {memory / 1e9:.1f} GB of memory",
        f"{'processes':>9}{'devices':>9}  {'data x fsdp x tensor':22}{'function':11}{'GB/device':>10}{'host GB':>9}"
        f"{'floor ms':>10}{'GB within':>11}{'GB network':>11}{'traffic ms':>11}  limit",
    ]
    for part in parts:
        if isinstance(part, str):
            text.append(f"  {part}")
            continue
        mesh = " x ".join(str(part.mesh[name]) for name in ("data", "fsdp", "tensor"))
        text.append(
            f"{part.processes:9}{part.devices:9}  {mesh:22}{part.function:11}{part.memory / 1e9:10.2f}"
            f"{part.host_cache / 1e9:9.1f}{part.floor_ms:10.2f}{part.traffic.within / 1e9:11.3f}"
            f"{part.traffic.between / 1e9:11.3f}{part.traffic_ms:11.2f}  {part.limit}"
        )
    return [*text, "traffic is not hidden behind computing here, and a call's own is an upper bound."]
