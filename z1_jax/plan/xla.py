"""Compiles traced programs without running them: for the CPU that is there, or for a GPU that is not.

jax's CUDA plugin compiles for a card that it is only told about; XLA then says what it would allocate there.
"""

from __future__ import annotations

import dataclasses
import os
import time

import jax
import numpy as np
from jax.experimental import topologies

from z1_jax.errors import UserError
from z1_jax.plan.accelerators import ACCELERATORS
from z1_jax.plan.programs import Program
from z1_jax.sharding import MESH_AXES

# What XLA's compiler asks about a card: compute capability, multiprocessors, L2 cache in MB, clock in GHz, shared
# memory of a block that opts in, in KB (CUDA programming guide, table of compute capabilities; NVIDIA's datasheets).
# Its memory and bandwidth are those of `ACCELERATORS`.
_CARDS = {
    "H200": ((9, 0), 132, 50, 1.98, 227),
    "H100": ((9, 0), 132, 50, 1.98, 227),
    "A100": ((8, 0), 108, 40, 1.41, 163),
    "RTX4090": ((8, 9), 128, 72, 2.52, 99),
}
# Timing candidates needs the card, and compiling as many takes long.
_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of one program on one device."""

    target: str  # cpu, or the card's name
    temporary: int  # bytes beside arguments and results
    arguments: int  # bytes; arguments that the program does not read are left out
    results: int  # bytes that are not written over a donated argument
    flops: float | None  # of XLA's cost analysis, each loop's body once; None where the target has none
    seconds: float  # that compiling took

    def flops_with_trips(self, total: float, bodies_once: float) -> float | None:
        """`flops` with the loops' further trips, by the traced program's matrix products with and without them."""
        return None if self.flops is None else self.flops + total - bodies_once


def compile_program(program: Program, target: str) -> Compiled:
    """Compiles for the devices that the program was traced for; runs nothing."""
    began = time.perf_counter()
    compiled = program.traced.lower().compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    return Compiled(
        target=target,
        temporary=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=cost["flops"] if cost else None,
        seconds=time.perf_counter() - began,
    )


def prepare_cuda(card: str) -> None:
    """Sets the GPU compiler's flags; it reads them when JAX starts, so this must come before.

    Raises:
        UserError: the card is not described here.
    """
    if card not in _CARDS:
        raise UserError(f"compiling for {card} is not possible, only for {', '.join(_CARDS)}; use --compile=cpu")
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()


def compile_only_mesh(mesh: jax.sharding.Mesh, card: str) -> jax.sharding.Mesh:
    """A mesh of the same shape over cards that need not exist: programs traced for it compile, and cannot run.

    Raises:
        UserError: jax's CUDA plugin is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_target(card), topology=f"1x1x{mesh.size}"
        )
    except Exception as error:  # jax raises what the plugin's loader raises
        raise UserError(
            f"XLA's GPU compiler is not there ({type(error).__name__}: {error}); install jax[cuda12], "
            "or use --compile=cpu"
        ) from error
    devices: np.ndarray = np.array(topology.devices).reshape(mesh.devices.shape)
    return jax.sharding.Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


def _target(card: str) -> str:
    """XLA's description of a card, as it would be read from one."""
    (major, minor), processors, cache, clock, shared = _CARDS[card]
    accelerator = ACCELERATORS[card]
    units = 64 if (major, minor) == (8, 0) else 128
    threads = 1536 if (major, minor) == (8, 9) else 2048
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared * 1024}
      shared_memory_per_core: {(shared + 1) * 1024} core_count: {processors} fpus_per_core: {units}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {round(accelerator.bandwidth * 1e9)} l2_cache_size: {cache * 2**20} clock_rate_ghz: {clock}
      device_memory_size: {round(accelerator.memory * 1e9)}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{card}"
    """
