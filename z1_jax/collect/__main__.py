"""Makes a dataset of demonstrations, for --config.demos.dataset=DIR.

python -m z1_jax.collect TASK --out DIR records our scripted expert. python -m z1_jax.collect --from=PATH --out DIR
imports HDF5 files or LeRobot directories. An interruption loses no finished episode: the same command continues.
python -m z1_jax.collect --check=PATH shows what a dataset holds.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence

from envs.base import LABELS
from z1_jax.collect.check_command import check_dataset
from z1_jax.collect.columns import add_columns, names, read_columns
from z1_jax.collect.importing import ImportConfig, check_source, import_demonstrations
from z1_jax.config.checks import check
from z1_jax.config.command_line import Parser
from z1_jax.config.schema import Config, DemosConfig, EnvConfig
from z1_jax.data.dataset import Dataset, open_dataset
from z1_jax.data.normalize import held_line
from z1_jax.files import absolute
from z1_jax.process import run_main
from z1_jax.stages import check_inputs, demonstrations, demonstrations_source
from z1_jax.suites import check_settings, training_statistics, with_tasks

# For SFT alone, the usual purpose of a dataset that is collected apart. Before RL, `recorded` is better.
SFT_LABELS = "undisturbed"


def main(argv: Sequence[str]) -> None:
    """Collects what the command line asks for, or says that it exists already."""
    if any(argument == "--check" or argument.startswith("--check=") for argument in argv[1:]):
        check_dataset(argv[1:])
        return
    if any(argument == "--from" or argument.startswith("--from=") for argument in argv[1:]):
        import_others(*parse_import(argv[1:]))
        return
    config, out = parse_arguments(argv[1:])
    check_inputs(config)
    if out.exists():
        dataset = open_dataset(out)
        wanted = {**demonstrations_source(config), "episodes": config.demos.episodes * len(config.every_task)}
        check_source(dataset.path, {**dataset.source, "episodes": len(dataset.episodes)}, wanted)
        print("already collected: ", end="")
    else:
        dataset = demonstrations(config, out)
    print(
        f"{len(dataset.episodes)} demonstrations of {config.task_words}, {len(dataset)} decisions, in {out}\n"
        f"{_held(dataset)}"
        f"train on them with --config.task{'s' * bool(config.tasks)}={','.join(config.every_task)} "
        f"--config.demos.dataset={out}"
    )


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """The config that the stages work from, and the dataset's directory.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or out of range.
    """
    demos, env = DemosConfig(), EnvConfig()
    parser = Parser(
        prog="python -m z1_jax.collect",
        description="Expert demonstrations into a dataset directory.",
        epilog="Demonstrations of others: python -m z1_jax.collect --from=PATH --help. What a dataset holds, and what "
        "looks wrong in it: python -m z1_jax.collect --check=PATH",
    )
    parser.add_argument(
        "task", metavar="TASK", help="a task of the kitchen, e.g. OpenDrawer; or several, or a set: A,B; drawers"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="directory of the dataset")
    parser.add_argument(
        "--episodes", type=int, default=demos.episodes, help="successful ones of each task (%(default)s)"
    )
    parser.add_argument("--noise", type=float, default=demos.noise, help="scale of the action noise (%(default)s)")
    parser.add_argument("--stride", type=int, default=demos.stride, help="control steps between observations")
    parser.add_argument("--labels", default=SFT_LABELS, help=f"{' | '.join(LABELS)}, see demos.labels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (%(default)s)")
    parser.add_argument("--cameras", default=",".join(env.cameras), help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=env.image_size, help="pixels (%(default)s)")
    for option in ("layouts", "styles", "objects"):
        parser.add_argument(f"--{option}", default=",".join(getattr(env, option)), help="names or splits (%(default)s)")
    parser.add_argument("--workers", type=int, default=env.workers, help="worker processes (%(default)s)")
    given = parser.parse_args(list(arguments))
    config = Config(
        algorithm="sft",
        tasks=tuple(given.task.split(",")),
        seed=given.seed,
        demos=dataclasses.replace(
            demos, episodes=given.episodes, noise=given.noise, stride=given.stride, labels=given.labels
        ),
        env=dataclasses.replace(
            env,
            cameras=tuple(given.cameras.split(",")),
            image_size=given.image_size,
            layouts=tuple(given.layouts.split(",")),
            styles=tuple(given.styles.split(",")),
            objects=tuple(given.objects.split(",")),
            workers=given.workers,
        ),
    )
    check(config)
    check_settings(config)
    return with_tasks(config), absolute(given.out)


def import_others(config: ImportConfig, out: pathlib.Path) -> None:
    """Imports, and prints what was done to the data and what was left out."""
    dataset, known = import_demonstrations(config, out)
    source, tasks = dataset.source, {row.task for row in dataset.episodes}
    for order in dict.fromkeys(entry["order"] for entry in source["sources"]):
        print(order)
    for line in source["left_out"]:
        print(f"left out: {line}")
    print(
        f"{'already imported: ' * known}{len(dataset.episodes)} demonstrations of {len(tasks)} task"
        f"{'s' * (len(tasks) > 1)}, {len(dataset)} decisions, {len(source['left_out'])} left out, in {out}\n"
        f"{_held(dataset)}"
        f"train on them with {shlex.quote(f'--config.demos.dataset={out}')} "
        f"{shlex.quote('--config.env.cameras=' + ','.join(dataset.cameras))}"
        + " (of these as many as the model has slots: model.preset)"
        * (len(dataset.cameras) > 2)
    )


def _held(dataset: Dataset) -> str:
    """A line on the dimensions that a fresh policy will hold constant, or nothing."""
    line = held_line(training_statistics(dataset.source, dataset.stats))
    return f"{line}\n" * bool(line)


def parse_import(arguments: Sequence[str]) -> tuple[ImportConfig, pathlib.Path]:
    """What to import, and the dataset's directory.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type.
    """
    default = ImportConfig(paths=())
    parser = Parser(
        prog="python -m z1_jax.collect",
        description="Demonstrations of others (HDF5 files, LeRobot v2.x or v3 directories) into a dataset.",
    )
    add = parser.add_argument
    add("--from", dest="paths", type=pathlib.Path, nargs="+", action="extend", required=True, metavar="PATH",
        help="files, directories")  # fmt: skip
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="directory of the dataset")
    add("--cameras", default="", help="names, in the order of the policy's image slots (all)")
    add_columns(parser)
    add("--rate", type=float, default=0.0, metavar="HZ", help="control steps a second, where the source tells none or "
        "a wrong one")  # fmt: skip
    add("--image-size", type=int, default=default.image_size, help="pixels of the stored frames (as the source's)")
    add("--jpeg", type=int, default=default.jpeg, metavar="QUALITY", help="store frames as JPEG (PNG: loses nothing)")
    add("--stride", type=int, default=default.stride, help="control steps between observations (%(default)s)")
    add("--chunk", type=int, default=default.chunk, help="actions of an observation: the model's horizon (%(default)s)")
    add("--tasks", default="", help="names of RoboCasa's tasks, or instructions, separated by commas (all)")
    add("--episodes", type=int, default=default.episodes, help="the first ones of each task (all)")
    add("--split", default="", help="a filter key of the HDF5 files' masks, or a split of LeRobot's info.json")
    add("--skip-bad", action="store_true", help="leave out what is broken, and say what")
    add("--keep-duplicates", action="store_true", help="import episodes that are there twice twice")
    given = parser.parse_args(list(arguments))
    for option, lowest, highest in (("stride", 1, 1000), ("chunk", 1, 1000), ("image_size", 0, 1024)):
        if not lowest <= getattr(given, option) <= highest:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: got {getattr(given, option)}, expected {lowest} to {highest}")
    if given.jpeg not in range(101):
        parser.error(f"argument --jpeg: got {given.jpeg}, expected 1 to 100, or 0 for PNG")
    if given.episodes < 0:
        parser.error(f"argument --episodes: got {given.episodes}, expected 0 or more")
    if not (given.rate == 0 or 0.1 <= given.rate <= 10_000):
        parser.error(f"argument --rate: got {given.rate:g}, expected 0.1 to 10000 control steps a second")
    columns, instructions = read_columns(given, parser)
    config = ImportConfig(
        paths=tuple(absolute(path) for path in given.paths),
        cameras=names(given.cameras),
        columns=columns,
        instructions=instructions,
        rate=given.rate,
        image_size=given.image_size,
        jpeg=given.jpeg,
        stride=given.stride,
        chunk=given.chunk,
        tasks=names(given.tasks),
        episodes=given.episodes,
        split=given.split,
        skip_bad=given.skip_bad,
        keep_duplicates=given.keep_duplicates,
    )
    return config, absolute(given.out)


if __name__ == "__main__":
    run_main(main)
