"""What the config files share: the choice of a preset, and the settings of a run that takes a minute or two."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from z1_jax import config as z1_config

SMOKE = {
    "demos__episodes": 24,
    "sft__steps": 30,
    "sft__batch_size": 16,
    "sft__optim__warmup_steps": 5,
    "env__parallel": 16,
    "eval__episodes": 16,
    "eval__videos": 1,
    "log__every": 10,
}

# π0.5 at its full size, 3 cameras of 224 pixels. Trained float32 parameters, bfloat16 computation.
FULL = {
    "model__preset": "pi05",
    "model__dtype": "bfloat16",
    "model__remat": "full",
    "env__image_size": 224,
    "env__cameras": ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand"),
    "env__parallel": 16,
    "sft__batch_size": 32,
    "sft__flows": 1,
    "sft__optim__lr": 2.5e-5,
    "sft__optim__lr_end": 2.5e-6,
    "sft__optim__warmup_steps": 1000,
    "sft__optim__weight_decay": 1e-10,
    "sft__steps": 30_000,
    "flow__steps": 10,
}


def choose(file: str, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> ml_collections.ConfigDict:
    """The defaults with a preset's settings (`a__b` for the key a.b).

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in presets:
        raise z1_config.ConfigError(
            f"preset {preset!r} of configs/{file}.py does not exist; known: {', '.join(presets)}"
        )
    return z1_config.defaults(**presets[preset])
