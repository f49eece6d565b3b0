"""Demonstrations → SFT → evaluation → report."""

import ml_collections

from z1_jax.presets import common

PRESETS = {
    "kitchen": {"algorithm": "sft", **common.EVERY_STEP},
    "smoke": {"algorithm": "sft", **common.EVERY_STEP, **common.SMOKE},
    # π0.5 at full size: see what it costs with python -m z1_jax.plan
    "full": {"algorithm": "sft", **common.FULL, "mesh__fsdp": 2},
    # π0.5 on RoboCasa's public demonstrations (z1_jax.collect --from=…), from a converted checkpoint
    "robocasa": {
        "algorithm": "sft",
        **common.ROBOCASA,
        "init": "checkpoints/pi05",
        "demos__dataset": "data/robocasa",
        "mesh__fsdp": 2,
    },
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("sft", preset, PRESETS)
