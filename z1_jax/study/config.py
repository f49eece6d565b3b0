"""What a study is of, as its config file and the command line say, and the runs that it is made of.

A run is a command line of z1_jax.train: who wants one of them by itself gives that line.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from z1_jax.config.command_line import load, parse_command_line
from z1_jax.config.schema import Config, ConfigError, build
from z1_jax.files import absolute
from z1_jax.suites import planned, with_tasks

SFT, SPECIALIST, JOINT = "sft", "specialists", "joint"  # kinds of runs, as the table names them
FORMS = (SPECIALIST, JOINT)
FILMS = ("eval.video", "eval.film_seeds")  # keys of the evaluation that change no result
SECTIONS = ("every", "sft", "grpo", "specialists", "joint")  # overrides: of all runs, of SFT, of RL, of one form of it
EXTRAS = "extras"
# Of a run's keys those that an evaluation of its policy takes too.
_EVALUATED = ("env.", "eval.", "rollout.", "mesh.", "model.", "inputs.slots", "allow", "flow.steps", "flow.temperature")
_OWN = ("task", "tasks", "seed", "run_dir", "algorithm", "init", "checkpoint", "compare")  # the study's, of each run


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A study. Overrides are keys of a run's config."""

    tasks: tuple[str, ...]  # names, and sets of the suite
    seeds: tuple[str, ...] = ("0",)  # of training: SFT and RL are run with each
    repeated: tuple[str, ...] = ()  # specialists trained with each seed, the others with the first; empty: all tasks
    forms: tuple[str, ...] = FORMS  # of RL: each task by itself from the common start, and one policy for all
    start: str = ""  # a policy that RL starts from, instead of one that SFT makes here
    folder: str = "runs/study"
    sft_preset: str = "kitchen"  # of configs/sft.py
    grpo_preset: str = "kitchen"  # of configs/grpo.py
    eval_preset: str = "kitchen"  # of configs/eval.py, for the further evaluations
    overrides: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)  # section -> key -> text
    # Further evaluations that each finished policy is put through: name -> key -> text, of configs/eval.py. `tasks`
    # among them: those alone.
    extras: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str  # of its folder
    kind: str
    task: str  # empty: all
    seed: int
    needs: str  # the name of the run that must be finished before; empty: none
    argv: tuple[str, ...]  # of z1_jax.train or z1_jax.evaluate
    evaluation: str = ""  # the name of a further evaluation of the policy of `needs`; empty: a run of its own
    program: str = "train"  # of z1_jax; "evaluate": it trains nothing


def parse_study(argv: Sequence[str]) -> StudyConfig:
    """Reads `--config=FILE[:PRESET]`, `--config.KEY=VALUE` of the study and `--SECTION.KEY=VALUE` of its runs.

    `--extras.NAME.KEY=VALUE` is a key of a further evaluation, `--config.extras=NAMES` those that are made.

    Raises:
        ConfigError: one line.
    """
    files = [argument.removeprefix("--config=") for argument in argv[1:] if argument.startswith("--config=")]
    if len(files) > 1:
        raise ConfigError(f"got {len(files)} configs, expected one --config=configs/FILE.py[:PRESET]")
    values = load(files[0] if files else "configs/study.py", mine=bool(files))
    sections = {name: _texts(values.pop(name, {}), name) for name in SECTIONS}
    given = values.pop(EXTRAS, {})
    if not isinstance(given, dict):
        raise ConfigError(f"config key {EXTRAS}: got {given!r}, expected a section of keys for each further evaluation")
    extras, chosen = {name: _texts(keys, f"{EXTRAS}.{name}") for name, keys in given.items()}, None
    for argument in argv[1:]:
        where, equals, text = argument.partition("=")
        section, _, key = where.removeprefix("--").partition(".")
        if argument.startswith("--config="):
            continue
        if not equals or not key or section not in ("config", *SECTIONS, EXTRAS):
            known = ", ".join(f"--{name}.key=value" for name in ("config", *SECTIONS, f"{EXTRAS}.name"))
            raise ConfigError(f"argument {argument!r} is not understood, expected {known}")
        if section == "config" and key == EXTRAS:
            chosen = tuple(filter(None, text.split(",")))
        elif section == "config":
            values[key] = (
                tuple(filter(None, text.split(","))) if key in ("tasks", "seeds", "repeated", "forms") else text
            )
        elif section == EXTRAS:
            name, _, key = key.partition(".")
            extras.setdefault(name, {})[key] = text
        else:
            sections[section][key] = text
    study = build(StudyConfig, {key: value for key, value in values.items()})
    if unknown := [name for name in chosen or () if name not in extras]:
        raise ConfigError(f"config key {EXTRAS}: {unknown[0]!r} does not exist; known: {', '.join(extras) or 'none'}")
    extras = {name: keys for name, keys in extras.items() if chosen is None or name in chosen}
    study = dataclasses.replace(study, overrides=sections, extras=extras)
    if study.start:
        if unused := [one for one in argv[1:] if one.startswith(("--sft.", "--config.sft_preset="))]:
            raise ConfigError(f"{unused[0]}: with --config.start={study.start} no SFT is made; leave one of them out")
        if sections[SFT]:
            print(f"start={study.start}: no SFT is made; not used of the config: sft.{', sft.'.join(sections[SFT])}")
        sections[SFT].clear()
    _check(study)
    return dataclasses.replace(study, seeds=tuple(str(int(seed)) for seed in study.seeds))


