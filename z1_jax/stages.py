"""The stages that the commands are made of: environments, demonstrations, SFT. Each finds its own finished work."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from envs import demos
from envs.base import Pool
from envs.pool import EnvPool, PoolError
from z1_jax import distributed, initial_policy, processes, sharding
from z1_jax.agreement import dataset_world, trained_in
from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.checks import check_horizon
from z1_jax.config.schema import RANDOM, Config, ConfigError
from z1_jax.data.dataset import Dataset, open_dataset, write_dataset
from z1_jax.data.journal import EpisodeJournal
from z1_jax.data.normalize import Rule, stats_from_json
from z1_jax.errors import UserError, first_line
from z1_jax.metrics import MetricsWriter, Progress
from z1_jax.policy import Policy, load_policy
from z1_jax.sft import train_sft
from z1_jax.simulator_hosts import check_ray, ray_workers
from z1_jax.suites import (
    BUILT_IN,
    demonstrator,
    least_episode_steps,
    made_by,
    make_envs,
    names_of_tasks,
    rate_of,
    resolve,
    simulators,
    widths,
)
from z1_jax.validation import records_to_train

DEMO_SEEDS = 10_000  # from one run seed's first demonstration to the next one's


def check_inputs(config: Config) -> Config:
    """Looks at everything that a config names before a run directory is claimed for it.

    Returns:
        The config with the checkpoint that `init` leads to, and with what a policy that it names decides.

    Raises:
        UserError: an unknown task, camera or preset; a policy or dataset that is absent, damaged or does not fit.
    """
    check_ray(config)
    if config.eval.episodes:
        check_alike(config)
    config = initial_policy.with_pinned_init(config)
    given = config.init if config.init != RANDOM else ""
    for path in filter(None, (given, config.checkpoint, config.compare)):
        initial_policy.check_policy(config, path)
    if config.algorithm == "grpo":
        own = (
            initial_policy.policy_document(given).get("executed")
            if given
            else initial_policy.configured_model(config).horizon
        )
        if own:  # else no policy of ours: loading it says so
            check_horizon(config, least_episode_steps(config), config.env.executed or own)
    if config.algorithm == "sft" or not (given or config.algorithm == "eval"):
        shapes = initial_policy.configured_model(config)
        if config.inputs.tokenizer:
            initial_policy.prompt_tokenizer(config, shapes)
        if config.demos.dataset:
            dataset = open_dataset(config.demos.dataset)
            _fitting(config, dataset)
            _trained(config, dataset)
    return initial_policy.with_own_steps(config)


def check_alike(config: Config) -> None:
    """Refuses what a suite does not have, and tasks whose environments do not fit together.

    Those of a suite that is not built in are built once, to see: they may differ in task and horizon alone.

    Raises:
        ConfigError: one line.
    """
    factories = make_envs(config)
    if len(factories) == 1 or config.env.suite in BUILT_IN:
        return
    env = config.env
    try:
        with EnvPool(factories, 1, min(1, env.workers), env.timeout_s, env.start_timeout_s):
            pass
    except PoolError as error:
        raise ConfigError(f"config key tasks: {error}; run such tasks by themselves") from error


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run over all devices.

    Raises:
        ConfigError: the devices, or a batch over them, do not divide.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        hint = f"; JAX_PLATFORMS={named} asks for it: unset it, or install JAX for it" * bool(named)
        raise ConfigError(f"JAX finds no device ({first_line(error)}){hint}") from error
    initial_policy.check_attention(config)
    distributed.check_alike(processes.exchange(jax.local_device_count()))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batches(config, mesh)
    if processes.count() > 1:
        check_processes(config, mesh)
        distributed.connect(mesh)
    return mesh


def check_processes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses what several processes cannot share.

    Raises:
        UserError: one line, the same in each.
    """
    count, group = processes.count(), config.group
    distributed.share_of_batch(mesh)
    if config.algorithm != "sft" or config.eval.episodes:
        least = group.size if config.algorithm == "grpo" else 1
        if config.env.parallel % (count * least):
            raise ConfigError(
                f"config key env.parallel: got {config.env.parallel} environments over {count} processes, expected a "
                f"multiple of {count * least}: each process steps its own{', whole groups' * (least > 1)}"
            )
    if config.algorithm == "grpo":
        if group.count < count:
            raise ConfigError(
                f"config key group.count: got {group.count} groups for {count} processes, expected at least one each; "
                "use fewer processes, or draw more groups"
            )
        if config.update.prefix_cache == "device":
            raise ConfigError(
                f"config key update.prefix_cache: got device with {count} processes, expected host, recompute or auto"
            )


