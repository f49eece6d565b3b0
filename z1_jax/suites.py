"""Which suite a config means, and what the run asks of it: one door to all environments (see envs.suite).

Nothing here imports a simulator before it is asked for: what is missing is said before any worker starts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from envs.base import Env, Episode
from envs.demos import Demonstrator
from envs.gymnasium_env import gymnasium_suite
from envs.suite import SettingError, SingleEnv, Suite
from envs.suite import check_names as _check_names
from envs.suite_elsewhere import SuiteElsewhere
from z1_jax.config.schema import Config, ConfigError, EnvConfig, EvalConfig, flat
from z1_jax.data.normalize import NormStats
from z1_jax.data.relative import parse_relative

# A suite is called with the config's sections env and eval. A new one is a folder envs/NAME and a line here.
BUILT_IN = {
    "kitchen": "envs.kitchen.suite:KitchenSuite",
    "robocasa": "envs.robocasa.suite:RoboCasaSuite",
    "libero": "envs.libero.suite:LiberoSuite",
    "metaworld": "envs.metaworld.suite:MetaWorldSuite",
}
_OWNED = {"env.options": "gym:ENV_ID"}  # keys of suites that are not built in


def resolve(config: Config) -> Suite:
    """The suite of a config: a built-in one by name, or `package.module:name` of the user's own.

    That name is a class that is called with the sections `env` and `eval`, an object of the protocol, or a plain
    factory of one environment. `gym:ENV_ID` is an environment of gymnasium.

    Raises:
        ConfigError: there is none of that name, or it cannot be made.
    """
    try:
        return _made(config.env, config.eval)
    except SettingError as error:
        raise ConfigError(f"config key {error.key}: {error}") from error


def _made(env: EnvConfig, evaluation: EvalConfig) -> Suite:
    if env.suite.startswith("gym:"):
        return gymnasium_suite(env.suite, env.options, env.image_size, env.horizon)
    found = _found(BUILT_IN.get(env.suite, env.suite))
    if env.python and env.suite in BUILT_IN:
        return SuiteElsewhere(found, BUILT_IN[env.suite], env, evaluation)
    if not hasattr(found, "make_env"):
        return _single(found, env.suite)
    suite = build(found, env, evaluation) if isinstance(found, type) else found
    lacking = [name for name in _PROTOCOL if not hasattr(suite, name)]
    if lacking:
        raise SettingError("env.suite", f"{env.suite} is no suite: it lacks {', '.join(lacking)} (envs/suite.py)")
    return suite


# A run asks for the suite of its config wherever the config goes: it is built once.
@functools.lru_cache(maxsize=16)
def build(suite: Callable[[EnvConfig, EvalConfig], Suite], env: EnvConfig, evaluation: EvalConfig) -> Suite:
    try:
        return suite(env, evaluation)
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001 - it is the user's code: anything can be wrong in it
        if env.suite in BUILT_IN:
            raise
        raise SettingError("env.suite", f"{env.suite} failed: {_told(error)}") from error


@functools.cache  # it builds an environment, to see what it is
def _single(factory: Callable[[], Env], name: str) -> SingleEnv:
    return SingleEnv(factory, name)


_PROTOCOL = (*Suite.__annotations__, *(name for name in vars(Suite) if not name.startswith("_")))


def _found(where: str) -> Any:
    module, colon, name = where.partition(":")
    if not colon:
        known = ", ".join(BUILT_IN)
        yours = "gym:ENV_ID, or package.module:name of your own (docs/own-environment.md)"
        raise SettingError("env.suite", f"{where!r} does not exist; known: {known}, {yours}")
    if not {"", os.getcwd()} & set(sys.path):  # a console script does not look where it was started, `python -m` does
        sys.path.append(os.getcwd())  # workers get a copy
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - it is the user's module: anything can be wrong in it
        raise SettingError("env.suite", f"{where} cannot be imported: {_told(error)}") from error
    if not callable(found) and not hasattr(found, "make_env"):
        raise SettingError(
            "env.suite",
            f"{where} is a {type(found).__name__}; expected a suite or a function that makes an environment",
        )
    return found


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _asked(function: Callable[..., Any], *args: Any) -> Any:
    """What a suite answers; what it refuses is a mistake in the config."""
    try:
        return function(*args)
    except SettingError as error:
        raise ConfigError(f"config key {error.key}: {error}") from error


def check_settings(config: Config) -> None:
    """Refuses keys that are another suite's, and a start that the suite does not offer. Needs no simulator.

    Raises:
        ConfigError: one line.
    """
    values, default = flat(config), flat(Config())
    _check_python(config)
    suite = resolve(config)
    owners = {key: [name] for key, name in _OWNED.items()}
    for name, where in BUILT_IN.items():
        for key in _found(where).own_keys:
            owners.setdefault(key, []).append(name)
    for key, names in owners.items():
        if key not in suite.own_keys and values[key] != default[key]:
            raise ConfigError(
                f"config key {key}: got {values[key]}, which only env.suite={' and '.join(names)} has; leave it out, "
                f"or change env.suite={config.env.suite}"
            )
    if hasattr(suite, "check_settings"):
        _asked(suite.check_settings)
    _check_relative(config)
    if not suite.branches:
        needs = (
            ("group.branching", config.group.branching, "none", config.algorithm == "grpo"),
            ("env.simulators", config.env.simulators, 0, True),
            ("demos.labels", config.demos.labels, "recorded", config.algorithm != "eval" and not config.demos.dataset),
        )
        for key, got, expected, used in needs:
            if used and got != expected:
                raise ConfigError(
                    f"config key {key}: got {got}, but environments of env.suite={config.env.suite} cannot be copied "
                    f"(no snapshot and restore): expected {expected}"
                )
    starts = config.demos.dataset or config.init and config.algorithm == "grpo"
    tasks = _tasks(config, suite)
    if config.algorithm != "eval" and not starts:
        for task in tasks:
            if task in suite.tasks and _asked(suite.demonstrator, task) is None:
                raise ConfigError(
                    f"config key demos.dataset: got '', but env.suite={config.env.suite} has no scripted expert"
                    f"{f' of {task}' * (len(tasks) > 1)}; expected a dataset of demonstrations (python -m "
                    "z1_jax.collect --from=…), or for grpo a policy in init"
                )
    if len(tasks) == 1:
        alone = {"group.spread": config.algorithm == "grpo", "demos.sampling": not config.demos.dataset}
        for key, used in alone.items():
            if used and values[key] != default[key]:
                raise ConfigError(
                    f"config key {key}: got {values[key]}, which has no effect on one task; leave it at "
                    f"{default[key]}, or give several in tasks"
                )


def _check_python(config: Config) -> None:
    """Another interpreter is there for the workers of built-in suites on this machine."""
    if not config.env.python:
        return
    wrong = {
        f"env.suite={config.env.suite}: expected one of {', '.join(BUILT_IN)}": config.env.suite not in BUILT_IN,
        "env.workers=0, which steps inside this process: expected one or more": not config.env.workers,
        f"rollout.backend={config.rollout.backend}: expected local": config.rollout.backend != "local",
    }
    if found := next((text for text, is_so in wrong.items() if is_so), ""):
        raise ConfigError(f"config key env.python: got {config.env.python} with {found}")


def _check_relative(config: Config) -> None:
    """The mask can be read, and its dimensions are there where the environments tell their widths."""
    try:
        relative = parse_relative(config.inputs.relative_actions)
        if relative and (config.eval.episodes or config.algorithm != "sft"):
            size = widths(config)
            relative.check(size["actions"], size["state"])
    except ValueError as error:
        raise ConfigError(f"config key inputs.relative_actions: {error}") from None


def _tasks(config: Config, suite: Suite) -> tuple[str, ...]:
    """The config's tasks, sets resolved; where it names none and the suite has one, that one.

    Raises:
        ConfigError: a set of another suite, or a task that is there twice.
    """
    if not config.tasks:
        return (suite.tasks[0] if len(suite.tasks) == 1 and config.task == Config.task else config.task,)
    found: dict[str, str] = {}  # task -> the name that it came by
    for given in config.tasks:
        if given not in suite.sets and given not in suite.tasks:
            _check_set(config, suite, given)
        for task in suite.sets.get(given, (given,)):
            before = next((found[name] for name in (task, *_other_names(suite, task)) if name in found), None)
            if before is not None:
                twice = " and as ".join(dict.fromkeys((before, given)))
                raise ConfigError(f"config key tasks: {task} is there twice, as {twice}; expected each task once")
            found[task] = given
    return tuple(found)


def names_of_tasks(config: Config) -> tuple[tuple[str, ...], ...]:
    """Of each task of a config its name there, and the others that it has."""
    suite = resolve(config)
    return tuple((task, *_other_names(suite, task)) for task in config.every_task)


def _other_names(suite: Suite, task: str) -> tuple[str, ...]:
    """A task may be given by a name that `suite.tasks` does not list."""
    try:
        return suite.other_names(task)
    except (SettingError, LookupError, ValueError):  # unknown: refused elsewhere; or nobody knows, not being installed
        return ()


def _check_set(config: Config, suite: Suite, given: str) -> None:
    """Refuses a name that is neither a task nor a set of the suite, but a set of another one."""
    for name, where in BUILT_IN.items():
        if name != config.env.suite and given in _found(where).sets:
            known = f"sets of env.suite={config.env.suite}: {', '.join(suite.sets) or 'none'}"
            raise ConfigError(f"config key tasks: {given} is a set of env.suite={name}; {known}")


def with_tasks(config: Config) -> Config:
    """The config with its tasks by their names: one in `task`, several in `tasks`.

    Raises:
        ConfigError: an unknown task or set, or a task that is there twice.
    """
    suite = resolve(config)
    tasks = _tasks(config, suite)
    if not config.tasks or len(tasks) == 1:
        return dataclasses.replace(config, task=tasks[0], tasks=())
    return dataclasses.replace(config, task="", tasks=tasks)


def _per_task(config: Config, function: Callable[[str], Any]) -> list[Any]:
    """What a suite answers for each task of a config."""
    try:
        return [function(task) for task in config.every_task]
    except SettingError as error:
        if error.key != "task" or not config.tasks:
            raise ConfigError(f"config key {error.key}: {error}") from error
        sets = resolve(config).sets
        raise ConfigError(f"config key tasks: {error}; sets: {', '.join(sets) or 'none'}") from error


def make_env(config: Config, task: str) -> Callable[[], Env]:
    """What a worker calls to build one environment.

    Raises:
        ConfigError: the suite has no such task, camera, scene, layout, style or objects, or is not installed.
    """
    return _asked(resolve(config).make_env, task)


def make_envs(config: Config) -> dict[str, Callable[[], Env]]:
    """What a worker calls to build an environment of each task.

    Raises:
        ConfigError: as `make_env`.
    """
    return dict(zip(config.every_task, _per_task(config, resolve(config).make_env), strict=True))


def simulators(config: Config) -> int:
    """Most simulators that a worker keeps; 0: one for each of its environments.

    By default one a task where the suite's snapshots are exact and cheap, never more than environments.
    """
    suite = resolve(config)
    if config.env.simulators or not (suite.branches and getattr(suite, "shares", False)):
        return config.env.simulators
    return min(len(config.every_task), -(-config.env.parallel // max(1, config.env.workers)))


def mujoco_version(config: Config) -> str:
    """Of the interpreter that simulates.

    Raises:
        ConfigError: env.python does not answer.
    """
    suite = resolve(config)
    if isinstance(suite, SuiteElsewhere):
        return _asked(suite.mujoco_version)
    return importlib.metadata.version("mujoco")


def episode_of(config: Config) -> Callable[[int], Episode]:
    """The episode of a seed, of the config's only task."""
    (task,) = config.every_task
    return functools.partial(resolve(config).episode, task)


