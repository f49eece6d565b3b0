"""Demonstrations → SFT → GRPO → paired evaluation → report."""

from typing import Any

import ml_collections

from z1_jax.presets import common

FULL_UPDATE = {  # of 3.35 B parameters, with the paper's rate
    "update__batch_size": 16,
    "update__micro_batch": 16,
    "update__optim__lr": 5e-6,
    "update__optim__lr_end": 5e-6,
}

# A small policy in the built-in kitchen, on two CPU cores: the defaults themselves (z1_jax/config/schema.py).
KITCHEN: dict[str, Any] = {}
# For tasks that take more control steps: more demonstrations, and Muon, which learns to localise objects in less than
# half of AdamW's steps.
LONG = {
    "demos__episodes": 500,
    "sft__optim__name": "muon",
    "sft__steps": 450,
}

# Members of a group that share the chunk that decides an episode all fail or all succeed, and teach nothing.
APART = {"group__branching": "none", "group__prefix_chunks": 0, "group__prefix_chunks_end": 0}

PRESETS = {
    "kitchen": KITCHEN,
    "long": LONG,
    "brief": {**LONG, **APART},  # for hard tasks that last about a second: the first chunk decides
    # For tasks that carry things: SFT must teach the policy to see before it succeeds at all. The second or third chunk
    # decides the grasp, and precision allows less noise.
    "carry": {
        **LONG,
        **APART,
        "demos__episodes": 1500,
        "sft__steps": 1600,
        "flow__noise_level": 0.7,
        "flow__noise_level_end": 0.3,
        "update__optim__lr": 1e-4,
    },
    # For a small world of one's own, in which demonstrations cost nothing (docs/own-environment.md).
    "small_world": {
        **LONG,
        **APART,
        "env__executed": 4,
        "env__parallel": 96,
        "demos__episodes": 1500,
        "demos__stride": 2,
        "demos__noise": 0.3,
        "sft__steps": 100,
        "sft__batch_size": 48,
        "group__count": 12,
        "train__iterations": 100,
    },
    # The default, a minute or two long: it shows that everything works, and learns next to nothing. Its task is the
    # easiest: so little SFT brings it to where some members of a group succeed and some fail.
    "smoke": {
        **common.SMOKE,
        "task": "CloseDrawer",
        "demos__episodes": 40,
        "sft__steps": 60,
        "env__parallel": 32,
        "eval__episodes": 64,
        "group__count": 4,
        "update__batch_size": 32,
        "update__micro_batch": 32,
        "train__iterations": 2,
        "train__checkpoint_every": 1,
    },
    "full": {  # π0.5 at full size from a converted checkpoint: see what it costs with python -m z1_jax.plan
        **common.FULL,
        "env__executed": 8,  # of 50: an episode of the default task has 40 control steps
        "init": "checkpoints/pi05",
        **FULL_UPDATE,
    },
    "robocasa": {  # π0.5 on RoboCasa, from a policy fine-tuned on its demonstrations (configs/sft.py:robocasa)
        **common.ROBOCASA,
        "init": "checkpoints/pi05-robocasa",
        "group__count": 16,
        "group__size": 4,
        "group__prefix_chunks": 15,
        "group__prefix_chunks_end": 0,
        **FULL_UPDATE,
    },
    "robocasa_standin": {
        **common.ROBOCASA_STANDIN,
        "group__count": 2,
        "group__size": 2,
        "group__prefix_chunks": 1,
        "reward__keep_low": 0.0,  # an untrained policy fails: keep its groups, so that the update runs
        "update__batch_size": 32,
        "update__micro_batch": 32,
        "train__iterations": 1,
        "train__checkpoint_every": 1,
    },
    # RLinf's few-shot GRPO of π0.5 (its libero_spatial_grpo_openpi_pi05.yaml), from a policy of SFT on few episodes. It
    # trains on the evaluation's own initial states, as RLinf does: results say so.
    "libero": {
        **common.LIBERO,
        **APART,
        **FULL_UPDATE,
        "init": "checkpoints/pi05-libero-sft",
        "env__protocol": "rlinf",
        "env__train_on": "initial_states",
        "env__parallel": 64,
        "flow__steps": 3,
        "flow__sde_steps": "one",
        "group__count": 64,  # 512 episodes an iteration: 64 environments, 8 times
        "group__size": 8,
        "reward__kind": "sparse",
        "reward__keep_high": 0.9,
        "update__epochs": 1,
        "update__batch_size": 2048,
        "update__ratio_max": 3.0,
        "update__optim__b2": 0.95,
    },
    # The real LIBERO with its experts, a few minutes long: it shows that everything works, and learns next to nothing.
    "libero_smoke": {
        **common.SMOKE,
        "task": "libero_object/0",
        "env__suite": "libero",
        "env__cameras": ("agentview", "robot0_eye_in_hand"),
        "env__horizon": 100,  # an expert takes 85 to 87
        "env__executed": 5,
        "env__parallel": 2,  # each is a gigabyte
        "env__workers": 1,
        "env__timeout_s": 600.0,
        "demos__episodes": 2,
        "demos__stride": 5,
        "sft__steps": 20,
        "eval__episodes": 2,
        "group__count": 1,
        "group__size": 2,
        "reward__keep_low": 0.0,  # a policy of so little SFT fails: keep its groups, so that the update runs
        "update__batch_size": 32,
        "update__micro_batch": 32,
        "train__iterations": 1,
        "train__checkpoint_every": 1,
    },
    # Meta-World with its own experts, under the protocol `quick`: a small policy from pixels and words.
    "metaworld": {
        **LONG,
        **APART,
        **common.METAWORLD,
        "task": "reach-v3",
        "env__horizon": 96,  # an expert takes 33 to 71
        "train__iterations": 60,
    },
    # Meta-World with its own experts, a few minutes long: it shows that everything works, and learns next to nothing.
    "metaworld_smoke": {
        **common.SMOKE,
        **common.METAWORLD,
        "task": "drawer-close-v3",
        "env__horizon": 96,  # an expert takes 40 to 70
        "env__parallel": 8,
        "demos__episodes": 8,
        "eval__episodes": 8,
        "group__count": 2,
        "group__size": 4,
        "reward__keep_low": 0.0,  # a policy of so little SFT may fail: keep its groups, so that the update runs
        "update__batch_size": 32,
        "update__micro_batch": 32,
        "train__iterations": 1,
        "train__checkpoint_every": 1,
    },
}


def get_config(preset: str = "kitchen") -> ml_collections.ConfigDict:
    return common.choose("grpo", preset, PRESETS)
