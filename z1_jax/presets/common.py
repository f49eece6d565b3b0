"""What the config files share: the choice of a preset, and the settings of a run that takes a minute or two."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from z1_jax.config import schema as z1_config

# Noise of one strength in every denoising step, and labels of an undisturbed branch: a choice for full size, and for
# SFT alone. Presets of SFT and evaluation hold what only RL reads too: a run belongs to its whole config.
EVERY_STEP = {
    "flow__sde_steps": "all",
    "flow__noise_level": 0.5,
    "flow__noise_schedule": "constant",
    "update__optim__lr": 8e-5,
    "update__optim__lr_end": 4e-5,
    "demos__labels": "undisturbed",
    "train__iterations": 150,
}

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
    **EVERY_STEP,
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

# RoboCasa, v0.2 or v1.0.1, as π0.5 is evaluated on it: 50 episodes over the evaluation scenes, unseen objects, a look
# every 5 steps. The cameras stand in the order of the slots: base, left wrist, right wrist.
ROBOCASA = {
    **FULL,
    "env__suite": "robocasa",
    "env__cameras": ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right"),
    "inputs__slots": ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right"),
    "env__image_size": 256,  # RoboCasa's own; resized to the model's 224
    "env__executed": 5,
    "env__scenes": ("training",),
    "env__workers": 8,
    "env__timeout_s": 600.0,  # a branch may rebuild scenes
    "eval__episodes": 50,
    "eval__scenes": ("evaluation",),
    "eval__objects": "heldout",
    "eval__videos": 1,
}

# LIBERO as openpi's pi05_libero sees it: no state in the prompt, two cameras and a masked third, a look every 5 steps.
# Its horizon of 10 and its own inputs travel with the converted checkpoint (docs/libero.md).
LIBERO = {
    **FULL,
    "env__suite": "libero",
    "tasks": ("libero_spatial",),
    "env__cameras": ("agentview", "robot0_eye_in_hand"),
    "inputs__slots": ("agentview", "robot0_eye_in_hand", "none"),
    "inputs__state_in_prompt": False,
    "env__image_size": 256,  # resized to the model's 224, as openpi's client does
    "env__executed": 5,
    "env__workers": 8,
    "env__timeout_s": 600.0,
    "eval__episodes": 50,
    "eval__videos": 1,
}

# Meta-World as it is quick on a CPU; under others' protocols, env.protocol, env.image_size and env.executed are theirs.
METAWORLD = {
    "env__suite": "metaworld",
    "env__protocol": "quick",
    "env__cameras": ("corner2",),
    "demos__stride": 8,  # a chunk; control steps are an eightieth of a second
}

# The real RoboCasa code without its 10 GB of assets, and a small untrained policy: it shows that everything works.
ROBOCASA_STANDIN = {
    **EVERY_STEP,
    "env__suite": "robocasa",
    "env__standins": True,
    "env__scenes": ("1/1",),
    "env__horizon": 16,
    "env__executed": 4,
    "env__parallel": 4,
    "env__timeout_s": 600.0,
    "eval__episodes": 5,
    "eval__scenes": ("evaluation",),
    "eval__objects": "heldout",
    "eval__videos": 1,
    "eval__video_size": 96,
    "init": "random",
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
