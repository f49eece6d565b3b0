"""The stages that the commands are made of: environments, demonstrations, SFT. Each finds its own finished work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from envs.base import Env
from envs.pool import EnvPool
from z1_jax import sharding
from z1_jax.checkpoint import Checkpoints
from z1_jax.config import Config, ConfigError
from z1_jax.data import tokenizer
from z1_jax.data.dataset import Dataset, open_dataset, write_dataset
from z1_jax.data.journal import EpisodeJournal
from z1_jax.metrics import MetricsWriter, Progress
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.presets import PRESETS, get_preset
from z1_jax.policy import Policy, find_policy, fresh_policy, load_policy, make_processor
from z1_jax.sft import train_sft

DEMO_SEEDS = 10_000  # seeds reserved for the demonstrations of one run seed


def make_env(config: Config, task: str) -> functools.partial[Env]:
    """What a worker calls to build one environment.

    Raises:
        ConfigError: the suite has no such task or camera.
    """
    from envs import kitchen

    _check_names("task", [task], list(kitchen.TASKS))
    _check_names("env.cameras", list(config.env.cameras), list(kitchen.CAMERAS))
    return functools.partial(
        kitchen.make,
        task,
        cameras=config.env.cameras,
        image_size=config.env.image_size,
        horizon=config.env.horizon or None,
    )


def check_inputs(config: Config) -> None:
    """Looks at everything that a config names before a run directory is claimed for it.

    Raises:
        UserError: an unknown task, camera or preset; a policy or dataset that is absent, damaged or does not fit.
    """
    make_env(config, config.task)
    for path in filter(None, (config.init, config.checkpoint, config.compare)):
        check_policy(config, path)
    if not (config.init or config.algorithm == "eval"):
        architecture(config)
        if config.demos.dataset:
            _fitting(config, open_dataset(config.demos.dataset))


def _check_names(key: str, given: list[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"config key {key}: {name!r} does not exist; known: {', '.join(known)}")


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
    return EnvPool(
        make_env(config, config.task), config.env.parallel, config.env.workers, timeout_s=config.env.timeout_s
    )


def demonstrations(config: Config, directory: pathlib.Path) -> Dataset:
    """The expert's demonstrations of a run: read where they are complete, collected where they are not.

    Each finished episode is kept in `<directory>.episodes` until the dataset is written, so that an interrupted
    collection goes on with the next seed and ends in the same dataset.

    Raises:
        UserError: the dataset is damaged or does not fit the config, or the expert fails too often.
    """
    if config.demos.dataset:
        return _fitting(config, open_dataset(config.demos.dataset))
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
        "task": config.task,
        "noise": config.demos.noise,
        "stride": config.demos.stride,
        "chunk": architecture(config).horizon,
        "cameras": list(config.env.cameras),
        "image_size": config.env.image_size,
        "horizon": config.env.horizon,
        "seed": config.seed,
    }


def _fitting(config: Config, dataset: Dataset) -> Dataset:
    horizon = architecture(config).horizon
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
    return dataset


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
        options={
            "cameras": config.env.cameras,
            "image_size": config.env.image_size,
            "horizon": config.env.horizon or None,
        },
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
    """The policy after SFT on the demonstrations: from the finished checkpoint, or trained from where it stopped."""
    checkpoints = Checkpoints(directory)
    finished = config.sft.steps in checkpoints.steps()
    checkpoints.close()
    if finished:
        return load_policy(checkpoints, config.sft.steps, mesh)
    policy = new_policy(config, dataset, mesh)
    return train_sft(policy, dataset, config.sft, config.seed, mesh, directory, writer, report_every=config.log.every)


def architecture(config: Config) -> Pi05Config:
    """The shapes of a fresh policy.

    Raises:
        ConfigError: an unknown preset, or one whose shapes do not fit the environment.
    """
    _check_names("model.preset", [config.model.preset], list(PRESETS))
    model = config.model
    chosen = get_preset(model.preset, dtype=model.dtype, remat=model.remat, attention=model.attention)
    if chosen.vision.image_size != config.env.image_size or chosen.cameras != len(config.env.cameras):
        raise ConfigError(
            f"config key model.preset: {config.model.preset} sees {chosen.cameras} cameras of "
            f"{chosen.vision.image_size} pixels, the environment has {len(config.env.cameras)} of "
            f"{config.env.image_size}; set env.cameras and env.image_size to match"
        )
    return chosen


def new_policy(config: Config, dataset: Dataset, mesh: jax.sharding.Mesh) -> Policy:
    """A policy with random parameters that fits the demonstrations."""
    shapes = architecture(config)
    vocabulary = tokenizer.train_small_tokenizer(tokenizer.kitchen_instructions(), vocab_size=shapes.vocab_size)
    length = _prompt_length(dataset, tokenizer.PromptTokenizer.from_bytes(vocabulary, shapes.prompt_length))
    shapes = dataclasses.replace(shapes, prompt_length=length)
    prompts = tokenizer.PromptTokenizer.from_bytes(vocabulary, length)
    processor = make_processor(shapes, prompts, dataset.stats, config.env.cameras)
    return fresh_policy(
        shapes,
        processor,
        config.seed,
        mesh,
        executed=shapes.horizon,
        denoising_steps=config.flow.steps,
    )


def _prompt_length(dataset: Dataset, prompts: tokenizer.PromptTokenizer) -> int:
    """Tokens of the longest prompt, two to spare, rounded up to a multiple of 4: unused slots cost too.

    A state bin is one token whatever its value, so any state gives the lengths.
    """
    instructions = sorted({episode.instruction for episode in dataset.episodes})
    _, mask = prompts.encode_batch(instructions, np.zeros((len(instructions), dataset.state_dim)))
    return min(-(-(int(mask.sum(axis=1).max()) + 2) // 4) * 4, prompts.prompt_length)


def given_policy(config: Config, path: str, mesh: jax.sharding.Mesh) -> Policy:
    """The policy at `path`, checked against the environments of this run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: it wants other cameras than the run's environments have.
    """
    check_policy(config, path)
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    policy = load_policy(checkpoints, step, mesh)
    checkpoints.close()
    return policy


def check_policy(config: Config, path: str) -> None:
    """As `given_policy`, without reading the parameters."""
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    document = checkpoints.document(step)
    checkpoints.close()
    wanted = tuple(camera for camera in document.get("cameras", ()) if camera)
    if wanted != config.env.cameras:
        raise ConfigError(
            f"config key env.cameras: got {', '.join(config.env.cameras)}; the policy at {path} wants "
            f"{', '.join(wanted) or 'none'}: set --config.env.cameras={','.join(wanted)}"
        )
