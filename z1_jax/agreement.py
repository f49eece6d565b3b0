"""Checks before a run begins that its dataset, environments and policy fit together.

Gathers the facts for `worlds`, tells each difference in a line and refuses what cannot be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.base import EnvSpec
from envs.pool import EnvPool
from z1_jax import suites
from z1_jax.checkpoint import CheckpointError
from z1_jax.config.schema import RANDOM, Config, ConfigError
from z1_jax.data.dataset import Dataset, open_dataset
from z1_jax.data.normalize import stats_from_json
from z1_jax.errors import UserError
from z1_jax.files import absolute, read_json
from z1_jax.initial_policy import policy_document
from z1_jax.policy import Policy
from z1_jax.rewording import check_words
from z1_jax.run_dir import SUMMARY
from z1_jax.worlds import Difference, World, differences, must_agree

_SHOWN = 3  # tasks whose difference of one kind is told
_RESETS = 4  # episodes of the environment that are looked at: held-out seeds, one observation each


def check_worlds(config: Config) -> list[str]:
    """Prints a line for each thing in which the dataset, the environments and the policies of a config differ.

    Returns:
        The lines, for the summary.

    Raises:
        ConfigError: task, rate or a policy's pictures differ from the environments' and `allow` does not name it.
        UserError: a dataset or policy is absent or damaged; PoolError: no environment starts.
    """
    if (config.directory / SUMMARY).exists():  # finished: it was looked at when it began
        return _known_differences(config.directory / SUMMARY)
    key, trained_on, policies = _given(config)
    found = [difference for other in policies for difference in differences(trained_on, other)] if trained_on else []
    # A policy that is trained on data acts as these do: they are compared with the environments in its stead.
    acting = [trained_on] if trained_on else policies
    against = []
    if acting and config.eval.episodes:
        seen = environment_worlds(config)
        check_words(config.eval.told, seen)
        against = [found for one in acting for found in _against(one, seen)]
    if len(policies) > 1 and not config.env.executed:  # two that are compared, each with its own number
        found += [difference for difference in differences(*policies) if difference.kind == "executed"]
    goes_on = config.algorithm == "sft" and not trained_on  # on our own demonstrations: it may come from elsewhere
    refused = [] if goes_on else must_agree(against, config.allow, pictures=not trained_on)
    found += against
    for difference in found:
        print(f"differs: {difference.line}", flush=True)
    if without := [kind for kind in config.allow if kind not in {difference.kind for difference in against}]:
        print(f"config key allow: {', '.join(without)} does not differ, or is not known: without effect")
    if refused:
        *others, last = refused
        kinds = f"{', '.join(others)} and {last} differ" if others else f"{last} differs"
        flag = f"--config.allow={','.join((*config.allow, *refused))}"
        raise ConfigError(
            f"config key {key}: does not match the environments: {kinds} (the lines above say how); choose "
            f"others, or allow it with {flag}"
        )
    return [difference.line for difference in found]


def _known_differences(path: pathlib.Path) -> list[str]:
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):  # damaged: refused where it is used
        return list(map(str, read_json(path, dict, {})["protocol"].get("differences", [])))
    return []


def _given(config: Config) -> tuple[str, World | None, list[World]]:
    """The config key in question, the dataset that is trained on and the policies that are there."""
    if config.algorithm == "eval":
        paths = [path for path in (config.checkpoint, config.compare) if path]
        return "checkpoint", None, [policy_world(path, policy_document(path)) for path in paths]
    policies = [policy_world(config.init, policy_document(config.init))] if config.init not in ("", RANDOM) else []
    if config.demos.dataset and (config.algorithm == "sft" or not config.init):
        return "demos.dataset", dataset_world(open_dataset(config.demos.dataset)), policies
    return "init", None, policies


def dataset_world(dataset: Dataset, tasks: Sequence[Sequence[str]] = ()) -> World:
    """What a dataset says; given a run's tasks by their names, of those episodes alone that SFT takes for them."""
    episodes = dataset.episodes_of(tasks)
    return World(
        name=f"the dataset {dataset.path}",
        tasks=tuple(dict.fromkeys(row.task for row in episodes)),
        instructions=tuple(dict.fromkeys(row.instruction for row in episodes)),
        rate=suites.rate_of(dataset.source),
        images={camera: (shape[0], shape[1]) for camera, shape in dataset.cameras.items()},
        stats=suites.training_statistics(dataset.source, dataset.stats),
    )


