"""Demonstrations → SFT → evaluation → report."""

import ml_collections

from configs import common

PRESETS = {
    "kitchen": {"algorithm": "sft"},
    "smoke": {"algorithm": "sft", **common.SMOKE},
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("sft", preset, PRESETS)
