"""The stages that the commands are made of: environments, demonstrations, SFT. Each finds its own finished work."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs.pool import EnvPool
from z1_jax import sharding
from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.checks import check_horizon
from z1_jax.config import RANDOM, Config, ConfigError, InputsConfig, ModelConfig
from z1_jax.data import tokenizer
from z1_jax.data.dataset import Dataset, open_dataset, write_dataset
from z1_jax.data.journal import EpisodeJournal
from z1_jax.data.normalize import NormStats
from z1_jax.metrics import MetricsWriter, Progress
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS, get_preset
from z1_jax.policy import Policy, find_policy, fresh_policy, load_policy, make_processor
from z1_jax.sft import train_sft
from z1_jax.suites import assumed_statistics, check_names, episode_steps, kitchen_options, make_env, widths

DEMO_SEEDS = 10_000  # seeds reserved for the demonstrations of one run seed


def check_inputs(config: Config) -> None:
    """Looks at everything that a config names before a run directory is claimed for it.

    Raises:
        UserError: an unknown task, camera or preset; a policy or dataset that is absent, damaged or does not fit.
    """
    if config.eval.episodes:
        make_env(config, config.task)
    given = config.init if config.init != RANDOM else ""
    for path in filter(None, (given, config.checkpoint, config.compare)):
        check_policy(config, path)
    if config.algorithm == "grpo":
        executed = policy_document(given).get("executed") if given else architecture(config).horizon
        if executed:  # else no policy of ours: loading it says so
            check_horizon(config, episode_steps(config), config.env.executed or executed)
    if config.algorithm == "sft" or not (given or config.algorithm == "eval"):
        shapes = architecture(config)
        if config.inputs.tokenizer:
            _tokenizer(config, shapes)
        if config.demos.dataset:
            _fitting(config, open_dataset(config.demos.dataset))


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run over all devices.

    Raises:
        ConfigError: the devices, or a batch over them, do not divide.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batches(config, mesh)
    return mesh


def check_batches(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses batches that do not divide over the mesh.

    Raises:
        ConfigError: one line.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, size in (("sft.batch_size", config.sft.batch_size), ("update.micro_batch", config.update.micro_batch)):
        if size % shards:
            raise ConfigError(f"config key {key}: got {size}, expected a multiple of the {shards} shards of a batch")


def make_pool(config: Config) -> EnvPool:
    """The worker processes of a run, not started twice."""
    timeout_s = config.env.timeout_s
    return EnvPool(
        make_env(config, config.task),
        config.env.parallel,
        config.env.workers,
        timeout_s=timeout_s,
        start_timeout_s=max(120.0, 2 * timeout_s),
    )


def demonstrations(config: Config, directory: pathlib.Path) -> Dataset:
    """The expert's demonstrations of a run: read where they are complete, collected where they are not.

    Each finished episode is kept in `<directory>.episodes` until the dataset is written, so that an interrupted
    collection goes on with the next seed and ends in the same dataset.

    Raises:
        UserError: the dataset is damaged or does not fit the config, or the expert fails too often.
    """
    if config.demos.dataset:
        dataset = _fitting(config, open_dataset(config.demos.dataset))
        print(f"demonstrations of {dataset.path}: the other keys of demos have no effect")
        return dataset
    if directory.exists():
        return _fitting(config, open_dataset(directory))
    source = demonstrations_source(config)
    with EpisodeJournal(directory.with_name(directory.name + ".episodes"), source) as journal:
        dataset = write_dataset(directory, _successful_episodes(config, journal), source)
        journal.remove()
    return dataset


def demonstrations_source(config: Config) -> dict[str, Any]:
    """What the demonstrations of a config depend on, besides their number."""
    return {
        "made_by": f"{config.env.suite} expert",
        "labels": config.demos.labels,
        "task": config.task,
        "noise": config.demos.noise,
        "stride": config.demos.stride,
        "chunk": architecture(config).horizon,
        "cameras": list(config.env.cameras),
        "image_size": config.env.image_size,
        "horizon": config.env.horizon,
        "layouts": list(config.env.layouts),
        "styles": list(config.env.styles),
        "objects": list(config.env.objects),
        "seed": config.seed,
    }


def _fitting(config: Config, dataset: Dataset) -> Dataset:
    shapes = architecture(config)
    horizon = shapes.horizon
    missing = [camera for camera in config.env.cameras if camera not in dataset.cameras]
    if missing:
        raise ConfigError(
            f"config key env.cameras: got {missing[0]}, the dataset {dataset.path} has {', '.join(dataset.cameras)}"
        )
    if dataset.chunk != horizon:
        raise ConfigError(
            f"config key model.preset: {config.model.preset} predicts chunks of {horizon} steps, the dataset "
            f"{dataset.path} has chunks of {dataset.chunk}; choose another preset or collect anew"
        )
    if dataset.action_dim > shapes.action_dim:
        raise ConfigError(
            f"config key model.preset: {config.model.preset} predicts actions of width {shapes.action_dim}, "
            f"the dataset {dataset.path} has width {dataset.action_dim}; choose another preset"
        )
    _check_widths(config, dataset)
    return dataset


def _check_widths(config: Config, dataset: Dataset) -> None:
    """Refuses a dataset whose arrays are not those of the environments, or of the policy that is trained on."""
    got = {"actions": dataset.action_dim, "state": dataset.state_dim}
    if config.eval.episodes:
        wanted, whose = widths(config), f"the environments of env.suite={config.env.suite}"
    elif config.init and config.init != RANDOM:
        stats = policy_document(config.init)["norm_stats"]
        wanted, whose = {key: len(stats[key]["mean"]) for key in got}, f"the policy at {config.init}"
    else:
        return
    for key, width in got.items():
        if width != wanted[key]:
            hint = "; sft with eval.episodes=0 trains without environments" * bool(config.eval.episodes)
            raise ConfigError(
                f"config key demos.dataset: {dataset.path} has {key} of width {width}, {whose} {wanted[key]}{hint}"
            )


def _successful_episodes(config: Config, journal: EpisodeJournal) -> Iterator[Any]:
    """The first successes in the order of the seeds: those in the journal, then new ones that enter it."""
    from envs.kitchen import demos

    wanted = config.demos.episodes
    first = config.seed * DEMO_SEEDS
    yield from itertools.islice(journal.episodes(), wanted)
    if journal.kept >= wanted:
        return
    episodes = demos.collect(
        config.task,
        range(first + journal.tried, first + 3 * wanted),
        noise=config.demos.noise,
        processes=config.env.workers,
        stride=config.demos.stride,
        chunk=architecture(config).horizon,
        labels=config.demos.labels,
        options=kitchen_options(config),
    )
    columns = {"success": ".1%"}
    with (
        contextlib.closing(episodes),
        Progress("demonstrations", wanted, "episode", columns, start=journal.kept, interval_s=5.0) as progress,
    ):
        for episode in episodes:
            journal.append(episode)
            if episode.success:
                progress.report(journal.kept, {"success": journal.kept / journal.tried})
                yield episode
            if journal.kept == wanted:
                return
    raise ConfigError(
        f"config key demos.episodes: the expert of {config.task} succeeded only {journal.kept} times in "
        f"{journal.tried} tries, {wanted} wanted; ask for fewer or lower demos.noise"
    )


def supervised_policy(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, directory: pathlib.Path, writer: MetricsWriter
) -> Policy:
    """The policy after SFT on the demonstrations: from the finished checkpoint, or trained from where it stopped.

    It starts from `init` where that is given, with the inputs and statistics of that policy.
    """
    checkpoints = Checkpoints(directory)
    finished = config.sft.steps in checkpoints.steps()
    checkpoints.close()
    if finished:
        try:
            return load_policy(checkpoints, config.sft.steps, mesh)
        except CheckpointError as error:
            checkpoints.put_aside(config.sft.steps, error)
    return train_sft(
        # No name for the policy here: what SFT freezes in bfloat16 must not stay in memory in float32 too.
        given_policy(config, config.init, mesh) if config.init else new_policy(config, dataset, mesh),
        dataset,
        config.sft,
        config.seed,
        mesh,
        directory,
        writer,
        report_every=config.log.every,
        adapters=config.lora,
    )


def architecture(config: Config) -> Pi05Config:
    """The shapes of a fresh policy.

    Raises:
        ConfigError: an unknown preset, or one whose shapes do not fit the environment.
    """
    check_names("model.preset", [config.model.preset], list(PRESETS))
    model = config.model
    chosen = get_preset(model.preset, dtype=model.dtype, remat=model.remat, attention=model.attention)
    if len(_slots(config)) > chosen.cameras:
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; model.preset={config.model.preset} sees at "
            f"most {chosen.cameras}: choose fewer, or another preset"
        )
    _check_executed(config, chosen.horizon)
    return chosen


def _check_attention(config: Config) -> None:
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(
            f"config key model.attention: got cudnn on {jax.default_backend()}, expected einsum or xla without a GPU"
        )


def _slots(config: Config) -> tuple[str | None, ...]:
    """The camera of each image slot; those of the model beyond stay empty."""
    named = config.inputs.slots or config.env.cameras
    return tuple(None if camera == "none" else camera for camera in named)


def new_policy(config: Config, dataset: Dataset, mesh: jax.sharding.Mesh) -> Policy:
    """A policy with random parameters that fits the demonstrations."""
    instructions = sorted({episode.instruction for episode in dataset.episodes})
    return _new_policy(config, dataset.stats, instructions, mesh)


def untrained_policy(config: Config, mesh: jax.sharding.Mesh) -> Policy:
    """A policy with random parameters for environments without demonstrations (`init=random`).

    Raises:
        ConfigError: the suite has demonstrations.
    """
    return _new_policy(config, assumed_statistics(config), sorted(set(tokenizer.kitchen_instructions())), mesh)


def _new_policy(
    config: Config, stats: Mapping[str, NormStats], instructions: Sequence[str], mesh: jax.sharding.Mesh
) -> Policy:
    _check_attention(config)
    shapes = architecture(config)
    prompts = _tokenizer(config, shapes)
    length = _prompt_length(config, stats, instructions, prompts)
    shapes = dataclasses.replace(shapes, prompt_length=length)
    processor = make_processor(
        shapes,
        tokenizer.PromptTokenizer(prompts.model_bytes, length),
        stats,
        _slots(config),
        norm_mode=config.inputs.norm,
        state_in_prompt=config.inputs.state_in_prompt,
    )
    return fresh_policy(
        shapes,
        processor,
        config.seed,
        mesh,
        executed=config.env.executed or shapes.horizon,
        denoising_steps=config.flow.steps,
    )


def _tokenizer(config: Config, shapes: Pi05Config) -> tokenizer.PromptTokenizer:
    """The tokenizer that the config names, or a small one of the kitchen's words.

    Raises:
        UserError: it is absent, or has more tokens than the model.
    """
    if not config.inputs.tokenizer:
        model = tokenizer.train_small_tokenizer(tokenizer.kitchen_instructions(), vocab_size=shapes.vocab_size)
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
    """Tokens of the longest prompt, two to spare, rounded up to a multiple of 4: unused slots cost too.

    A state bin is one token whatever its value, or one a digit: the middle one, 128, is as long as any.
    """
    states = np.zeros((len(instructions), stats["state"].dim)) if config.inputs.state_in_prompt else None
    longest = max(len(ids) for ids in prompts.prompt_ids(instructions, states))
    return -(-(longest + 2) // 4) * 4


def given_policy(config: Config, path: str, mesh: jax.sharding.Mesh) -> Policy:
    """The policy at `path`, checked against the environments of this run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: it wants other cameras than the run's environments have, or cannot compute as `model` says.
    """
    check_policy(config, path)
    _check_attention(config)
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    policy = load_policy(checkpoints, step, mesh)
    checkpoints.close()
    policy = dataclasses.replace(policy, executed=config.env.executed or policy.executed)
    try:
        return policy.with_compute(config.model.remat, config.model.attention)
    except ValueError as error:
        raise ConfigError(f"config key model.attention: {error}, which is that of the policy at {path}") from error


def check_policy(config: Config, path: str) -> None:
    """As `given_policy`, without reading the parameters."""
    document = policy_document(path)
    horizon = document.get("architecture", {}).get("horizon")
    _check_executed(config, horizon)
    if config.algorithm == "sft" and horizon != architecture(config).horizon:
        raise ConfigError(
            f"config key model.preset: {config.model.preset} predicts chunks of {architecture(config).horizon} steps, "
            f"the policy at {path} of {horizon}; choose the preset that the policy was made with"
        )
    _check_same_model(config, document.get("architecture", {}), path)
    wanted = tuple(camera for camera in document.get("cameras", ()) if camera)
    if wanted != config.env.cameras:
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; the policy at {path} wants "
            f"{', '.join(wanted) or 'none'}: set --config.env.cameras={','.join(wanted)}"
        )
    _check_same_inputs(config, document, path)


def _check_executed(config: Config, horizon: int | None) -> None:
    if horizon is not None and config.env.executed > horizon:
        raise ConfigError(
            f"config key env.executed: got {config.env.executed}, but the policy predicts chunks of {horizon} steps; "
            f"expected at most {horizon}, or 0 for the policy's own"
        )


def _check_same_model(config: Config, known: dict[str, Any], path: str) -> None:
    """Refuses a size or dtype that the policy at `path` does not have; defaults give way to what it is."""
    given, default = config.model, ModelConfig()
    if given.preset != default.preset:
        asked = dataclasses.asdict(architecture(config))
        for key in ("vision", "language", "expert", "action_dim", "horizon"):
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
    theirs = {"norm": document.get("norm_mode"), "state_in_prompt": document.get("state_in_prompt")}
    asked = {key: getattr(given, key) for key in theirs if getattr(given, key) != getattr(default, key)}
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
    """What the policy at `path` says of itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    document = checkpoints.document(step)
    checkpoints.close()
    return document
