"""One policy (config.checkpoint), or two (config.compare), on the held-out seeds."""

import ml_collections

from z1_jax.presets import common

OWN = {"algorithm": "eval", **common.EVERY_STEP, "flow__steps": 0}  # the policy acts as it was trained to

PRESETS = {
    "kitchen": OWN,
    "robocasa": {"algorithm": "eval", **common.ROBOCASA},
    "smoke": {**OWN, "env__parallel": 16, "eval__episodes": 16},
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("eval", preset, PRESETS)
