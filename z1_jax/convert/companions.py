"""The files beside a checkpoint's weights, in each project's format: configs, normalisation statistics, tokenizer.

Settings are plain values by name. A setting that a project's files do not hold is absent, never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from z1_jax.convert import lerobot
from z1_jax.convert.architecture import variant_heads
from z1_jax.convert.keys import Ignored, read_count, read_json
from z1_jax.convert.lerobot import IMAGES, MODES, POSTPROCESSOR, PREPROCESSOR, STATE
from z1_jax.convert.merging import PEFT_CONFIG, PEFT_KEYS
from z1_jax.convert.safetensors import SafetensorsReader, SafetensorsWriter
from z1_jax.convert.store import FormatError, TensorInfo
from z1_jax.data.normalize import NormStats, load_norm_stats, save_norm_stats
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS

SIDECAR = "z1_jax.json"  # written with every export: what the other project's files have no place for
TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")
Stats = Mapping[str, NormStats]

_LEROBOT_KEYS = {"state": STATE, "actions": "action"}
_SIDECAR_KEYS = (
    "norm_mode", "cameras", "state_in_prompt", "prompt_state_dim", "clip", "tokenizer_sha256", "tokenizer_name",
    "executed", "denoising_steps", "asset_id", "heads", "vision_heads", "horizon", "prompt_length", "compute",
    "ignored", "world", "norm_rules", "relative_actions",
)  # fmt: skip
_OPENPI_READ = (
    "paligemma_variant", "action_expert_variant", "action_dim", "action_horizon", "max_token_len", "pi05",
    "discrete_state_input",
)  # fmt: skip
# Keys of openpi's config.json without effect on what the policy computes -> why.
_OPENPI_NO_EFFECT = {
    **dict.fromkeys(("precision", "dtype"), "precision of openpi's computation; --dtype and model.dtype set ours"),
    "pytorch_compile_mode": "speed of openpi's computation",
}


def read_settings(folder: pathlib.Path, ignored: Ignored) -> dict[str, Any]:
    """Settings from the config files beside the weights; our own sidecar overrides the others.

    Raises:
        FormatError: damaged, or a key or step that is neither known nor ignored, or not supported.
    """
    settings: dict[str, Any] = {}
    if (folder / PEFT_CONFIG).is_file():
        ignored.check(folder / PEFT_CONFIG, read_json(folder / PEFT_CONFIG), PEFT_KEYS)
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        try:
            read = lerobot.read_config if "type" in config else _openpi_settings
            settings |= read(folder, config, ignored)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} or a processor beside it lacks or distorts {error}; fetch it anew") from None
    if (folder / SIDECAR).is_file():
        sidecar = read_json(folder / SIDECAR)
        ignored.check(folder / SIDECAR, sidecar, _SIDECAR_KEYS)
        settings |= sidecar
    return settings


def _openpi_settings(folder: pathlib.Path, config: Mapping[str, Any], ignored: Ignored) -> dict[str, Any]:
    """From the config.json that openpi's converter writes, or all of a `Pi0Config`."""
    path = folder / "config.json"
    ignored.check(path, config, (*_OPENPI_READ, *_OPENPI_NO_EFFECT))
    if config.get("pi05", True) is not True:
        raise FormatError(f"{path} has pi05={config['pi05']!r}; expected a π0.5 checkpoint, with true")
    settings: dict[str, Any] = variant_heads(path, config)
    for key, name in (("action_dim", "action_dim"), ("action_horizon", "horizon"), ("max_token_len", "prompt_length")):
        if key in config:
            settings[name] = read_count(path, config, key)
    if "discrete_state_input" in config:
        if not isinstance(config["discrete_state_input"], bool):
            raise FormatError(f"{path} has discrete_state_input={config['discrete_state_input']!r}; expected a boolean")
        settings["state_in_prompt"] = config["discrete_state_input"]
    return settings


