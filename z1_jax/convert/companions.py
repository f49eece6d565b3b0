"""What stands beside a checkpoint's weights, in each project's files: configs, normalisation statistics, tokenizer.

Settings are plain values by name; what a project's files do not hold is absent, never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from z1_jax.convert.architecture import VARIANT_HEADS
from z1_jax.convert.safetensors import SafetensorsReader, SafetensorsWriter
from z1_jax.convert.store import FormatError, TensorInfo
from z1_jax.data.normalize import NormStats, load_norm_stats, save_norm_stats
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS

SIDECAR = "z1_jax.json"  # written with every export: what the other project's files have no place for
TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")
Stats = Mapping[str, NormStats]

_PREPROCESSOR, _POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
_LEROBOT_KEYS = {"state": "observation.state", "actions": "action"}
_IMAGES = "observation.images."
_MODES = {"QUANTILES": "quantile", "MEAN_STD": "z_score"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """Settings from the config files beside the weights; of several, our own sidecar knows best."""
    settings: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        try:
            settings |= _lerobot_settings(folder, config) if "type" in config else _openpi_settings(config)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder / 'config.json'} lacks or distorts {error}; fetch it anew") from None
    if (folder / SIDECAR).is_file():
        settings |= read_json(folder / SIDECAR)
    return settings


def _variant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads by the names of the sizes; both projects' PyTorch models have SigLIP So400m's vision tower."""
    variants = {config[k] for k in ("paligemma_variant", "action_expert_variant") if k in config}
    known = {VARIANT_HEADS[variant] for variant in variants if variant in VARIANT_HEADS}
    if not variants or len(known) != 1:
        return {}
    return {"heads": known.pop(), "vision_heads": PRESETS["pi05"].vision.heads}


def _openpi_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = _variant_settings(config)
    if "action_horizon" in config:
        settings["horizon"] = int(config["action_horizon"])
    return settings


