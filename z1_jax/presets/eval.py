"""One policy (config.checkpoint), or two (config.compare), on the held-out seeds."""

import ml_collections

from z1_jax.presets import common

# The policy acts as it was trained to, and is filmed where that is asked for (eval.videos, eval.film_seeds).
OWN = {"algorithm": "eval", **common.EVERY_STEP, "flow__steps": 0, "eval__videos": 0}

PRESETS = {
    "kitchen": OWN,
    "robocasa": {"algorithm": "eval", **common.ROBOCASA},
    "libero": {"algorithm": "eval", **common.LIBERO},
    "smoke": {**OWN, "env__parallel": 16, "eval__episodes": 16},
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("eval", preset, PRESETS)