def held_out(config: Config, most: int | None = None) -> list[Episode]:
    """The episodes of the evaluation, task by task: of each the held-out seeds, or the first so many."""
    first, count = config.eval.first_seed, config.eval.episodes
    seeds = range(first, first + (count if most is None else min(most, count)))
    episode = resolve(config).episode
    return [episode(task, seed) for task in config.every_task for seed in seeds]


def demonstrator(config: Config, task: str = "") -> Demonstrator:
    """Who demonstrates a task, by default the config's only one.

    Raises:
        ConfigError: nobody does.
    """
    found = _asked(resolve(config).demonstrator, task or config.every_task[0])
    if found is None:
        raise ConfigError(f"config key demos.dataset: got '', but env.suite={config.env.suite} has no scripted expert")
    return found


def settled(config: Config) -> Config:
    """The config with what only the suite knows: an installed version, which a run must not change; the only task.

    Raises:
        ConfigError: the suite is not installed, or in another version; an unknown task.
    """
    check_settings(config)
    config = with_tasks(config)
    known: dict[str, Any] = {}
    for task, told in zip(config.every_task, _per_task(config, resolve(config).settle), strict=True):
        for key, value in told.items():
            if known.setdefault(key, value) != value:
                raise ConfigError(
                    f"config key tasks: {task} has env.{key}={value}, {config.every_task[0]} {known[key]}: expected "
                    "tasks whose environments are alike"
                )
    for key, value in known.items():
        got = getattr(config.env, key)
        if got not in (getattr(EnvConfig, key), value):
            shown, theirs = (",".join(one) if isinstance(one, tuple) else one for one in (got, value))
            raise ConfigError(
                f"config key env.{key}: got {shown}, but environments of env.suite={config.env.suite} have {theirs}: "
                "leave it out"
            )
    env = dataclasses.replace(config.env, **known)
    return dataclasses.replace(config, env=env)