def _lerobot_settings(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if config["type"] != "pi05":
        raise FormatError(f"{folder / 'config.json'} is of a {config['type']!r} policy; expected LeRobot's pi05")
    settings = _variant_settings(config)
    settings |= {
        "horizon": int(config["chunk_size"]),
        "executed": int(config["n_action_steps"]),
        "prompt_length": int(config["tokenizer_max_length"]),
        "denoising_steps": int(config["num_inference_steps"]),
        "prompt_state_dim": int(config["max_state_dim"]),  # LeRobot pads the state before it writes it into the prompt
        "state_in_prompt": True,
    }
    names = [name for name, feature in config["input_features"].items() if feature["type"] == "VISUAL"]
    short = [name.removeprefix(_IMAGES) for name in names]
    if short:
        settings["cameras"] = [None if name.startswith("empty_camera_") else name for name in short]
    modes = {kind: config["normalization_mapping"].get(kind, "IDENTITY") for kind in ("STATE", "ACTION")}
    if len(set(modes.values())) > 1 or modes["STATE"] not in _MODES:
        raise FormatError(
            f"{folder / 'config.json'} normalises {modes}; expected {' or '.join(_MODES)} for state and action alike"
        )
    settings["norm_mode"] = _MODES[modes["STATE"]]
    return settings


def read_stats(folder: pathlib.Path, asset_id: str | None, norm_mode: str) -> tuple[Stats | None, str | None]:
    """(statistics, asset id) that stand beside the weights; None for what is not there.

    Raises:
        FormatError: damaged, or there are several and none was chosen.
    """
    if (folder / f"{_PREPROCESSOR}.json").is_file():
        return _lerobot_stats(folder, norm_mode), asset_id
    found = sorted(path.parent for path in (folder / "assets").rglob("norm_stats.json"))
    by_id = {path.relative_to(folder / "assets").as_posix(): path for path in found}
    if asset_id is not None and by_id and asset_id not in by_id:
        raise FormatError(f"{folder / 'assets'} has no statistics {asset_id!r}; there: {', '.join(by_id)}")
    if asset_id is None and len(by_id) > 1:
        raise FormatError(
            f"{folder / 'assets'} holds statistics of {len(by_id)} robots ({', '.join(by_id)}); choose with --asset-id"
        )
    if not by_id:
        return None, asset_id
    chosen = asset_id if asset_id is not None else next(iter(by_id))
    return read_norm_stats(by_id[chosen] / "norm_stats.json"), chosen


def read_norm_stats(path: pathlib.Path) -> Stats:
    """openpi's norm_stats.json. Raises FormatError."""
    try:
        stats = load_norm_stats(path, "openpi")
    except ValueError as error:
        raise FormatError(str(error)) from None
    if not {"state", "actions"} <= stats.keys():
        raise FormatError(f"{path} holds statistics of {sorted(stats)}; expected state and actions")
    return stats


def with_rules(folder: pathlib.Path, stats: Stats, settings: Mapping[str, Any]) -> Stats:
    """The statistics under the rules of the policy that they come from: ours, where our sidecar lies beside them.

    Raises:
        FormatError: the sidecar names a rule that there is not.
    """
    before = "millimetre" if (folder / SIDECAR).is_file() else "openpi"  # sidecars did not always name them
    try:
        rules = {**dict.fromkeys(stats, before), **settings.get("norm_rules", {})}
        return {key: dataclasses.replace(value, rule=rules[key]) for key, value in stats.items()}
    except (ValueError, TypeError) as error:
        raise FormatError(f"{folder / SIDECAR}: norm_rules: {error}") from None


def _lerobot_stats(folder: pathlib.Path, norm_mode: str) -> Stats | None:
    """The statistics that LeRobot's normaliser saved. A model that was never trained on data has none."""
    config = read_json(folder / f"{_PREPROCESSOR}.json")
    try:
        steps = [step for step in config["steps"] if step.get("registry_name") == "normalizer_processor"]
        files = [step["state_file"] for step in steps if "state_file" in step]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{folder / _PREPROCESSOR}.json is no processor of LeRobot ({error})") from None
    if not files:
        return None
    if not (folder / files[0]).is_file():
        raise FormatError(f"{folder} lacks {files[0]}, where {_PREPROCESSOR}.json says the statistics are")
    reader = SafetensorsReader(folder / files[0])
    try:
        values = {name: reader.read(name).astype(np.float64) for name in reader.tensors}
    finally:
        reader.close()
    return {ours: _lerobot_one(folder / files[0], values, theirs, norm_mode) for ours, theirs in _LEROBOT_KEYS.items()}


def _lerobot_one(path: pathlib.Path, values: Mapping[str, np.ndarray], key: str, norm_mode: str) -> NormStats:
    needed = ("q01", "q99") if norm_mode == "quantile" else ("mean", "std")
    missing = [name for name in needed if f"{key}.{name}" not in values]
    if missing:
        raise FormatError(f"{path} lacks {key}.{missing[0]}, which {norm_mode} normalisation needs")
    got = {name: values[f"{key}.{name}"] for name in ("mean", "std", "q01", "q99") if f"{key}.{name}" in values}
    # The pair that the mode does not use may be absent: a normal distribution's stands for it.
    if "mean" not in got or "std" not in got:
        got |= {"mean": (got["q01"] + got["q99"]) / 2, "std": (got["q99"] - got["q01"]) / 4.65}
    if "q01" not in got or "q99" not in got:
        got |= {"q01": got["mean"] - 2.33 * got["std"], "q99": got["mean"] + 2.33 * got["std"]}
    try:
        return NormStats(**got, rule="openpi")
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
    """Whether openpi's and LeRobot's names of sizes describe this model."""
    known = PRESETS["pi05"]
    return (config.vision, config.language, config.expert) == (known.vision, known.language, known.expert)


def write_lerobot(
    folder: pathlib.Path, config: Pi05Config, stats: Stats | None, document: Mapping[str, Any], precision: str
) -> None:
    """config.json and the two processors, as LeRobot 0.4 saves them."""
    mode = {theirs: ours for ours, theirs in _MODES.items()}[document["norm_mode"]]
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    size = config.vision.image_size
    state_dim, action_dim = (stats[k].dim for k in ("state", "actions")) if stats else (config.action_dim,) * 2
    names = _camera_names(document["cameras"])
    inputs: dict[str, Any] = {_IMAGES + name: {"type": "VISUAL", "shape": [3, size, size]} for name in names}
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
    steps = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("normalizer_processor", {**common, "features": features}),
        ("pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": content["max_state_dim"]}),
        ("tokenizer_processor", tokenizer),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    after = [
        ("unnormalizer_processor", {**common, "features": content["output_features"]}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    for name, chosen in ((_PREPROCESSOR, steps), (_POSTPROCESSOR, after)):
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