def read_stats(
    folder: pathlib.Path, asset_id: str | None, norm_mode: str, ignored: Ignored
) -> tuple[Stats | None, str | None]:
    """(statistics, asset id) from the files beside the weights; None for what is not there.

    Raises:
        FormatError: damaged, or there are several and none was chosen.
    """
    if (folder / f"{PREPROCESSOR}.json").is_file():
        return _lerobot_stats(folder, norm_mode), asset_id
    by_id = {name: folder / "assets" / name for name in asset_ids(folder)}
    if asset_id is not None and by_id and asset_id not in by_id:
        raise FormatError(f"{folder / 'assets'} has no statistics {asset_id!r}; there: {', '.join(by_id)}")
    if asset_id is None and len(by_id) > 1:
        raise FormatError(
            f"{folder / 'assets'} holds statistics of {len(by_id)} robots ({', '.join(by_id)}); choose with --asset-id"
        )
    if not by_id:
        return None, asset_id
    chosen = asset_id if asset_id is not None else next(iter(by_id))
    return read_norm_stats(by_id[chosen] / "norm_stats.json", norm_mode, ignored), chosen


def asset_ids(folder: pathlib.Path) -> list[str]:
    """The robots or datasets whose statistics openpi's folder `assets` holds."""
    found = sorted(path.parent for path in (folder / "assets").rglob("norm_stats.json"))
    return [path.relative_to(folder / "assets").as_posix() for path in found]


def read_norm_stats(path: pathlib.Path, norm_mode: str, ignored: Ignored) -> Stats:
    """openpi's norm_stats.json. Raises FormatError, also for statistics of an input that π0.5 does not have."""
    try:
        stats = _without_quantiles(path, norm_mode) or load_norm_stats(path, "openpi")
    except ValueError as error:
        raise FormatError(str(error)) from None
    if not {"state", "actions"} <= stats.keys():
        raise FormatError(f"{path} holds statistics of {sorted(stats)}; expected state and actions")
    ignored.check(path, stats, ("state", "actions"))
    return {key: stats[key] for key in ("state", "actions")}


def _without_quantiles(path: pathlib.Path, norm_mode: str) -> Stats | None:
    """Statistics without quantiles, which openpi writes for z-score policies; None for statistics that have them.

    Raises:
        ValueError: quantiles are needed.
    """
    try:
        content = read_json(path)
        values = content.get("norm_stats", content)
        if any(key in value and value[key] is not None for value in values.values() for key in ("q01", "q99")):
            return None
        moments = {
            key: {name: np.asarray(value[name], np.float64) for name in ("mean", "std")}
            for key, value in values.items()
        }
    except (FormatError, KeyError, TypeError, ValueError, AttributeError):
        return None  # whatever it is, it is told where statistics are read
    if norm_mode == "quantile":
        raise ValueError(
            f"{path} holds mean and std alone, and quantile normalisation needs q01 and q99; give --norm-mode=z_score "
            "if the policy was trained so (openpi: use_quantile_norm=False), or --norm-stats=FILE with all four"
        )
    return {key: NormStats(**_filled(value), rule="openpi") for key, value in moments.items()}