def planned(config: Config) -> Config:
    """The config as a plan needs it: names checked, and how long an episode is where only the simulator says.

    Raises:
        ConfigError: the suite has no such task, camera, scene, layout, style or objects.
    """
    check_settings(config)
    config, suite = with_tasks(config), resolve(config)
    if not hasattr(suite, "planned"):
        _per_task(config, suite.check)
        return config
    longest = max(_per_task(config, suite.planned), key=lambda known: known.get("horizon", 0))
    return dataclasses.replace(config, env=dataclasses.replace(config.env, **longest))


def episode_steps(config: Config) -> int:
    """Control steps of an episode, of the task that takes most."""
    return config.env.horizon or max(_per_task(config, resolve(config).horizon))


def least_episode_steps(config: Config) -> int:
    """The same of the task that takes least."""
    return config.env.horizon or min(_per_task(config, resolve(config).horizon))


def widths(config: Config) -> dict[str, int]:
    """Widths of an action and a state."""
    suite = resolve(config)
    return {"actions": suite.action_dim, "state": suite.state_dim}


def label(config: Config) -> str:
    """What must stand beside every figure of a run; empty for most."""
    return resolve(config).label


def facts(config: Config) -> dict[str, Any]:
    """What success in the environments depends on, for the protocol; what tasks differ in, by task."""
    told = _per_task(config, resolve(config).facts)
    common = {key: value for key, value in told[0].items() if all(other.get(key) == value for other in told)}
    rest = [{key: value for key, value in other.items() if key not in common} for other in told]
    return common | ({"by_task": dict(zip(config.every_task, rest, strict=True))} if any(rest) else {})


