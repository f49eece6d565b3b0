"""Common SFT → evaluation of all tasks → specialists and joint RL from there → one table (z1_jax/study/config.py)."""

from typing import Any

import ml_collections

from z1_jax.config.schema import ConfigError

# A key a__b is the key a.b of a run.
PRESETS: dict[str, dict[str, Any]] = {
    "kitchen24": {
        "tasks": ("kitchen24",),
        # Recipes were chosen on seeds from 1,000,000,000 on; these nothing else has used (docs/kitchen-24.md).
        "every": {"env__executed": 4, "flow__temperature": 0.0, "eval__first_seed": 1_200_000_000},
        "sft": {
            "demos__episodes": 200,
            "demos__sampling": "balanced",
            "sft__optim__name": "muon",
            "sft__steps": 3000,
            "sft__optim__warmup_steps": 100,
            "sft__ema": 0.99,
        },
        "grpo": {
            "group__branching": "none",
            "group__prefix_chunks": 0,
            "group__prefix_chunks_end": 0,
            "eval__videos": 0,
        },
        "joint": {"group__count": 24, "group__spread": "adaptive", "env__parallel": 192},
    },
    # Two tasks, a few minutes: it shows that everything works, and learns next to nothing.
    "smoke": {
        "tasks": ("drawers",),
        "sft_preset": "smoke",
        "grpo_preset": "smoke",
        "every": {"eval__episodes": 16, "env__parallel": 32},
        "sft": {"demos__episodes": 20, "sft__steps": 40},
        "grpo": {"train__iterations": 1, "group__count": 2, "eval__videos": 0},
    },
}


def get_config(preset: str = "kitchen24") -> ml_collections.ConfigDict:
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} of configs/study.py does not exist; known: {', '.join(PRESETS)}")
    return ml_collections.ConfigDict(PRESETS[preset])
