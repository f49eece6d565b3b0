"""What renderers of simulators take of a card that JAX computes on, so that JAX leaves them room."""

from __future__ import annotations

import os
import subprocess

from z1_jax.config.schema import Config
from z1_jax.suites import resolve, simulators

# An EGL context with its driver's own buffers, in each worker: assumed, not measured.
PROCESS_BYTES = 250_000_000


def renderer_bytes(config: Config) -> int:
    """Bytes of a card that the run's renderers take, all together; 0 where none draws on this machine's cards.

    They all draw on the card that MUJOCO_EGL_DEVICE_ID names, the first where it names none.
    """
    each = getattr(resolve(config), "renderer_bytes", 0)
    simulates = config.algorithm != "sft" or config.eval.episodes > 0
    if (
        not each
        or not simulates
        or config.rollout.backend == "ray"
        or os.environ.get("MUJOCO_GL", "").lower() == "osmesa"
    ):
        return 0
    workers = max(1, config.env.workers)
    slots = -(-config.env.parallel // workers)
    return workers * (PROCESS_BYTES + min(simulators(config) or slots, slots) * each)


def share(config: Config) -> float:
    """What the renderers take, as a share of the smallest card's memory; 0 where there is no card."""
    needed = renderer_bytes(config)
    return needed / card if needed and (card := least_card_bytes()) else 0.0


def least_card_bytes() -> int:
    """Memory of the smallest NVIDIA card of this machine, as its driver tells; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        return min(int(line) for line in told.split()) * 2**20
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return 0
