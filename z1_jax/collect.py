"""python -m z1_jax.collect TASK --out DIR: expert demonstrations → a dataset, for --config.demos.dataset=DIR.

An interrupted collection loses no finished episode: the same command goes on with the next seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from z1_jax import config as z1_config
from z1_jax.config import Config, ConfigError, DemosConfig, EnvConfig
from z1_jax.data.dataset import Dataset, open_dataset
from z1_jax.runs import run_main
from z1_jax.stages import check_inputs, demonstrations, demonstrations_source


def main(argv: Sequence[str]) -> None:
    """Collects what the command line asks for, or says that it is there."""
    config, out = parse_arguments(argv[1:])
    check_inputs(config)
    if out.exists():
        dataset = open_dataset(out)
        check_same(config, dataset)
        print("already collected: ", end="")
    else:
        dataset = demonstrations(config, out)
    print(
        f"{len(dataset.episodes)} demonstrations of {config.task}, {len(dataset)} decisions, in {out}\n"
        f"train on them with --config.task={config.task} --config.demos.dataset={out}"
    )


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """The config that the stages work from, and the dataset's directory.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or out of range.
    """
    demos, env = DemosConfig(), EnvConfig()
    parser = _Parser(prog="python -m z1_jax.collect", description="Expert demonstrations into a dataset directory.")
    parser.add_argument("task", metavar="TASK", help="a task of the kitchen, e.g. OpenDrawer")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="directory of the dataset")
    parser.add_argument("--episodes", type=int, default=demos.episodes, help="successful ones to keep (%(default)s)")
    parser.add_argument("--noise", type=float, default=demos.noise, help="scale of the action noise (%(default)s)")
    parser.add_argument("--stride", type=int, default=demos.stride, help="control steps between observations")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (%(default)s)")
    parser.add_argument("--cameras", default=",".join(env.cameras), help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=env.image_size, help="pixels (%(default)s)")
    for option in ("layouts", "styles", "objects"):
        parser.add_argument(f"--{option}", default=",".join(getattr(env, option)), help="names or splits (%(default)s)")
    parser.add_argument("--workers", type=int, default=env.workers, help="worker processes (%(default)s)")
    given = parser.parse_args(list(arguments))
    config = Config(
        algorithm="sft",
        task=given.task,
        seed=given.seed,
        demos=dataclasses.replace(demos, episodes=given.episodes, noise=given.noise, stride=given.stride),
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
    z1_config.check(config)
    return config, given.out.expanduser().absolute()


def check_same(config: Config, dataset: Dataset) -> None:
    """Refuses a dataset that another command made.

    Raises:
        ConfigError: names the first difference.
    """
    got, wanted = {**dataset.source}, demonstrations_source(config)
    got["episodes"], wanted["episodes"] = len(dataset.episodes), config.demos.episodes
    for key, value in wanted.items():
        if got.get(key) != value:
            raise ConfigError(
                f"{dataset.path} exists with {key} {got.get(key)!r}, asked for {value!r}; choose another --out"
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help shows what there is)")


if __name__ == "__main__":
    run_main(main)
