"""LeRobot's config.json, train_config.json and processor files.

Each key and step is read, must have the one value that is supported, or is known to have no effect; others are refused.

Written against LeRobot 0.4.0 to 0.6.2: `PI05Config`, `PreTrainedConfig`, the steps of `make_pi05_pre_post_processors`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from z1_jax.convert.architecture import variant_heads
from z1_jax.convert.keys import Ignored, read_count, read_json
from z1_jax.convert.merging import PEFT_CONFIG
from z1_jax.convert.store import FormatError
from z1_jax.data.tokenizer import PALIGEMMA

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
IMAGES, STATE = "observation.images.", "observation.state"
MODES = {"QUANTILES": "quantile", "MEAN_STD": "z_score"}

# Keys of config.json that say how the policy computes, and what becomes of them in `read_config`.
_READ = (
    "type", "input_features", "output_features", "normalization_mapping", "paligemma_variant",
    "action_expert_variant", "chunk_size", "n_action_steps", "max_state_dim", "max_action_dim", "num_inference_steps",
    "image_resolution", "empty_cameras", "tokenizer_max_length", "use_relative_actions", "relative_exclude_joints",
    "action_feature_names", "use_peft",
)  # fmt: skip
# Key -> (the only value that this project's policy can have, what another one means).
_FIXED: dict[str, tuple[Any, str]] = {
    "n_obs_steps": (1, "the policy looks at one observation"),
    "use_visual_memory": (False, "it needs the images of earlier steps"),
    "use_proprioceptive_memory": (False, "it needs the states of earlier steps, and none in the prompt"),
    "min_period": (4e-3, "it embeds the flow time in other waves"),
    "max_period": (4.0, "it embeds the flow time in other waves"),
}
_TRAINING, _PUBLISHING = "how LeRobot trained it", "where LeRobot published it"
_PRECISION = "precision and speed of LeRobot's computation; --dtype and model.dtype set ours"
# Keys without effect on what the policy computes -> why.
_NO_EFFECT: dict[str, str] = {
    **dict.fromkeys(("push_to_hub", "repo_id", "private", "tags", "license"), _PUBLISHING),
    **dict.fromkeys(("pretrained_path", "pretrained_revision"), "where its training began"),
    **dict.fromkeys(("dtype", "device", "use_amp", "compile_model", "compile_mode"), _PRECISION),
    **dict.fromkeys(("gradient_checkpointing", "freeze_vision_encoder", "train_expert_only"), _TRAINING),
    **dict.fromkeys([f"time_sampling_{name}" for name in ("beta_alpha", "beta_beta", "scale", "offset")], _TRAINING),
    **dict.fromkeys(
        [f"optimizer_{name}" for name in ("lr", "betas", "eps", "weight_decay", "grad_clip_norm")], _TRAINING
    ),
    **dict.fromkeys([f"scheduler_{name}" for name in ("warmup_steps", "decay_steps", "decay_lr")], _TRAINING),
    **dict.fromkeys(
        ("memory_frames", "memory_stride", "memory_temporal_attention_every"), "read only with use_*_memory"
    ),
    "rtc_config": "how a robot joins one chunk to the next; the chunk itself is sampled as without it",
    "rtc_training_max_delay": "how LeRobot trained it; without a prefix of known actions it samples as without it",
}
# Steps of the two processors, in LeRobot's order -> keys of their config.
_NORMALIZER = ("eps", "features", "norm_map", "normalize_observation_keys")
_STEPS = {
    PREPROCESSOR: {
        "rename_observations_processor": ("rename_map",),
        "to_batch_processor": (),
        "relative_actions_processor": ("enabled", "exclude_joints", "action_names"),
        "normalizer_processor": _NORMALIZER,
        "pi05_prepare_state_tokenizer_processor_step": ("max_state_dim", "task_key", "include_state_in_prompt"),
        "tokenizer_processor": ("max_length", "task_key", "padding_side", "padding", "truncation", "tokenizer_name"),
        "device_processor": ("device", "float_dtype"),
    },
    POSTPROCESSOR: {
        "unnormalizer_processor": _NORMALIZER,
        "absolute_actions_processor": ("enabled",),
        "device_processor": ("device", "float_dtype"),
    },
}
# (step, key) -> the values that this project's policy can have.
_FIXED_IN_STEPS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("relative_actions_processor", "enabled"): (False, True),
    ("absolute_actions_processor", "enabled"): (False, True),
    ("pi05_prepare_state_tokenizer_processor_step", "task_key"): ("task",),
    ("pi05_prepare_state_tokenizer_processor_step", "include_state_in_prompt"): (True,),
    ("tokenizer_processor", "task_key"): ("task",),
    ("tokenizer_processor", "padding_side"): ("right",),
    ("tokenizer_processor", "padding"): ("max_length",),
    ("tokenizer_processor", "truncation"): (True,),
    ("tokenizer_processor", "tokenizer_name"): (PALIGEMMA,),
    ("device_processor", "float_dtype"): (None, "float32"),
}
_LARGEST_EPS = 1e-6  # LeRobot writes 1e-8, openpi 1e-6: neither shows in a normalised value
Steps = Mapping[str, Mapping[str, Any]]


def read_config(folder: pathlib.Path, config: Mapping[str, Any], ignored: Ignored) -> dict[str, Any]:
    """Settings from config.json (given as read) and from the processors and train_config.json beside it.

    `pads_state` is whether LeRobot padded the state in the prompt to `max_state_dim`: None where no file tells.

    Raises:
        FormatError: a key or step is unknown, or has a value that is not supported here.
    """
    path = folder / "config.json"
    if config["type"] != "pi05":
        raise FormatError(f"{path} is of a {config['type']!r} policy; expected LeRobot's pi05")
    ignored.check(path, config, (*_READ, *_FIXED, *_NO_EFFECT))
    for key, (value, meaning) in _FIXED.items():
        if key in config and config[key] != value:
            raise FormatError(f"{path} has {key}={config[key]!r}, which is not supported ({meaning}); expected {value}")
    if config.get("use_peft") and not (folder / PEFT_CONFIG).is_file():
        raise FormatError(
            f"{path} has use_peft={config['use_peft']!r}, but {folder} has no {PEFT_CONFIG}, which says how its "
            "adapters are merged; fetch the folder anew"
        )
    before, after = (_read_steps(folder / f"{name}.json", _STEPS[name], ignored) for name in _STEPS)
    settings: dict[str, Any] = variant_heads(path, config)
    settings |= {
        "horizon": read_count(path, config, "chunk_size"),
        "executed": read_count(path, config, "n_action_steps"),
        "prompt_length": read_count(path, config, "tokenizer_max_length"),
        "denoising_steps": read_count(path, config, "num_inference_steps"),
        "action_dim": read_count(path, config, "max_action_dim"),
        "max_state_dim": read_count(path, config, "max_state_dim"),
        "state_in_prompt": True,
        "pads_state": _pads_state(folder, config, {**before, **after}),
        "relative_actions": _relative_actions(folder, config, before, after),
    }
    # LeRobot runs what the processors say; config.json is what they were made from.
    if "max_length" in (tokenizer := before.get("tokenizer_processor", {})):
        settings["prompt_length"] = read_count(folder / f"{PREPROCESSOR}.json", tokenizer, "max_length")
    prepare = before.get("pi05_prepare_state_tokenizer_processor_step", {})
    if "max_state_dim" in prepare:
        settings["max_state_dim"] = read_count(folder / f"{PREPROCESSOR}.json", prepare, "max_state_dim")
    if sides := config.get("image_resolution"):
        if len(sides) != 2 or sides[0] != sides[1]:
            raise FormatError(f"{path} has image_resolution={sides}; expected a square")
        settings["image_size"] = sides[0]
    cameras = _cameras(path, config, before.get("rename_observations_processor", {}).get("rename_map") or {})
    if cameras:
        settings["cameras"] = cameras
    settings["norm_mode"] = _norm_mode(folder, config, before, after)
    return settings


def _read_steps(path: pathlib.Path, known: Mapping[str, Sequence[str]], ignored: Ignored) -> dict[str, dict[str, Any]]:
    """Step -> its config, of one processor; empty where the file does not exist."""
    if not path.is_file():
        return {}
    content = read_json(path)
    ignored.check(path, content, ("name", "steps"), "")
    steps: dict[str, dict[str, Any]] = {}
    for entry in content.get("steps", ()):
        name = str(entry.get("registry_name") or entry.get("class") or "a step without a name")
        ignored.check(path, [name], known)
        if name not in known:
            continue
        ignored.check(path, entry, ("registry_name", "class", "config", "state_file"), f"{name}.")
        values = entry.get("config") or {}
        ignored.check(path, values, known[name], f"{name}.")
        for key, value in values.items():
            allowed = _FIXED_IN_STEPS.get((name, key))
            if key == "tokenizer_name":
                value = PALIGEMMA if pathlib.PurePath(value).name == pathlib.PurePath(PALIGEMMA).name else value
            if allowed is not None and value not in allowed:
                raise FormatError(
                    f"{path}: {name} has {key}={value!r}, which is not supported; expected {allowed[0]!r}"
                )
        if name in steps and name != "device_processor":
            raise FormatError(f"{path} has {name} twice; expected once")
        steps[name] = values
    _check_order(path, [name for name in steps if name != "device_processor"], list(known))
    return steps


def _check_order(path: pathlib.Path, names: list[str], order: list[str]) -> None:
    expected = sorted(names, key=order.index)
    if names != expected:
        raise FormatError(f"{path} has its steps in the order {', '.join(names)}; expected {', '.join(expected)}")
    if "tokenizer_processor" in names and "pi05_prepare_state_tokenizer_processor_step" not in names:
        raise FormatError(
            f"{path} has tokenizer_processor without pi05_prepare_state_tokenizer_processor_step, so that its prompts "
            "are not π0.5's; expected both"
        )


def _pads_state(folder: pathlib.Path, config: Mapping[str, Any], steps: Steps) -> bool | None:
    """Whether LeRobot padded the state before it wrote it into the prompt: up to 0.4.4 it did, later it did not.

    Processors hold no version. LeRobot 0.5.1 added relative actions to configs and steps, 0.5.0 `cudnn_deterministic`
    to train_config.json, and model cards name the version since 0.6.0. A config without any of them may be openpi's
    weights with LeRobot's files around them, as lerobot/pi05_base, which no LeRobot trained.
    """
    newer = ("use_relative_actions", "use_visual_memory", "pretrained_revision", "rtc_training_max_delay")
    clues = set()
    if any(key in config for key in newer) or {"relative_actions_processor", "absolute_actions_processor"} & set(steps):
        clues.add(False)
    if (folder / "train_config.json").is_file():
        clues.add("cudnn_deterministic" not in read_json(folder / "train_config.json"))
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(errors="replace")
        if version := re.search(r"LeRobot version\s*\|\s*v?(\d+)\.(\d+)", card):
            clues.add((int(version[1]), int(version[2])) < (0, 5))
    return clues.pop() if len(clues) == 1 else None


def _relative_actions(
    folder: pathlib.Path, config: Mapping[str, Any], before: Steps, after: Steps
) -> dict[str, Any] | None:
    """The relative dimensions as JSON (see `RelativeActions`); None where actions are absolute.

    LeRobot keeps a dimension absolute if its name contains one of `relative_exclude_joints`; without names, none.
    """
    step = before.get("relative_actions_processor", {})
    told = {"config.json": bool(config.get("use_relative_actions", False))}
    for file, name, steps in (
        (PREPROCESSOR, "relative_actions_processor", before),
        (POSTPROCESSOR, "absolute_actions_processor", after),
    ):
        if (folder / f"{file}.json").is_file():
            told[f"{file}.json ({name})"] = bool(steps.get(name, {}).get("enabled", False))
    if len(set(told.values())) > 1:
        yes, no = (", ".join(file for file, is_so in told.items() if is_so is wanted) for wanted in (True, False))
        raise FormatError(
            f"{folder}: {yes} says that actions are relative to the state, {no} that they are not; make them say the "
            "same"
        )
    if not told["config.json"]:
        return None
    names = [str(name) for name in step.get("action_names", config.get("action_feature_names")) or ()]
    left_out = step.get("exclude_joints", config.get("relative_exclude_joints", ["gripper"])) or ()
    mask = relative_mask(names, [str(name) for name in left_out], config["output_features"]["action"]["shape"][0])
    if not any(mask):
        raise FormatError(f"{folder}: relative actions leave out all of {', '.join(names)}; expected some to be left")
    return {"mask": mask, "names": names[: len(mask)] if len(names) >= len(mask) else []}


def relative_mask(names: Sequence[str], left_out: Sequence[str], action_dim: int) -> list[bool]:
    """Which dimensions LeRobot makes relative, from their names and the excluded ones."""
    wanted = [token.lower() for token in left_out if token]
    named = [not any(token in name.lower() for token in wanted) for name in names[:action_dim]]
    return named + [True] * (action_dim - len(named))


def relative_config(values: Mapping[str, Any] | None, action_dim: int) -> dict[str, Any]:
    """The keys of config.json for relative dimensions (as JSON); nothing for a policy with absolute actions.

    Known names are kept if they tell the absolute dimensions from the others; else names are made up.
    """
    if not values:
        return {}
    mask = [*values["mask"], *[False] * action_dim][:action_dim]
    names = list(values["names"])
    left_out = [name for name, relative in zip(names, mask, strict=False) if not relative]
    if len(names) != action_dim or relative_mask(names, left_out, action_dim) != mask:  # one stands in another
        names = [f"{'relative' if relative else 'absolute'}_{dim}" for dim, relative in enumerate(mask)]
        left_out = [name for name, relative in zip(names, mask, strict=True) if not relative]
    return {"use_relative_actions": True, "relative_exclude_joints": left_out, "action_feature_names": names}


def _cameras(path: pathlib.Path, config: Mapping[str, Any], rename_map: Mapping[str, str]) -> list[str | None]:
    """The environment's camera of each slot; None for an empty slot."""
    inputs = config["input_features"]
    names = [name for name, feature in inputs.items() if feature["type"] == "VISUAL"]
    empty = [
        f"{IMAGES}empty_camera_{i}" for i in range(read_count(path, {"empty_cameras": 0, **config}, "empty_cameras", 0))
    ]
    names += [name for name in empty if name not in names]
    origin = {new: old for old, new in rename_map.items()}
    lost = [old for old, new in rename_map.items() if old in inputs and new != old]
    if len(origin) != len(rename_map) or lost:
        raise FormatError(
            f"{path.with_name(PREPROCESSOR)}.json renames {dict(rename_map)}; two inputs become one, or one is lost"
        )
    short = [origin.get(name, name).removeprefix(IMAGES) for name in names]
    return [None if name.startswith("empty_camera_") else name for name in short]


