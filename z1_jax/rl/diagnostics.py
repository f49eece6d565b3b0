"""Metrics of an iteration, and the evidence that is kept of one that broke."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from z1_jax import processes
from z1_jax.files import writing
from z1_jax.rl import flow
from z1_jax.rl.rollout import BrokenIteration, Rollouts

OF_LOOKS = ("looks", "tokens/encoded")  # of `sharing_metrics`, those that several processes count each for its own


class RatioError(BrokenIteration):
    """The importance ratio of the first update is not 1, or a number of an update is not finite."""


def check_step(stats: Mapping[str, float], first: bool, gate: float) -> None:
    """Refuses the statistics of an optimiser step that is broken.

    Args:
        first: the step is the first on this iteration's nodes, whose ratios must be 1; gate: largest |ρ − 1| there.

    Raises:
        RatioError: a number is not finite, or the first step's ratios are off.
    """
    broken = [name for name, value in stats.items() if not np.isfinite(value)]
    if broken:
        raise RatioError(f"{', '.join(broken)} of the update is not finite; lower update.optim.lr or the noise")
    if first and stats["ratio_error"] > gate:
        raise RatioError(
            f"the first update's importance ratios are off by {stats['ratio_error']:.3g}, expected at most "
            f"{gate:g}: the update does not score what the rollout sampled"
        )


def save_broken(
    run_dir: pathlib.Path, iteration: int, evidence: Mapping[str, Shaped[np.ndarray, "..."]]
) -> pathlib.Path:
    """Writes the arrays of a broken iteration to RUN_DIR/broken/iteration-N.npz; of several processes each its own."""
    of = f"-process-{processes.index()}" * (not processes.leads())
    path = run_dir / "broken" / f"iteration-{iteration}{of}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(evidence)
    with writing(path):
        np.savez(path, **arrays)
    return path


def update_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of an iteration's optimiser steps: means over nodes, maxima, and means over steps."""
    if not rows:
        return {"updates": 0}
    nodes = sum(row["nodes"] for row in rows)

    def over_nodes(name: str) -> float:
        return sum(row[name] for row in rows) / nodes

    def over_steps(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    optional = {"kl_reference": "kl/reference"}
    return {
        "updates": len(rows),
        "loss": over_steps("loss"),
        "ratio/first_update_max_error": rows[0]["ratio_error"],
        "ratio/mean": over_nodes("ratio_sum"),
        "ratio/max": max(row["ratio_max"] for row in rows),
        "clip_fraction": over_nodes("clipped"),
        "clip_fraction/positive": over_nodes("clipped_positive"),
        "clip_fraction/negative": over_nodes("clipped_negative"),
        "approx_kl": over_nodes("kl_sum"),
        "grad_norm": over_steps("grad_norm"),
        **{name: over_steps(name) for name in rows[0] if name.startswith("grad_norm/")},
        "update_to_weight": over_steps("update_to_weight"),
        **{shown: over_steps(name) for name, shown in optional.items() if name in rows[0]},
    }


def sharing_metrics(rollouts: Rollouts, image_tokens: int, counted: int, noise_level: float) -> dict[str, float]:
    """How much was decided and simulated, what sharing saved of it, and the sampler's entropy.

    Args:
        image_tokens: of one camera's frame; counted: coordinates of a chunk that enter its log-probability.
    """
    nodes, looks = rollouts.nodes, rollouts.looks
    horizon, steps = nodes.x.shape[2], nodes.stochastic.shape[1]
    unshared, simulated = int(rollouts.steps.sum()), rollouts.simulated_steps
    return {
        "chunks": int(rollouts.chunks.sum()),
        "nodes": len(nodes.size),
        "looks": len(looks.tokens),
        "tokens/encoded": int(looks.image_mask.sum()) * image_tokens + int(looks.token_mask.sum()),
        "tokens/denoised": len(nodes.size) * steps * horizon,
        "steps/simulated": simulated,
        "steps/unshared": unshared,
        "steps/saved": 1.0 - simulated / max(unshared, 1),
        "sampler/noise_level": noise_level,
        "sampler/entropy": float(flow.entropy(nodes.stochastic, counted, noise_level).mean()),
    }


def times(rollouts: Rollouts, collect_s: float, update_s: float) -> dict[str, float]:
    """Seconds of an iteration by activity; idle is the rest. What was simulated while chunks were sampled is hidden."""
    seconds = rollouts.seconds
    known = seconds["simulate"] + seconds["render"] + seconds["sample"]
    return {
        "time/simulate": seconds["simulate"],
        "time/render": seconds["render"],
        "time/sample": seconds["sample"],
        "time/update": update_s,
        "time/idle": max(collect_s - known, 0.0),
        **({"time/hidden": seconds["hidden"]} if seconds["hidden"] else {}),
        "time/total": collect_s + update_s,
    }
