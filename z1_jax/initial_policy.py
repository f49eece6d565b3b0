"""The policy that a run starts from, fresh or given by a path, and the checks on it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.schema import RANDOM, Config, ConfigError, InputsConfig, ModelConfig
from z1_jax.data import tokenizer
from z1_jax.data.dataset import Dataset
from z1_jax.data.normalize import NormMode, NormStats, Rule
from z1_jax.data.relative import RelativeActions, parse_relative, relative_from_json
from z1_jax.errors import first_line
from z1_jax.files import absolute
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS, get_preset
from z1_jax.policy import (
    OPENPI_SLOTS,
    Policy,
    architecture,
    find_policy,
    fresh_policy,
    load_policy,
    make_processor,
    split_best,
)
from z1_jax.serve import remote
from z1_jax.suites import assumed_statistics, check_names, resolve, training_statistics, widths


def configured_model(config: Config) -> Pi05Config:
    """The shapes of a fresh policy.

    Raises:
        ConfigError: an unknown preset, or one whose shapes do not fit the environment.
    """
    check_names("model.preset", [config.model.preset], list(PRESETS))
    model = config.model
    settings = {"remat": model.remat, "attention": model.attention, "acting": model.acting}
    chosen = get_preset(model.preset, dtype=model.dtype, **settings)
    if len(_slots(config)) > chosen.cameras:
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; model.preset={config.model.preset} sees at "
            f"most {chosen.cameras}: choose fewer, or another preset"
        )
    check_executed(config, chosen.horizon)
    return chosen


def trained_model(config: Config) -> Pi05Config:
    """The shapes of the policy that a run trains, computed with as `model` says.

    Raises:
        ConfigError: as `configured_model`. CheckpointError: there is no policy at `init`, or it is damaged.
    """
    if config.init in ("", RANDOM):
        return configured_model(config)
    document = policy_document(config.init)
    try:
        shapes = architecture(document["architecture"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the policy at {config.init} says no architecture ({first_line(error)})") from error
    return dataclasses.replace(shapes, remat=config.model.remat, attention=config.model.attention)


def check_attention(config: Config) -> None:
    """Refuses an attention that the devices have not.

    Raises:
        ConfigError: one line.
    """
    attention, backend = config.model.attention, jax.default_backend()
    if attention == "cudnn" and backend != "gpu":
        raise ConfigError(
            f"config key model.attention: got {attention} on {backend}, expected einsum or xla without a GPU"
        )


def _slots(config: Config) -> tuple[str | None, ...]:
    """The camera of each image slot; those of the model beyond stay empty."""
    named = config.inputs.slots or config.env.cameras
    return tuple(None if camera == "none" else camera for camera in named)


def new_policy(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, rules: Mapping[str, Rule] | None = None
) -> Policy:
    """A policy with random parameters that fits the demonstrations.

    Args:
        rules: what counts as constant in "state" and "actions", for a run that began under others than today's.
    """
    instructions = sorted({episode.instruction for episode in dataset.episodes})
    stats = dataset_statistics(dataset, parse_relative(config.inputs.relative_actions))
    stats |= {key: dataclasses.replace(stats[key], rule=rule) for key, rule in (rules or {}).items()}
    return _new_policy(config, stats, instructions, mesh)


def dataset_statistics(dataset: Dataset, relative: RelativeActions | None) -> dict[str, NormStats]:
    """The statistics of a dataset for a policy that is trained on it.

    Raises:
        ConfigError: the dataset has not all of the dimensions that are relative.
    """
    stats = training_statistics(dataset.source, dataset.stats)
    if relative:
        try:
            relative.check(dataset.action_dim, dataset.state_dim)
        except ValueError as error:
            raise ConfigError(f"the dataset {dataset.path} does not fit relative actions: {error}") from None
        stats["actions"] = dataset.relative_statistics(relative)
    return stats


def untrained_policy(config: Config, mesh: jax.sharding.Mesh) -> Policy:
    """A policy with random parameters for environments without demonstrations (`init=random`).

    Raises:
        ConfigError: the suite has demonstrations.
    """
    return _new_policy(config, assumed_statistics(config), sorted(set(tokenizer.kitchen_instructions())), mesh)


def _new_policy(
    config: Config, stats: Mapping[str, NormStats], instructions: Sequence[str], mesh: jax.sharding.Mesh
) -> Policy:
    check_attention(config)
    shapes = configured_model(config)
    prompts = prompt_tokenizer(config, shapes)
    length = _prompt_length(config, stats, instructions, prompts)
    shapes = dataclasses.replace(shapes, prompt_length=length)
    processor = make_processor(
        shapes,
        tokenizer.PromptTokenizer(prompts.model_bytes, length),
        stats,
        _slots(config),
        norm_mode=cast(NormMode, config.inputs.norm),  # checked
        state_in_prompt=config.inputs.state_in_prompt,
        relative=parse_relative(config.inputs.relative_actions),
    )
    return fresh_policy(
        shapes,
        processor,
        config.seed,
        mesh,
        executed=config.env.executed or shapes.horizon,
        denoising_steps=config.flow.steps,
        temperature=1.0 if config.flow.temperature < 0 else config.flow.temperature,
    )


def prompt_tokenizer(config: Config, shapes: Pi05Config) -> tokenizer.PromptTokenizer:
    """The tokenizer that the config names, or a small one of the kitchen's words.

    Raises:
        UserError: it is absent, or has more tokens than the model.
    """
    if not config.inputs.tokenizer:
        words = [*tokenizer.kitchen_instructions(), *resolve(config).instructions]
        model = tokenizer.train_small_tokenizer(words, vocab_size=shapes.vocab_size)
        return tokenizer.PromptTokenizer.from_bytes(model, shapes.prompt_length)
    # A model of PaliGemma's size takes PaliGemma's tokenizer and no other.
    exact = shapes.vocab_size if shapes.vocab_size == tokenizer.PALIGEMMA_VOCAB_SIZE else None
    prompts = tokenizer.load_tokenizer(config.inputs.tokenizer, shapes.prompt_length, exact)
    if prompts.vocab_size > shapes.vocab_size:
        raise ConfigError(
            f"config key inputs.tokenizer: {config.inputs.tokenizer} has {prompts.vocab_size} tokens, "
            f"model.preset={config.model.preset} has {shapes.vocab_size}; choose a smaller tokenizer or another preset"
        )
    return prompts


def _prompt_length(
    config: Config, stats: Mapping[str, NormStats], instructions: Sequence[str], prompts: tokenizer.PromptTokenizer
) -> int:
    """Tokens of the longest prompt plus two, rounded up to a multiple of 4; more would only cost time.

    A state bin is one token whatever its value, or one a digit: the middle one, 128, is as long as any.
    """
    states = np.zeros((len(instructions), stats["state"].dim)) if config.inputs.state_in_prompt else None
    longest = max(len(ids) for ids in prompts.prompt_ids(instructions, states))
    return -(-(longest + 2) // 4) * 4


def given_policy(config: Config, path: str, mesh: jax.sharding.Mesh, dataset: Dataset | None = None) -> Policy:
    """The policy at `path`, checked against the environments of this run.

    Args:
        dataset: what it will be trained on; a policy that was converted without statistics takes those of the dataset.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: it wants other cameras than the run's environments have, or cannot compute as `model` says.
    """
    check_policy(config, path)
    check_attention(config)
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    missing, document = None, policy_document(path)
    if dataset is not None and not document.get("norm_stats"):
        print(f"the policy at {path} has no normalisation statistics: it takes those of the dataset {dataset.path}")
        missing = dataset_statistics(dataset, relative_from_json(document.get("relative_actions")))
    policy = load_policy(checkpoints, step, mesh, missing)
    checkpoints.close()
    policy = dataclasses.replace(
        policy,
        executed=config.env.executed or policy.executed,
        denoising_steps=config.flow.steps or policy.denoising_steps,
        temperature=policy.temperature if config.flow.temperature < 0 else config.flow.temperature,
    )
    try:
        return policy.with_compute(config.model.remat, config.model.attention, config.model.acting)
    except ValueError as error:
        raise ConfigError(f"config key model.attention: {error}, which is that of the policy at {path}") from error


def with_pinned_init(config: Config) -> Config:
    """The config with the one checkpoint that `init` leads to now: a run that it names may continue.

    A run directory that began with a checkpoint at `init` keeps to it.

    Raises:
        CheckpointError: there is no policy.
    """
    if config.init in ("", RANDOM):
        return config
    if remote.is_address(config.init):
        raise ConfigError(f"config key init: a policy behind {config.init} cannot be trained; expected its checkpoint")
    given = _place(config.init)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no run yet, or one that will be refused
        kept = json.loads((config.directory / "config.json").read_text())["init"]
        if kept and _place(kept).is_relative_to(given):
            return dataclasses.replace(config, init=kept)
    return dataclasses.replace(config, init=newest_policy(config.init))


def _place(path: str) -> pathlib.Path:
    """Where a path leads, however it is spelled."""
    return absolute(split_best(path)[0]).resolve()


def newest_policy(path: str) -> str:
    """The one checkpoint that a path leads to now, as a path that begins with the given one; an address stays as it is.

    Raises:
        CheckpointError: there is none.
    """
    if remote.is_address(path):
        return path
    directory, step = find_policy(path)
    given = pathlib.Path(split_best(path)[0])
    return str(given / (directory / str(step)).relative_to(absolute(given)))


def with_own_steps(config: Config) -> Config:
    """The config with the denoising steps of the given policy where `flow.steps` is 0; for a policy that was checked.

    Raises:
        ConfigError: two policies act with different numbers.
    """
    if config.flow.steps:
        return config
    documents = {path: policy_document(path) for path in (config.checkpoint or config.init, config.compare) if path}
    steps = {path: known["denoising_steps"] for path, known in documents.items() if known}
    if len(set(steps.values())) > 1:
        told = " and ".join(f"{path} acts with {count}" for path, count in steps.items())
        raise ConfigError(f"config key flow.steps: got 0, but {told}: give the number that both are compared with")
    own = next(iter(steps.values()), 0)  # 0: a server that does not say
    return dataclasses.replace(config, flow=dataclasses.replace(config.flow, steps=own))


def check_policy(config: Config, path: str) -> None:
    """As `given_policy`, without reading the parameters."""
    document = policy_document(path)
    if remote.is_address(path):
        _check_served_steps(config, document, path)
        if not document:  # of others: what it answers will show whether it fits
            return
    check_executed(config, document.get("architecture", {}).get("horizon"))
    _check_same_model(config, document.get("architecture", {}), path)
    if config.algorithm != "sft" and "norm_stats" in document and not document["norm_stats"]:
        key = "init" if config.algorithm == "grpo" else "compare" if path == config.compare else "checkpoint"
        raise ConfigError(
            f"config key {key}: the policy at {path} has no normalisation statistics; SFT on demonstrations gives it "
            "theirs (configs/sft.py with --config.init and --config.demos.dataset), or convert it again with "
            "--norm-stats=FILE"
        )
    wanted = tuple(camera for camera in document.get("cameras", ()) if camera)
    if wanted != config.env.cameras and set(wanted) <= set(OPENPI_SLOTS):  # names of slots, which no environment has
        empty = ["none"] * (len(document["cameras"]) - len(config.env.cameras))
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; the policy at {path} was converted without "
            f"its cameras' names and has those of openpi's slots ({', '.join(wanted)}): convert it again with "
            f"--cameras={','.join((*config.env.cameras, *empty))}, in the order base, left wrist, right wrist"
        )
    if wanted != config.env.cameras:
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; the policy at {path} wants "
            f"{', '.join(wanted) or 'none'}: set --config.env.cameras={','.join(wanted)}"
        )
    _check_same_inputs(config, document, path)
    if config.eval.episodes:
        for key, width in widths(config).items():
            theirs = len(document.get("norm_stats", {}).get(key, {}).get("mean", ())) or width  # none: the dataset's
            if theirs != width:
                raise ConfigError(
                    f"config key env.suite: {config.env.suite} has {key} of width {width}, the policy at {path} of "
                    f"width {theirs}: it was trained for other environments"
                )


def _check_served_steps(config: Config, document: dict[str, Any], path: str) -> None:
    """Refuses a number of denoising steps that a served policy would not take from here."""
    if config.flow.temperature >= 0:
        raise ConfigError(
            f"config key flow.temperature: got {config.flow.temperature:g}; the policy at {remote.name(path)} acts "
            "with its own: leave it at -1"
        )
    own = document.get("denoising_steps", 0)
    if config.flow.steps not in (0, own):
        raise ConfigError(
            f"config key flow.steps: got {config.flow.steps}; the policy at {remote.name(path)} acts with its own "
            f"{own or 'number'}: leave it at 0, or serve it with --steps={config.flow.steps}"
        )


def trained_horizon(config: Config) -> int:
    """H of the policy that SFT trains: its own where it starts from `init`, else that of the preset."""
    if config.init and config.init != RANDOM:
        return int(policy_document(config.init)["architecture"]["horizon"])
    return configured_model(config).horizon


def check_executed(config: Config, horizon: int | None) -> None:
    """Refuses to execute more steps of a chunk than a policy predicts: `horizon`, None where that is not known.

    Raises:
        ConfigError: one line.
    """
    if horizon is not None and config.env.executed > horizon:
        raise ConfigError(
            f"config key env.executed: got {config.env.executed}, but the policy predicts chunks of {horizon} steps; "
            f"expected at most {horizon}, or 0 for the policy's own"
        )


def _check_same_model(config: Config, known: dict[str, Any], path: str) -> None:
    """Refuses a size or dtype that the policy at `path` does not have; defaults give way to what it is."""
    given, default = config.model, ModelConfig()
    if given.preset != default.preset:
        asked = dataclasses.asdict(configured_model(config))
        for key in ("vision", "language", "expert", "action_dim"):  # a π0.5 may predict any number of steps
            if key in known and known[key] != asked[key]:
                raise ConfigError(
                    f"config key model.preset: got {given.preset}, whose {key} is {asked[key]}; the policy at {path} "
                    f"keeps its own, {known[key]}: leave model.preset out"
                )
    if given.dtype not in (default.dtype, known.get("dtype", given.dtype)):
        raise ConfigError(
            f"config key model.dtype: got {given.dtype}; the policy at {path} computes in {known['dtype']} and keeps "
            "that: leave model.dtype out"
        )


def _check_same_inputs(config: Config, document: dict[str, Any], path: str) -> None:
    """Refuses an input setting that the policy at `path`, which brings its own, would ignore."""
    given, default = config.inputs, InputsConfig()
    theirs: dict[str, Any] = {"norm": document.get("norm_mode"), "state_in_prompt": document.get("state_in_prompt")}
    asked = {key: getattr(given, key) for key in theirs if getattr(given, key) != getattr(default, key)}
    if given.relative_actions:
        known, asked_for = relative_from_json(document.get("relative_actions")), parse_relative(given.relative_actions)
        theirs["relative_actions"] = known.dims if known else ()
        asked["relative_actions"] = asked_for.dims if asked_for else ()
    if given.slots:
        theirs["slots"], asked["slots"] = tuple(document.get("cameras", ())), _slots(config)
        asked["slots"] += (None,) * (len(theirs["slots"]) - len(asked["slots"]))
    if given.tokenizer:
        theirs["tokenizer"] = document.get("tokenizer_sha256")
        asked["tokenizer"] = tokenizer.load_tokenizer(given.tokenizer, 1).identity
    for key, value in asked.items():
        if value != theirs[key]:
            raise ConfigError(
                f"config key inputs.{key}: got {getattr(given, key)!r}; the policy at {path} was trained with "
                f"{theirs[key]!r} and keeps it: leave inputs.{key} out"
            )


def policy_document(path: str) -> dict[str, Any]:
    """What the policy at `path` says of itself; empty for one behind an address that is not of this project.

    Raises:
        CheckpointError: there is none, or it is damaged. UserError: nobody serves at an address.
    """
    if remote.is_address(path):
        return remote.document(path)
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    document = checkpoints.document(step)
    checkpoints.close()
    return document
