"""python .ci/learned.py RUN_DIR: fails unless RL took a step along a gradient, and its parameters are not SFT's."""

import pathlib
import sys

import jax
import numpy as np

from z1_jax.checkpoint import Checkpoints
from z1_jax.metrics import read_records
from z1_jax.policy import load_policy, named
from z1_jax.sharding import make_mesh

run = pathlib.Path(sys.argv[1])
rl = [record for record in read_records(run / "metrics.jsonl") if record["stage"] == "grpo"]
norms = [record["grad_norm"] for record in rl if record.get("grad_norm") is not None]
kept = [record["groups/kept"] for record in rl]
print(f"groups of mixed outcomes: {kept}, norms of their gradients: {norms}")
if not norms or not max(norms) > 0.0:
    sys.exit("no update had a gradient")


def parameters(stage: str) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(run / "checkpoints" / stage)
    return named(load_policy(checkpoints, max(checkpoints.steps()), make_mesh(devices=jax.devices()[:1])).params)


sft, grpo = parameters("sft"), parameters("grpo")
moved = [name for name in sft if not np.array_equal(sft[name], grpo[name])]
print(f"parameters that RL moved: {len(moved)} of {len(sft)} arrays")
if not moved:
    sys.exit("RL moved no parameter")
