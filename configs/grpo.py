"""Demonstrations → SFT → GRPO → paired evaluation → report."""

import ml_collections

from z1_jax import config as z1_config


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    """`kitchen`: a small policy in the built-in kitchen, on two CPU cores. `smoke`: the same, a minute long."""
    if preset == "kitchen":
        return z1_config.defaults()
    if preset == "smoke":
        return z1_config.defaults(
            demos__episodes=24,
            sft__steps=30,
            sft__batch_size=16,
            sft__optim__warmup_steps=5,
            group__count=2,
            env__parallel=16,
            update__batch_size=32,
            update__micro_batch=32,
            train__iterations=2,
            train__checkpoint_every=1,
            eval__episodes=16,
            eval__videos=1,
            log__every=10,
        )
    raise z1_config.ConfigError(f"preset {preset!r} of configs/grpo.py does not exist; known: kitchen, smoke")