def _norm_mode(folder: pathlib.Path, config: Mapping[str, Any], before: Steps, after: Steps) -> str:
    """How state and actions are normalised. config.json and both processors must agree."""
    path = folder / "config.json"
    modes = _modes(path, config["normalization_mapping"])
    for file, step, steps in (
        (PREPROCESSOR, "normalizer_processor", before),
        (POSTPROCESSOR, "unnormalizer_processor", after),
    ):
        if step not in steps:
            continue
        where, values = folder / f"{file}.json", steps[step]
        found = _modes(where, values.get("norm_map", {}))
        if found != modes:
            raise FormatError(
                f"{where} normalises {found}, which LeRobot runs, and config.json says {modes}; make them say the same"
            )
        eps = values.get("eps", 0.0)
        if not 0 <= eps <= _LARGEST_EPS:
            raise FormatError(f"{where}: {step} has eps={eps}; expected at most {_LARGEST_EPS}")
        keys = values.get("normalize_observation_keys")
        features = values.get("features", {})
        if step == "normalizer_processor" and (
            (keys is not None and STATE not in keys) or features.get(STATE, {}).get("type") != "STATE"
        ):
            raise FormatError(f"{where}: {step} does not normalise {STATE}; expected it among its features")
    if len(set(modes.values())) > 1 or modes["STATE"] not in MODES:
        raise FormatError(f"{path} normalises {modes}; expected {' or '.join(MODES)} for state and action alike")
    return MODES[modes["STATE"]]


