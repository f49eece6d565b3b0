"""Named model sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.siglip import SiglipConfig

PRESETS: dict[str, Pi05Config] = {
    # π0.5 as published by Physical Intelligence: 3.35 B parameters.
    "pi05": Pi05Config(
        vision=SiglipConfig(width=1152, depth=27, mlp=4304, heads=16, patch=14, image_size=224),
        language=GemmaConfig(width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256),
        expert=GemmaConfig(width=1024, depth=18, mlp=4096, heads=8, kv_heads=1, head_dim=256),
        vocab_size=257_152,
        cameras=3,
        prompt_length=200,
        action_dim=32,
        horizon=50,
    ),
    # A policy for the built-in kitchen that trains from scratch on two CPU cores.
    "kitchen": Pi05Config(
        vision=SiglipConfig(width=96, depth=2, mlp=192, heads=4, patch=16, image_size=64),
        language=GemmaConfig(width=128, depth=3, mlp=192, heads=4, kv_heads=1, head_dim=32),
        expert=GemmaConfig(width=96, depth=3, mlp=192, heads=4, kv_heads=1, head_dim=32),
        vocab_size=512,
        cameras=2,
        prompt_length=44,
        action_dim=12,
        horizon=8,
        dtype="float32",
        unroll=True,
    ),
    # π0.5's proportions at nine million parameters, for measurements on a CPU: one observation's prefix costs some
    # 30 times what the expert's denoising of a chunk costs (K = 4).
    "mid": Pi05Config(
        vision=SiglipConfig(width=112, depth=3, mlp=416, heads=4, patch=14, image_size=112),
        language=GemmaConfig(width=256, depth=4, mlp=2048, heads=6, kv_heads=1, head_dim=32),
        expert=GemmaConfig(width=128, depth=4, mlp=512, heads=6, kv_heads=1, head_dim=32),
        vocab_size=512,
        cameras=3,
        prompt_length=48,
        action_dim=32,
        horizon=8,
        dtype="float32",
        unroll=True,
    ),
    # The size of the reference numbers that the tests compare with.
    "tiny": Pi05Config(
        vision=SiglipConfig(width=32, depth=2, mlp=64, heads=2, patch=14, image_size=28),
        language=GemmaConfig(width=64, depth=2, mlp=128, heads=4, kv_heads=1, head_dim=16),
        expert=GemmaConfig(width=32, depth=2, mlp=64, heads=4, kv_heads=1, head_dim=16),
        vocab_size=512,
        cameras=3,
        prompt_length=12,
        action_dim=8,
        horizon=6,
        dtype="float32",
    ),
}


def get_preset(name: str, **overrides: Any) -> Pi05Config:
    """The preset of that name with some of its own fields replaced. Raises ValueError for an unknown name or field."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(Pi05Config)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown model setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return dataclasses.replace(PRESETS[name], **overrides)