def _filled(got: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fills in mean and std, or quantiles, where absent: as a normal distribution has them. They are not used."""
    if "mean" not in got or "std" not in got:
        got |= {"mean": (got["q01"] + got["q99"]) / 2, "std": (got["q99"] - got["q01"]) / 4.65}
    if "q01" not in got or "q99" not in got:
        got |= {"q01": got["mean"] - 2.33 * got["std"], "q99": got["mean"] + 2.33 * got["std"]}
    return got


def with_rules(folder: pathlib.Path, stats: Stats, settings: Mapping[str, Any]) -> Stats:
    """The statistics with the policy's rules for constant dimensions: from our sidecar where one lies beside them.

    Raises:
        FormatError: the sidecar names a rule that does not exist.
    """
    before = "millimetre" if (folder / SIDECAR).is_file() else "openpi"  # sidecars did not always name them
    try:
        rules = {**dict.fromkeys(stats, before), **settings.get("norm_rules", {})}
        return {key: dataclasses.replace(value, rule=rules[key]) for key, value in stats.items()}
    except (ValueError, TypeError) as error:
        raise FormatError(f"{folder / SIDECAR}: norm_rules: {error}") from None


def _lerobot_stats(folder: pathlib.Path, norm_mode: str) -> Stats | None:
    """The statistics that LeRobot's normaliser saved; none for a model that was never trained on data.

    Raises:
        FormatError: damaged, incomplete, or the postprocessor has others for the actions.
    """
    path = _lerobot_stats_file(folder, PREPROCESSOR, "normalizer_processor")
    if path is None:
        return None
    values = _read_tensors(path)
    stats = {ours: _lerobot_one(path, values, theirs, norm_mode) for ours, theirs in _LEROBOT_KEYS.items()}
    if (folder / f"{POSTPROCESSOR}.json").is_file():
        other = _lerobot_stats_file(folder, POSTPROCESSOR, "unnormalizer_processor")
        found = _read_tensors(other) if other else {}
        prefix = f"{_LEROBOT_KEYS['actions']}."
        names = {name for name in (*values, *found) if name.startswith(prefix)}
        if not all(np.array_equal(values.get(name, ()), found.get(name, ())) for name in names):
            raise FormatError(f"{other or folder / POSTPROCESSOR} and {path} hold different statistics of the actions")
    return stats


def _lerobot_stats_file(folder: pathlib.Path, name: str, step_name: str) -> pathlib.Path | None:
    """The file in which a LeRobot processor says that its statistics are."""
    path = folder / f"{name}.json"
    config = read_json(path)
    try:
        steps = [step for step in config["steps"] if step.get("registry_name") == step_name]
        files = [step["state_file"] for step in steps if step.get("state_file")]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is no processor of LeRobot ({error})") from None
    if files and not (folder / files[0]).is_file():
        raise FormatError(f"{folder} lacks {files[0]}, where {path.name} says the statistics are")
    return folder / files[0] if files else None


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    reader = SafetensorsReader(path)
    try:
        return {name: reader.read(name).astype(np.float64) for name in reader.tensors}
    finally:
        reader.close()


def _lerobot_one(path: pathlib.Path, values: Mapping[str, np.ndarray], key: str, norm_mode: str) -> NormStats:
    needed = ("q01", "q99") if norm_mode == "quantile" else ("mean", "std")
    missing = [name for name in needed if f"{key}.{name}" not in values]
    if missing:
        raise FormatError(f"{path} lacks {key}.{missing[0]}, which {norm_mode} normalisation needs")
    got = {name: values[f"{key}.{name}"] for name in ("mean", "std", "q01", "q99") if f"{key}.{name}" in values}
    try:
        return NormStats(**_filled(got), rule="openpi")
    except ValueError as error:
        raise FormatError(f"{path}: {key}: {error}") from None


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    """The SentencePiece model beside the weights, where there is one."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def write_openpi(folder: pathlib.Path, stats: Stats | None, document: Mapping[str, Any]) -> None:
    """`assets/<id>/norm_stats.json`, as openpi's policies read it."""
    if stats:
        asset = folder / "assets" / (document.get("asset_id") or "z1_jax")
        asset.mkdir(parents=True)
        save_norm_stats(asset / "norm_stats.json", stats)


def write_openpi_config(folder: pathlib.Path, config: Pi05Config, precision: str) -> None:
    """The config.json that openpi's own converter leaves beside a PyTorch model."""
    content = {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": precision,
    }
    if is_published_size(config):
        (folder / "config.json").write_text(json.dumps(content, indent=2))


def is_published_size(config: Pi05Config) -> bool:
    """Whether this model has a size that openpi and LeRobot have a name for."""
    known = PRESETS["pi05"]
    return (config.vision, config.language, config.expert) == (known.vision, known.language, known.expert)


def require_lerobot(document: Mapping[str, Any], asked_padding: bool) -> None:
    """Raises FormatError when LeRobot's files have no place for how a policy makes its prompts.

    Args:
        asked_padding: whether the user said how the state is padded in the prompt.
    """
    if not document["state_in_prompt"]:
        raise FormatError(
            "this policy's prompt holds no state, and LeRobot always writes it there; export with --to=openpi, whose "
            "configs have discrete_state_input=False"
        )
    if (width := document["prompt_state_dim"]) and not asked_padding:
        raise FormatError(
            f"this policy's prompt holds the state padded to {width} numbers, as only LeRobot 0.4.4 and older do; "
            f"give --pad-state={width} for files that are right for those alone, or --pad-state=none for prompts "
            "without the padding, which this policy has not seen"
        )


def write_lerobot(
    folder: pathlib.Path, config: Pi05Config, stats: Stats | None, document: Mapping[str, Any], precision: str
) -> None:
    """config.json and the two processors, as LeRobot 0.4 saves them; relative actions as since 0.5.1."""
    mode = {theirs: ours for ours, theirs in MODES.items()}[document["norm_mode"]]
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    size = config.vision.image_size
    state_dim, action_dim = (stats[k].dim for k in ("state", "actions")) if stats else (config.action_dim,) * 2
    names = _camera_names(document["cameras"])
    inputs: dict[str, Any] = {IMAGES + name: {"type": "VISUAL", "shape": [3, size, size]} for name in names}
    inputs["observation.state"] = {"type": "STATE", "shape": [state_dim]}
    outputs = {"action": {"type": "ACTION", "shape": [action_dim]}}
    content = {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": norm_map,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": precision,
        "chunk_size": config.horizon,
        "n_action_steps": document["executed"],
        "max_state_dim": document.get("prompt_state_dim") or state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": document["denoising_steps"],
        "image_resolution": [size, size],
        "empty_cameras": sum(camera is None for camera in document["cameras"]),
        "tokenizer_max_length": config.prompt_length,
        **lerobot.relative_config(document["relative_actions"], action_dim),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    _write_processors(folder, config, content, stats)


def _camera_names(cameras: list[str | None]) -> list[str]:
    empty = iter(range(len(cameras)))
    return [camera or f"empty_camera_{next(empty)}" for camera in cameras]


def _write_processors(folder: pathlib.Path, config: Pi05Config, content: dict[str, Any], stats: Stats | None) -> None:
    features = {**content["input_features"], **content["output_features"]}
    common = {"eps": 1e-8, "norm_map": content["normalization_mapping"]}
    tokenizer = {
        "max_length": config.prompt_length,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    relative = content.get("use_relative_actions", False)
    offsets = {
        "enabled": True,
        "exclude_joints": content.get("relative_exclude_joints"),
        "action_names": content.get("action_feature_names"),
    }
    steps = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        *[("relative_actions_processor", offsets)] * relative,
        ("normalizer_processor", {**common, "features": features}),
        ("pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": content["max_state_dim"]}),
        ("tokenizer_processor", tokenizer),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    after = [
        ("unnormalizer_processor", {**common, "features": content["output_features"]}),
        *[("absolute_actions_processor", {"enabled": True})] * relative,
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    for name, chosen in ((PREPROCESSOR, steps), (POSTPROCESSOR, after)):
        entries = []
        for number, (registry_name, values) in enumerate(chosen):
            entries.append({"registry_name": registry_name, "config": values})
            if "normalizer" in registry_name and stats:
                file = f"{name}_step_{number}_{registry_name}.safetensors"
                _write_lerobot_stats(folder / file, stats)
                entries[-1]["state_file"] = file
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": entries}, indent=2))


def _write_lerobot_stats(path: pathlib.Path, stats: Stats) -> None:
    values = {
        f"{theirs}.{field}": getattr(stats[ours], field)
        for ours, theirs in _LEROBOT_KEYS.items()
        for field in ("mean", "std", "q01", "q99")
    }
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}
    writer = SafetensorsWriter(path, infos, {})
    for name, value in values.items():
        writer.write(name, (), value)
    writer.close()