def policy_world(path: str, document: Mapping[str, Any]) -> World:
    """What the document of a policy says: of one that was made elsewhere, or is older, statistics and cameras alone.

    Raises:
        CheckpointError: it is no policy of ours.
    """
    if not document:  # behind an address, and not of this project
        return World(name=f"the policy at {path}")
    try:
        known = document.get("world", {})
        return World(
            name=f"the policy at {path}",
            tasks=tuple(known.get("tasks", ())),
            instructions=tuple(known.get("instructions", ())),
            rate=known.get("rate"),
            executed=document.get("executed"),
            images={camera: _size(known.get("images", {}), camera) for camera in document["cameras"] if camera},
            stats=stats_from_json(document["norm_stats"]),
            offsets=bool(document.get("relative_actions")),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {absolute(path)} holds no policy ({error})") from error


def _size(images: Mapping[str, Sequence[int]], camera: str) -> tuple[int, int] | None:
    return (int(images[camera][0]), int(images[camera][1])) if camera in images else None


def environment_worlds(config: Config) -> list[World]:
    """What the environments of each task of a run show at the start of a few held-out episodes."""
    suite = suites.resolve(config)
    with EnvPool(
        suites.make_envs(config),
        1,
        min(1, config.env.workers),
        timeout_s=config.env.timeout_s,
        start_timeout_s=config.env.start_timeout_s,
    ) as pool:
        seeds = range(config.eval.first_seed, config.eval.first_seed + min(_RESETS, config.eval.episodes))
        seen = {task: [pool.reset([0], [suite.episode(task, seed)])[0] for seed in seeds] for task in config.every_task}
        specs = pool.specs
    return [
        dataclasses.replace(
            seen_in((task,), specs[task], len(seen) > 1),
            other_names=suite.other_names(task),
            instructions=tuple(dict.fromkeys(look.instruction for look in looks)),
            states=np.stack([look.state for look in looks]),
        )
        for task, looks in seen.items()
    ]


def _against(one: World, environments: Sequence[World]) -> list[Difference]:
    """In what a dataset or a policy differs from environments; what it differs in from several is said once."""
    found: dict[str, list[Difference]] = {}
    for environment in environments:
        for difference in differences(one, environment):
            found.setdefault(difference.kind, []).append(difference)
    more = {kind: len(lines) - _SHOWN for kind, lines in found.items()}
    return [
        dataclasses.replace(line, line=line.line + f" (and {more[kind]} more tasks)" * (more[kind] > 0 and last))
        for kind, lines in found.items()
        for line, last in zip(lines[:_SHOWN], [False] * (_SHOWN - 1) + [True], strict=False)
    ]


def seen_in(tasks: Sequence[str], spec: EnvSpec, named: bool = False) -> World:
    """What environments say before any episode; `named`: by their task."""
    return World(
        name=f"the environment of {tasks[0]}" if named else "the environment",
        tasks=tuple(tasks),
        rate=spec.control_hz,
        images={camera: (spec.image_size, spec.image_size) for camera in spec.cameras},
    )


def trained_in(policy: Policy, world: World, names: Sequence[Sequence[str]] = ()) -> Policy:
    """The policy with the tasks and words of a world that it is trained in, besides those that it has.

    Rate and frames are those of that world, where it tells them. If it has tasks that are new to the policy, and does
    not tell its instructions, the list would be incomplete and is left empty.

    Args:
        names: of tasks those that each has. A task that the policy knows by one of them is not told again by another.
    """
    known, same = policy.world, {name: set(task) for task in names for name in task}
    had = set(known.get("tasks", ()))
    new = {task for task in world.tasks if had.isdisjoint({task} | same.get(task, set()))}
    words = sorted({*known.get("instructions", ()), *world.instructions}) if world.instructions or not new else []
    tasks = sorted(had | new)
    rate = world.rate or known.get("rate")
    sizes = {camera: list(size) for camera, size in world.images.items() if size and camera in policy.processor.cameras}
    images = {**known.get("images", {}), **sizes}
    return dataclasses.replace(
        policy, world={"tasks": tasks, "instructions": words, "rate": rate, **({"images": images} if images else {})}
    )
