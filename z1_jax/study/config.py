"""What a study is of, as its config file and the command line say, and the runs that it is made of.

A run is a command line of z1_jax.train: who wants one of them by itself gives that line.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from z1_jax.config.command_line import load, parse_command_line
from z1_jax.config.schema import Config, ConfigError, build
from z1_jax.files import absolute
from z1_jax.suites import check_settings, with_tasks

SFT, SPECIALIST, JOINT = "sft", "specialists", "joint"  # kinds of runs, as the table names them
FORMS = (SPECIALIST, JOINT)
FILMS = ("eval.video", "eval.film_seeds")  # keys of the evaluation that change no result
SECTIONS = ("every", "sft", "grpo", "specialists", "joint")  # overrides: of all runs, of SFT, of RL, of one form of it


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A study. Overrides are keys of a run's config."""

    tasks: tuple[str, ...]  # names, and sets of the suite
    seeds: tuple[str, ...] = ("0",)  # of training: SFT and RL are run with each
    forms: tuple[str, ...] = FORMS  # of RL: each task by itself from the common start, and one policy for all
    folder: str = "runs/study"
    sft_preset: str = "kitchen"  # of configs/sft.py
    grpo_preset: str = "kitchen"  # of configs/grpo.py
    overrides: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)  # section -> key -> text


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str  # of its folder
    kind: str
    task: str  # empty: all
    seed: int
    needs: str  # the name of the run that must be finished before; empty: none
    argv: tuple[str, ...]  # of z1_jax.train


def parse_study(argv: Sequence[str]) -> StudyConfig:
    """Reads `--config=FILE[:PRESET]`, `--config.KEY=VALUE` of the study and `--SECTION.KEY=VALUE` of its runs.

    Raises:
        ConfigError: one line.
    """
    files = [argument.removeprefix("--config=") for argument in argv[1:] if argument.startswith("--config=")]
    if len(files) > 1:
        raise ConfigError(f"got {len(files)} configs, expected one --config=configs/FILE.py[:PRESET]")
    values = load(files[0] if files else "configs/study.py", mine=bool(files))
    sections = {name: _texts(values.pop(name, {}), name) for name in SECTIONS}
    for argument in argv[1:]:
        where, equals, text = argument.partition("=")
        section, _, key = where.removeprefix("--").partition(".")
        if argument.startswith("--config="):
            continue
        if not equals or not key or section not in ("config", *SECTIONS):
            known = ", ".join(f"--{name}.key=value" for name in ("config", *SECTIONS))
            raise ConfigError(f"argument {argument!r} is not understood, expected {known}")
        if section == "config":
            values[key] = tuple(filter(None, text.split(","))) if key in ("tasks", "seeds", "forms") else text
        else:
            sections[section][key] = text
    study = build(StudyConfig, {key: value for key, value in values.items()})
    study = dataclasses.replace(study, overrides=sections)
    _check(study)
    return study


def _texts(section: Any, name: str) -> dict[str, str]:
    if not isinstance(section, dict):
        raise ConfigError(f"config key {name}: got {section!r}, expected a section of keys of a run")
    return {key.replace("__", "."): _text(value) for key, value in section.items()}


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(value)
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
            if key in ("task", "tasks", "seed", "run_dir", "algorithm", "checkpoint", "compare"):
                raise ConfigError(f"{section}.{key}: the study sets {key} of each run itself; leave it out")
            if section != "every" and key.startswith("eval.") and not key.startswith(FILMS):
                raise ConfigError(f"{section}.{key}: all runs are evaluated alike; give it as --every.{key}=VALUE")
    if "init" in study.overrides.get("grpo", {}):
        raise ConfigError("grpo.init: RL starts from the study's common SFT; leave it out")


def cells(study: StudyConfig) -> list[Cell]:
    """The runs of a study in the order in which one machine makes them.

    Raises:
        ConfigError: what a run would refuse of its config.
    """
    folder = absolute(study.folder)
    first = _cell(study, folder, SFT, "", int(study.seeds[0]))
    tasks = with_tasks(_parsed(first)).every_task
    if len(tasks) < 2:
        raise ConfigError(f"config key tasks: got {', '.join(study.tasks)}, expected two tasks or more")
    found = []
    for seed in map(int, study.seeds):
        found.append(_cell(study, folder, SFT, "", seed))
        if SPECIALIST in study.forms:
            found += [_cell(study, folder, SPECIALIST, task, seed) for task in tasks]
        if JOINT in study.forms:
            found.append(_cell(study, folder, JOINT, "", seed))
    for cell in found:
        if cell.kind == SFT or cell.seed == int(study.seeds[0]):
            _parsed(cell)
    return found


def _parsed(cell: Cell) -> Config:
    try:
        config = parse_command_line(cell.argv)
        check_settings(config)
        return config
    except ConfigError as error:
        raise ConfigError(f"{cell.kind}: {error}") from error


def _cell(study: StudyConfig, folder: pathlib.Path, kind: str, task: str, seed: int) -> Cell:
    part = f"-{task.replace('/', '-')}" if task else ""
    name, start = f"{kind}{part}-seed{seed}", f"{SFT}-seed{seed}"
    preset, file = (study.sft_preset, "sft") if kind == SFT else (study.grpo_preset, "grpo")
    sections = ("every", "sft") if kind == SFT else ("every", "grpo", kind)
    keys = {key: text for section in sections for key, text in study.overrides.get(section, {}).items()}
    argv = [
        "train.py",
        f"--config=configs/{file}.py:{preset}",
        f"--config.task={task}" if task else f"--config.tasks={','.join(study.tasks)}",
        f"--config.seed={seed}",
        f"--config.run_dir={folder / name}",
        *([] if kind == SFT else [f"--config.init={folder / start}"]),
        *(f"--config.{key}={text}" for key, text in keys.items()),
    ]
    return Cell(name, kind, task, seed, "" if kind == SFT else start, tuple(argv))
