"""One policy (config.checkpoint), or two (config.compare), on the held-out seeds."""

import ml_collections

from configs import common

PRESETS = {
    "kitchen": {"algorithm": "eval"},
    "robocasa": {"algorithm": "eval", **common.ROBOCASA},
    "smoke": {"algorithm": "eval", "env__parallel": 16, "eval__episodes": 16},
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("eval", preset, PRESETS)
