"""Demonstrations → SFT → evaluation → report."""

import ml_collections

from z1_jax.presets import common

ROBOCASA = {
    "algorithm": "sft",
    **common.ROBOCASA,
    "init": "checkpoints/pi05",
    "demos__dataset": "data/robocasa",
}

PRESETS = {
    "kitchen": {"algorithm": "sft", **common.EVERY_STEP},
    "smoke": {"algorithm": "sft", **common.EVERY_STEP, **common.SMOKE},
    # π0.5 at full size: see what it costs with python -m z1_jax.plan
    "full": {"algorithm": "sft", **common.FULL, "mesh__fsdp": 2},
    # π0.5 on RoboCasa's public demonstrations, from a converted checkpoint, on one device of 80 GB (docs/one-gpu.md)
    "robocasa": ROBOCASA,
    # The same on one device of 24 GB: adapters instead of all parameters, and half the batch
    "robocasa_lora": {**ROBOCASA, "sft__scope": "lora", "sft__batch_size": 16},
    # π0.5 on LIBERO's demonstrations, imported from openpi's dataset or LIBERO's own (docs/libero.md)
    "libero": {"algorithm": "sft", **common.LIBERO, "init": "checkpoints/pi05", "demos__dataset": "data/libero"},
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("sft", preset, PRESETS)
