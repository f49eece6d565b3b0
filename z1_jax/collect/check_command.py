"""python -m z1_jax.collect --check PATH: what a dataset holds. It may be one of ours or one that could be imported."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from z1_jax.collect.check_page import page, terminal
from z1_jax.collect.checking import check_episodes
from z1_jax.collect.columns import add_columns, read_columns
from z1_jax.collect.importers.base import STANDARD, BadData, Source
from z1_jax.collect.importers.convert import Shapes, read_episode
from z1_jax.collect.importers.detect import open_sources
from z1_jax.collect.importers.instructions import OWN, Instructions
from z1_jax.config.command_line import Parser
from z1_jax.data.dataset import Dataset, open_dataset
from z1_jax.data.journal import JournaledEpisode
from z1_jax.errors import UserError
from z1_jax.files import absolute
from z1_jax.metrics import Progress
from z1_jax.suites import rate_of, training_statistics

_MANIFEST = "manifest.json"  # of a dataset of ours
Stream = Iterator[tuple[str, JournaledEpisode | BadData]]


def check_dataset(arguments: Sequence[str]) -> None:
    """Prints what the dataset holds and what looks wrong in it, and writes both to a page.

    Raises:
        UserError: nothing is there, or not one episode can be read.
    """
    parser = Parser(
        prog="python -m z1_jax.collect --check",
        description="What a dataset holds, and what looks wrong in it: one of ours, a LeRobot directory, HDF5 files.",
    )
    parser.add_argument("--check", type=pathlib.Path, required=True, metavar="PATH", help="dataset, directory or file")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="the page (PATH.check.html)")
    add_columns(parser)
    given = parser.parse_args(list(arguments))
    columns, instructions = read_columns(given, parser)
    path = absolute(given.check)
    place = absolute(given.html) if given.html else path.with_name(path.name + ".check.html")
    flaws: list[str] = []
    if (path / _MANIFEST).is_file():
        if (columns, instructions) != (STANDARD, OWN):
            raise UserError(
                f"argument --check: {path} is a dataset of ours, whose columns and instructions are known; "
                "leave the options about them away"
            )
        dataset = open_dataset(path)
        stride, count, facts = int(dataset.source.get("stride", 1)), len(dataset.episodes), _facts(dataset)
        stream: Stream = _ours(dataset)
        rules = {key: stats.rule for key, stats in training_statistics(dataset.source, dataset.stats).items()}
    else:
        sources, flaws = open_sources([path], "", True, columns)
        if not sources:
            raise UserError(f"nothing in {path} can be read, the first: {flaws[0]}" if flaws else f"nothing in {path}")
        stride, count, facts = 1, sum(len(source.episodes) for source in sources), _source_facts(sources)
        stream, rules = _theirs(sources, instructions), {}
    broken = ((str(path), BadData(flaw)) for flaw in flaws)
    with Progress("check", count, "episode", {}, interval_s=5.0) as progress:
        checked = check_episodes(itertools.chain(broken, _counted(stream, progress)), stride, rules)
    for line in terminal(checked, facts):
        print(line)
    try:
        place.write_text(page(path.name, checked, facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"option --html: {place} cannot be written ({error.strerror}); give another FILE") from None
    print(f"the same as a page: {place}")


def _counted(stream: Stream, progress: Progress) -> Stream:
    for number, item in enumerate(stream, 1):
        yield item
        progress.report(number, {})


def _ours(dataset: Dataset) -> Stream:
    for row in dataset.episodes:
        name = f"episode {row.episode}"
        try:
            records = dataset.records(row.span)
        except UserError as error:
            yield name, BadData(f"{name}: {error}")
            continue
        yield (
            name,
            JournaledEpisode(
                task=row.task,
                seed=row.seed,
                instruction=row.instruction,
                success=row.success,
                control_steps=row.steps,
                images={camera: np.stack([r.images[camera] for r in records]) for camera in dataset.cameras},
                state=np.stack([record.state for record in records]),
                actions=np.stack([record.actions for record in records]),
            ),
        )


def _theirs(sources: Sequence[Source], instructions: Instructions) -> Stream:
    """Episodes of sources that are not imported: each step counts as a decision with a chunk of one action."""
    number = 0
    for source in sources:
        shapes = Shapes(tuple(source.cameras), source.action_dim, source.state_dim, 1, 1, 0)
        for reference in source.episodes:
            name = f"{source.path.name}, {reference.name}" if len(sources) > 1 else reference.name
            try:
                told = instructions.of(source.path, reference.name, reference.number)
                yield name, read_episode(source, reference, number, shapes, told)
            except BadData as error:
                yield name, error
            number += 1


def _facts(dataset: Dataset) -> dict[str, str]:
    source = dataset.source
    rate = rate_of(source)
    made = str(source.get("made_by", "unknown"))
    frames = f"JPEG {source['jpeg']}" if source.get("jpeg") else "PNG"
    return {
        "dataset": f"{dataset.path}, made by {made}",
        "rate": f"{rate:g} control steps a second" if rate else "not told",
        "stored": f"a decision every {source.get('stride', '?')} steps, chunks of {dataset.chunk}, frames as {frames}",
        **({"left out": str(len(source["left_out"]))} if source.get("left_out") else {}),
    }


def _source_facts(sources: Sequence[Source]) -> dict[str, str]:
    kinds = dict.fromkeys(f"{facts['format']} {facts['version']}" for facts in (source.facts() for source in sources))
    rates = dict.fromkeys(f"{source.fps:g}" if source.fps else "not told" for source in sources)
    stored = dict.fromkeys(kind for source in sources for kind in source.frames)
    return {
        "source": f"{sources[0].path}" + f" and {len(sources) - 1} more" * (len(sources) > 1),
        "format": ", ".join(kinds),
        "rate": f"{', '.join(rates)} control steps a second",
        "frames": ", ".join(stored) or "none",
    }
