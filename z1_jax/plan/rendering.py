"""What renderers of simulators take of a card beside what JAX computes on it."""

from __future__ import annotations

import math
import os

from z1_jax.config.schema import Config
from z1_jax.process import USABLE_MEMORY
from z1_jax.suites import resolve, simulators

# An EGL context with its driver's own buffers, in each worker: assumed, not measured.
PROCESS_BYTES = 250_000_000


def renderer_bytes(config: Config) -> int:
    """Bytes of a card that the run's renderers take, all together, by an estimate.

    0 where none draws on this machine's cards, or the suite does not know. They all draw on the card that
    MUJOCO_EGL_DEVICE_ID names, the first where it names none.
    """
    each = getattr(resolve(config), "renderer_bytes", 0)
    simulates = config.algorithm != "sft" or config.eval.episodes > 0
    if not each or not simulates or config.rollout.backend == "ray" or _in_software():
        return 0
    workers = max(1, config.env.workers)
    slots = -(-config.env.parallel // workers)
    return workers * (PROCESS_BYTES + min(simulators(config) or slots, slots) * each)


def _in_software() -> bool:
    return os.environ.get("MUJOCO_GL", "").lower() == "osmesa"


def advice(needed: int, peak: int, memory: float) -> str:
    """What to do about renderers that need so many bytes of a card of `memory` bytes, beside functions that need
    `peak`, in a line."""
    text = (
        f"rendering: about {needed / 1e9:.1f} GB more of the card that draws (an estimate from textures; not measured)"
    )
    least, most = peak / memory, 1.0 - needed / memory
    if needed <= (1.0 - USABLE_MEMORY) * memory:
        return f"{text}, which the {1 - USABLE_MEMORY:.0%} that JAX leaves hold"
    elsewhere = "another card (MUJOCO_EGL_DEVICE_ID), software (MUJOCO_GL=osmesa) or fewer workers (env.workers)"
    if least <= most:
        share = math.floor(100 * most) / 100
        return f"{text}: start the run with XLA_CLIENT_MEM_FRACTION={share:.2f}, or take {elsewhere}"
    return f"{text}: too much beside {peak / 1e9:.1f} GB on one card; take {elsewhere}"