def _texts(section: Any, name: str) -> dict[str, str]:
    if not isinstance(section, dict):
        raise ConfigError(f"config key {name}: got {section!r}, expected a section of keys of a run")
    return {key.replace("__", "."): _text(value) for key, value in section.items()}


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(study: StudyConfig) -> None:
    for seed in study.seeds:
        if not (seed.isascii() and seed.isdigit()):
            raise ConfigError(f"config key seeds: got {seed!r}, expected whole numbers, e.g. 0,1,2")
    if not study.seeds or len({int(seed) for seed in study.seeds}) < len(study.seeds):
        raise ConfigError(f"config key seeds: got {', '.join(study.seeds) or 'nothing'}, expected each once")
    for form in study.forms:
        if form not in FORMS:
            raise ConfigError(f"config key forms: got {form!r}, expected one or more of {', '.join(FORMS)}")
    if not study.tasks:
        raise ConfigError("config key tasks: got nothing, expected names of tasks or sets, e.g. kitchen24")
    for section in SECTIONS:
        for key in study.overrides.get(section, {}):
            if key in _OWN and (key, section) not in (("init", "sft"), ("init", "grpo")):  # the latter is told below
                raise ConfigError(f"{section}.{key}: the study sets {key} of each run itself; leave it out")
            if section != "every" and key.startswith("eval.") and not key.startswith(FILMS):
                raise ConfigError(f"{section}.{key}: all runs are evaluated alike; give it as --every.{key}=VALUE")
    if "init" in study.overrides.get("grpo", {}):
        raise ConfigError("grpo.init: RL starts from the study's common SFT; leave it out")
    for name, keys in study.extras.items():
        if not name.replace("_", "").isalnum() or name in (SFT, *FORMS):
            raise ConfigError(f"{EXTRAS}.{name}: expected a name of letters, digits and underscores, no form's")
        for key in keys:
            if key in _OWN and key != "tasks" or not key:
                raise ConfigError(
                    f"{EXTRAS}.{name}.{key}: the study sets {key or 'keys'} of each run itself; leave it out"
                )


def cells(study: StudyConfig) -> list[Cell]:
    """The runs of a study in the order in which one machine makes them: by seed, trainings before evaluations.

    Raises:
        ConfigError: what a run would refuse of its config.
    """
    folder = absolute(study.folder)
    first = parsed(_start(study, folder, int(study.seeds[0])))
    tasks = with_tasks(first).every_task
    if len(tasks) < 2:
        raise ConfigError(f"config key tasks: got {', '.join(study.tasks)}, expected two tasks or more")
    repeated = _among("repeated", _names(first, study.repeated), tasks) or tasks
    special = {}
    for name, keys in study.extras.items():
        named = _among(
            f"{EXTRAS}.{name}.tasks", _names(first, keys["tasks"].split(",") if "tasks" in keys else ()), tasks
        )
        special[name] = tuple(task for task in tasks if task in named) or tasks
    found: list[Cell] = []
    for seed in map(int, study.seeds):
        again = seed != int(study.seeds[0])
        trained = [] if study.start and again else [_start(study, folder, seed)]
        if SPECIALIST in study.forms:
            trained += [_cell(study, folder, SPECIALIST, task, seed) for task in (repeated if again else tasks)]
        if JOINT in study.forms:
            trained.append(_cell(study, folder, JOINT, "", seed))
        found += trained
        for name, theirs in special.items():
            found += [_evaluation(study, folder, name, theirs, one) for one in trained if one.task in ("", *theirs)]
    for cell in found:
        if cell.kind == SFT or cell.seed == int(study.seeds[0]):
            parsed(cell)
            if not cell.evaluation:
                _check_alike(first, cell)
    return found