def made_by(config: Config) -> str:
    """What a dataset says of the demonstrations that a suite's expert made."""
    return f"{config.env.suite} expert"


def _maker(source: Mapping[str, Any]) -> Any:
    """The built-in suite whose expert made the demonstrations; None where none did."""
    name = str(source.get("made_by", "")).removesuffix(" expert")
    return _found(BUILT_IN[name]) if source.get("made_by") == f"{name} expert" and name in BUILT_IN else None


def rate_of(source: Mapping[str, Any]) -> float | None:
    """Control steps a second of demonstrations, by what made them; None where that is not known."""
    maker = _maker(source)
    return source.get("fps") if maker is None else maker.control_hz


def training_statistics(source: Mapping[str, Any], stats: Mapping[str, NormStats]) -> dict[str, NormStats]:
    """The statistics for a fresh policy, by what made the demonstrations: a suite may know the unit of its state."""
    rule = getattr(_maker(source), "state_rule", None)
    return dict(stats) if rule is None else {**stats, "state": dataclasses.replace(stats["state"], rule=rule)}


def assumed_statistics(config: Config) -> dict[str, NormStats]:
    """Statistics for a policy that has seen no data: uniform over the ranges of state and action.

    Raises:
        ConfigError: the suite has demonstrations, which say better.
    """
    suite = resolve(config)
    bounds = suite.state_bounds()
    if bounds is None:
        raise ConfigError(f"config key init: got random, but env.suite={config.env.suite} has an expert; leave it out")
    one = np.ones(suite.action_dim)
    return {"state": _uniform(*bounds), "actions": _uniform(-one, one)}


def _uniform(low: np.ndarray, high: np.ndarray) -> NormStats:
    return NormStats(mean=(low + high) / 2, std=(high - low) / np.sqrt(12), q01=low, q99=high)


def check_names(key: str, given: list[str], known: list[str]) -> None:
    """Refuses names that are not known.

    Raises:
        ConfigError: one line.
    """
    _asked(_check_names, key, given, known)
