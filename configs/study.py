"""The presets of z1_jax/presets/study.py, which travel with the package. To make your own, copy that file."""

from z1_jax.presets.study import PRESETS, get_config

__all__ = ["PRESETS", "get_config"]