def _modes(path: pathlib.Path, norm_map: Mapping[str, str]) -> dict[str, str]:
    if norm_map.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise FormatError(f"{path} normalises images by {norm_map['VISUAL']}; expected IDENTITY")
    return {kind: norm_map.get(kind, "IDENTITY") for kind in ("STATE", "ACTION")}


def prompt_state_dim(settings: Mapping[str, Any], state_dim: int | None, where: pathlib.Path) -> int | None:
    """The width that the state in the prompt is padded to; None where it is not padded.

    Args:
        settings: of `read_config`, and `prompt_state_dim` where a flag or a file of ours says it.
        state_dim: the state's own width, where it is known.

    Raises:
        FormatError: neither files nor flags tell.
    """
    known = "prompt_state_dim" in settings
    width = settings.get("prompt_state_dim" if known else "max_state_dim")
    if width is None or (state_dim is not None and state_dim >= width):  # openpi never pads; or there is nothing to pad
        return None
    if known:
        return width
    if settings["pads_state"] is None:
        raise FormatError(
            f"nothing in {where} tells whether its prompts held the state padded to {width} numbers; give "
            f"--pad-state={width} if LeRobot 0.4.4 or older trained it, --pad-state=none if a newer one or openpi did "
            "(lerobot/pi05_base)"
        )
    return width if settings["pads_state"] else None