def check_batches(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses batches that do not divide over the mesh.

    Raises:
        ConfigError: one line.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, size in (
        ("sft.batch_size", config.sft.batch_size),
        ("sft.micro_batch", config.sft.micro_batch),  # 0, the whole batch, is a multiple
        ("update.micro_batch", config.update.micro_batch),
    ):
        if size % shards:
            raise ConfigError(f"config key {key}: got {size}, expected a multiple of the {shards} shards of a batch")


def make_pool(config: Config) -> Pool:
    """Starts the workers of a run, where `rollout.backend` has them; call it once."""
    factories, place, several = make_envs(config), None, processes.count()  # each process has its part of them
    slots, workers = config.env.parallel // several, -(-config.env.workers // several)
    if config.rollout.backend == "ray":
        place = ray_workers(config, factories, min(slots, workers))
    pool = EnvPool(
        factories,
        slots,
        workers,
        timeout_s=config.env.timeout_s,
        start_timeout_s=config.env.start_timeout_s,
        simulators=simulators(config),
        place=place,
    )
    if place is not None:
        print(place.summary(), flush=True)
    return pool


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
    if not processes.on_leader(directory.exists):
        processes.on_leader(lambda: _collect(config, directory))  # the others wait as long as process 0 lives
    return _fitting(config, open_dataset(directory))


def _collect(config: Config, directory: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        journals: dict[str, EpisodeJournal] = {}
        for task in config.every_task:
            journal = EpisodeJournal(_journal_path(config, directory, task), _task_source(config, task))
            journals[task] = stack.enter_context(journal)
        episodes = (_successful_episodes(config, task, journal) for task, journal in journals.items())
        write_dataset(directory, itertools.chain.from_iterable(episodes), demonstrations_source(config))
        for journal in journals.values():
            journal.remove()


def _journal_path(config: Config, directory: pathlib.Path, task: str) -> pathlib.Path:
    """Beside the dataset, and in a run of several tasks one for each."""
    part = f".{task.replace('/', '-')}" * (len(config.every_task) > 1)
    return directory.with_name(f"{directory.name}{part}.episodes")


def demonstrations_source(config: Config) -> dict[str, Any]:
    """What the demonstrations of a config depend on, besides their number."""
    source = _task_source(config, config.task)
    return source if config.task else {**{k: v for k, v in source.items() if k != "task"}, "tasks": list(config.tasks)}


def _task_source(config: Config, task: str) -> dict[str, Any]:
    """The same of one task."""
    source = {
        "made_by": made_by(config),
        "labels": config.demos.labels,
        "task": task,
        "noise": config.demos.noise,
        "stride": config.demos.stride,
        "chunk": initial_policy.trained_horizon(config),
        "cameras": list(config.env.cameras),
        "image_size": config.env.image_size,
        "horizon": config.env.horizon,
        "layouts": list(config.env.layouts),
        "styles": list(config.env.styles),
        "objects": list(config.env.objects),
        "seed": config.seed,
    }
    suite = resolve(config)
    own = (key.partition(".")[2] for key in suite.own_keys if key.startswith("env."))
    source |= {key: getattr(config.env, key) for key in own if key not in source}
    if rate_of(source) is None:
        source["fps"] = suite.control_hz
    return source


def _fitting(config: Config, dataset: Dataset) -> Dataset:
    shapes = initial_policy.configured_model(config)
    horizon = initial_policy.trained_horizon(config)
    missing = [camera for camera in config.env.cameras if camera not in dataset.cameras]
    if missing:
        raise ConfigError(
            f"config key env.cameras: got {missing[0]}, the dataset {dataset.path} has {', '.join(dataset.cameras)}"
        )
    if dataset.chunk != horizon:
        if config.init:
            raise ConfigError(
                f"config key init: the policy at {config.init} predicts chunks of {horizon} steps, the dataset "
                f"{dataset.path} has chunks of {dataset.chunk}; collect or import it again with --chunk={horizon}"
            )
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
        stats = initial_policy.policy_document(config.init)["norm_stats"]
        if not stats:  # it takes the dataset's
            return
        wanted, whose = {key: len(stats[key]["mean"]) for key in got}, f"the policy at {config.init}"
    else:
        return
    for key, width in got.items():
        if width != wanted[key]:
            hint = "; sft with eval.episodes=0 trains without environments" * bool(config.eval.episodes)
            raise ConfigError(
                f"config key demos.dataset: {dataset.path} has {key} of width {width}, {whose} {wanted[key]}{hint}"
            )


def _successful_episodes(config: Config, task: str, journal: EpisodeJournal) -> Iterator[Any]:
    """A task's first successes in the order of the seeds: those in the journal, then new ones that enter it."""
    wanted = config.demos.episodes
    first = config.seed * DEMO_SEEDS
    yield from itertools.islice(journal.episodes(), wanted)
    if journal.kept >= wanted:
        return
    start = resolve(config).episode
    episodes: Any = demos.collect(
        demonstrator(config, task),
        (start(task, seed) for seed in range(first + journal.tried, first + 3 * wanted)),
        noise=config.demos.noise,
        processes=config.env.workers,
        stride=config.demos.stride,
        chunk=initial_policy.trained_horizon(config),
        labels=config.demos.labels,
        timeout_s=config.env.timeout_s,
        start_timeout_s=config.env.start_timeout_s,
    )
    columns, title = {"success": ".1%"}, f"demonstrations{f' of {task}' * (len(config.every_task) > 1)}"
    with (
        contextlib.closing(episodes),
        Progress(title, wanted, "episode", columns, start=journal.kept, interval_s=5.0) as progress,
    ):
        for episode in episodes:
            journal.append(episode)
            if episode.success:
                progress.report(journal.kept, {"success": journal.kept / journal.tried})
                yield episode
            if journal.kept == wanted:
                return
    raise ConfigError(
        f"config key demos.episodes: the expert of {task} succeeded only {journal.kept} times in "
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
    rules = _rules(checkpoints)
    checkpoints.close()
    if finished:
        try:
            _check_own(config, dataset, checkpoints)
            return load_policy(checkpoints, config.sft.steps, mesh)
        except CheckpointError as error:
            checkpoints.put_aside(config.sft.steps, error)
    tasks = names_of_tasks(config)
    world = dataset_world(dataset, tasks)
    return train_sft(
        # No name for the policy here: what SFT freezes in bfloat16 must not stay in memory in float32 too.
        trained_in(initial_policy.given_policy(config, config.init, mesh, dataset), world, tasks)
        if config.init
        else trained_in(initial_policy.new_policy(config, dataset, mesh, rules), world, tasks),
        dataset,
        config.sft,
        config.seed,
        mesh,
        directory,
        writer,
        report_every=config.log.every,
        adapters=config.lora,
        sampling=config.demos.sampling,
        collected=not config.demos.dataset,
        tasks=tasks,
    )


def _check_own(config: Config, dataset: Dataset, checkpoints: Checkpoints) -> None:
    """Refuses a finished SFT checkpoint of another run, which was copied to where this run's own would be.

    Raises:
        UserError: it was trained on other data, or in another order; CheckpointError: it cannot be read.
    """
    step = config.sft.steps
    told = checkpoints.document(step).get("loader")
    if not told:  # an older one
        return
    mine = {"dataset": dataset.identity, "seed": config.seed, "batch_size": config.sft.batch_size}
    told = {"records": None, **told}
    records = _trained(config, dataset)
    mine["records"] = None if records is None else len(records)
    for key, value in mine.items():
        if told.get(key, value) != value:
            raise UserError(
                f"checkpoint {checkpoints.directory / str(step)} was trained with {key}={told[key]!r}, this run has "
                f"{value!r}: it is another run's; remove it and SFT is trained here, or start RL from it in a new run "
                "with --config.init"
            )


def _trained(config: Config, dataset: Dataset) -> np.ndarray | None:
    """The records that SFT is trained on; None: all. Raises UserError: none can be held out."""
    return records_to_train(dataset, names_of_tasks(config), config.sft.validation, config.seed)[0]


def _rules(checkpoints: Checkpoints) -> dict[str, Rule]:
    """What counts as constant in the newest checkpoint of a run that goes on; empty for one that begins."""
    for step in sorted(checkpoints.steps(), reverse=True):
        with contextlib.suppress(CheckpointError, KeyError, TypeError, AttributeError, ValueError):
            stats = stats_from_json(checkpoints.document(step)["norm_stats"])
            return {key: value.rule for key, value in stats.items()}
    return {}
