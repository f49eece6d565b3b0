"""What cannot fit is refused before a run's first stage, in a line that names the key: `z1_jax.plan`'s arithmetic.

Never refuses what fits: of the temporary bytes that are read from a traced program half are counted (XLA's own
assignments are above the whole, see `planning.ALLOWANCE`), against all memory that a device or the host has.
"""

from __future__ import annotations

import math

import jax

from z1_jax import sharding
from z1_jax.config.schema import Config, ConfigError
from z1_jax.host_memory import host_bytes
from z1_jax.models.choices import trains_vlm
from z1_jax.models.pi05 import Pi05Config, cache_bytes
from z1_jax.plan import analytic, programs
from z1_jax.plan.programs import Program
from z1_jax.rl.trainer import most_looks

_CERTAIN = 0.5  # of estimated bytes
# What a function holds grows with the products that it computes: 0.027 bytes an operation for the smallest preset,
# 0.011 for the kitchen's, 0.001 for π0.5. Where twice that would fit nothing is traced, which takes a second or two.
_BYTES_PER_FLOP = 0.05
_ELSEWHERE = "python -m z1_jax.plan with the same config says what needs less"


def check_memory(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh, episode_steps: int) -> None:
    """Refuses sizes whose arrays cannot be held. Traces the run's functions only where their products are large.

    Args:
        model: of the policy that is trained.
        episode_steps: control steps of the longest episode.

    Raises:
        ConfigError: one line.
    """
    device = _device_bytes(mesh)
    if _BYTES_PER_FLOP * _flops(config, model) / (mesh.shape["data"] * mesh.shape["fsdp"]) > device:
        _check_device(config, model, mesh, device)
    if config.algorithm == "grpo":
        _check_rollouts(config, model, mesh, device, episode_steps)


def _device_bytes(mesh: jax.sharding.Mesh) -> int:
    """The memory of one device; on a CPU the host's."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if stats and all(s and "bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] for s in stats)
    return host_bytes()


def _flops(config: Config, model: Pi05Config) -> int:
    """Operations of the largest function, by closed formulas; the parameters count as one observation more."""
    sft = analytic.training_work(
        model, config.sft.batch_size + 1, config.sft.flows, trainable=0, encoded=True, trains_vlm=True
    )
    if config.algorithm == "sft":
        return sft.flops
    update = analytic.training_work(
        model, config.update.batch_size + 1, config.flow.steps, trainable=0, encoded=True, trains_vlm=True
    )
    decision = analytic.decision_work(model, config.env.parallel, config.flow.steps)
    return max(sft.flops * (not config.init), update.flops, decision.flops)


def _check_device(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh, memory: int) -> None:
    whole = local = programs.trace_programs(config, model, mesh)
    if mesh.size > 1:
        alone = sharding.make_mesh(devices=mesh.devices.flat[:1].tolist())
        local = programs.trace_programs(programs.local_config(config, mesh), model, alone)
    shares = programs.gradient_shares(model, mesh)
    for program, share in zip(whole, local, strict=True):
        kept = program.parameters + program.optimizer
        passing = program.inputs + program.outputs + _CERTAIN * programs.estimated_temporary(share, shares)
        if kept > memory:
            key = "init" if config.init else "model.preset"
            value = config.init or config.model.preset
            raise ConfigError(
                f"config key {key}: got {value}, whose parameters and optimiser take {_gb(kept)} of a device that has "
                f"{_gb(memory)}; expected more devices (mesh.fsdp), or a smaller policy or scope; {_ELSEWHERE}"
            )
        if kept + passing > memory:
            raise _too_large(config, program, kept + passing, memory, (memory - kept) / passing)


def _too_large(config: Config, program: Program, needed: float, memory: int, share: float) -> ConfigError:
    """The refusal of a batch of which about `share` would fit."""
    update = config.update
    batch = ("update.batch_size", update.batch_size)
    micro = ("update.micro_batch", update.micro_batch)
    key, value = {
        "sft_step": ("sft.micro_batch", config.sft.micro_batch)
        if config.sft.micro_batch
        else ("sft.batch_size", config.sft.batch_size),
        "rl_update": batch if program.inputs > needed / 2 else micro,
        "encode": ("env.parallel", config.env.parallel),
        "denoise": ("env.parallel", config.env.parallel),
    }[program.name]
    most = math.floor(share * value)
    expected = f"at most about {most:,}" if most else "also the other sizes smaller"
    return ConfigError(
        f"config key {key}: got {value}, for which {program.name} needs at least {_gb(needed)} of a device that has "
        f"{_gb(memory)}; expected {expected}; {_ELSEWHERE}"
    )


def _check_rollouts(config: Config, model: Pi05Config, mesh: jax.sharding.Mesh, device: int, steps: int) -> None:
    """Of one iteration: what was seen and drawn stays in host memory, prefix caches where `update` says."""
    looks = most_looks(config, steps, config.env.executed or model.horizon)
    chain = (max(config.flow.steps, 1) + 1) * model.horizon * model.action_dim * 4
    frames = model.cameras * model.vision.image_size**2 * 3
    host, kept = host_bytes(), looks * (frames + chain)
    if _CERTAIN * kept > host:
        raise ConfigError(
            f"config key group.count: got {config.group.count} groups of {config.group.size}, whose {looks:,} "
            f"observations take {_gb(kept)} of a host that has {_gb(host)}; expected at most about "
            f"{max(1, int(config.group.count * host / kept)):,}"
        )
    caches, placement = looks * cache_bytes(model), config.update.prefix_cache
    if trains_vlm(config.train.scope, config.lora.vlm_rank) or placement not in ("device", "host"):
        return
    memory = host if placement == "host" else device * mesh.shape["data"] * mesh.shape["fsdp"]
    if _CERTAIN * caches > memory:
        raise ConfigError(
            f"config key update.prefix_cache: got {placement}, where the caches of {looks:,} observations take "
            f"{_gb(caches)} of {_gb(memory)}; expected auto or recompute"
        )


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