def _check_alike(first: Config, cell: Cell) -> None:
    """Refuses a training whose evaluation is not that of SFT: their episodes could not be paired."""
    for key in ("episodes", "first_seed", "noise_seed", "scenes", "objects"):
        one, other = getattr(first.eval, key), getattr(parsed(cell).eval, key)
        if one != other:
            raise ConfigError(
                f"{cell.kind}: eval.{key} is {other!r}, that of {SFT} {one!r}: all runs are evaluated alike; give "
                f"--every.eval.{key}=VALUE"
            )


def _names(config: Config, given: Sequence[str]) -> tuple[str, ...]:
    """Tasks by their names, sets resolved."""
    return with_tasks(dataclasses.replace(config, task="", tasks=tuple(given))).every_task if given else ()


def _among(key: str, names: tuple[str, ...], tasks: Sequence[str]) -> tuple[str, ...]:
    if other := [name for name in names if name not in tasks]:
        raise ConfigError(f"config key {key}: {other[0]} is no task of the study ({', '.join(tasks)})")
    return names


@functools.cache  # of hundreds of runs, each of which is checked, compared with what is there, and counted
def parsed(cell: Cell) -> Config:
    """The config of a run.

    Raises:
        ConfigError: what the run would refuse of it.
    """
    try:
        return parsed_line(cell.argv)
    except ConfigError as error:
        raise ConfigError(f"{cell.evaluation or cell.kind}: {error}") from error


def parsed_line(argv: Sequence[str]) -> Config:
    """The config of a run's command line; errors as `parsed`."""
    config = parse_command_line(argv)
    planned(config)  # names that a suite does not have
    return config


def _keys(study: StudyConfig, kind: str) -> dict[str, str]:
    sections = ("every", "sft") if kind == SFT else ("every", "grpo", kind)
    return {key: text for section in sections for key, text in study.overrides.get(section, {}).items()}


def _start(study: StudyConfig, folder: pathlib.Path, seed: int) -> Cell:
    """The common SFT or, of a given policy, its evaluation."""
    if not study.start:
        return _cell(study, folder, SFT, "", seed)
    name = f"{SFT}-seed{seed}"
    argv = _evaluate(study, SFT, study.tasks, study.start, folder / name, {})
    return Cell(name, SFT, "", seed, "", argv, program="evaluate")


def _cell(study: StudyConfig, folder: pathlib.Path, kind: str, task: str, seed: int) -> Cell:
    part = f"-{task.replace('/', '-')}" if task else ""
    name, start = f"{kind}{part}-seed{seed}", f"{SFT}-seed{study.seeds[0] if study.start else seed}"
    preset, file = (study.sft_preset, "sft") if kind == SFT else (study.grpo_preset, "grpo")
    argv = [
        "train.py",
        f"--config=configs/{file}.py:{preset}",
        f"--config.task={task}" if task else f"--config.tasks={','.join(study.tasks)}",
        f"--config.seed={seed}",
        f"--config.run_dir={folder / name}",
        *([] if kind == SFT else [f"--config.init={study.start or folder / start}"]),
        *(f"--config.{key}={text}" for key, text in _keys(study, kind).items()),
    ]
    return Cell(name, kind, task, seed, "" if kind == SFT else start, tuple(argv))


def _evaluation(study: StudyConfig, folder: pathlib.Path, extra: str, tasks: Sequence[str], of: Cell) -> Cell:
    """A further evaluation of the policy of a run."""
    name = f"{extra}-{of.name}"
    policy = study.start if study.start and of.kind == SFT else folder / of.name
    more = {key: text for key, text in study.extras[extra].items() if key != "tasks"}
    argv = _evaluate(study, of.kind, (of.task,) if of.task else tasks, policy, folder / name, more)
    return Cell(name, of.kind, of.task, of.seed, of.name, argv, extra, "evaluate")


def _evaluate(
    study: StudyConfig,
    kind: str,
    tasks: Sequence[str],
    policy: str | pathlib.Path,
    place: pathlib.Path,
    more: Mapping[str, str],
) -> tuple[str, ...]:
    """The command line that evaluates a policy as runs of a kind do, but for `more`."""
    keys = {key: text for key, text in _keys(study, kind).items() if key.startswith(_EVALUATED)}
    return (
        "evaluate.py",
        f"--config=configs/eval.py:{study.eval_preset}",
        f"--config.tasks={','.join(tasks)}",
        f"--config.checkpoint={policy}",
        f"--config.run_dir={place}",
        *(f"--config.{key}={text}" for key, text in {**keys, **more}.items()),
    )
