"""Imports other people's demonstrations into one dataset: chooses episodes, checks that they are alike, and resumes.

Every finished episode is kept in `<directory>.episodes` until the dataset is written, like those of our own experts.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from z1_jax.collect.importers.base import STANDARD, BadData, Columns, EpisodeRef, Source
from z1_jax.collect.importers.convert import Shapes, read_episode
from z1_jax.collect.importers.detect import open_sources
from z1_jax.collect.importers.duplicates import Duplicates
from z1_jax.collect.importers.instructions import OWN, Instructions
from z1_jax.config.schema import ConfigError
from z1_jax.data.dataset import Dataset, open_dataset, write_dataset
from z1_jax.data.journal import EpisodeJournal, JournaledEpisode, difference
from z1_jax.metrics import Progress

Chosen = tuple[Source, EpisodeRef]


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """What to import, and how it is stored."""

    paths: tuple[pathlib.Path, ...]
    cameras: tuple[str, ...] = ()  # empty: those of the first source
    image_size: int = 0  # pixels; 0: as in the source
    jpeg: int = 0  # quality of frames stored as JPEG; 0: PNG
    stride: int = 4  # control steps between decisions
    chunk: int = 8  # control steps of an action chunk
    tasks: tuple[str, ...] = ()  # names or instructions; empty: all
    episodes: int = 0  # the first ones of each task; 0: all
    split: str = ""  # a mask of HDF5 files, a split of LeRobot directories
    skip_bad: bool = False
    columns: Columns = STANDARD
    instructions: Instructions = OWN
    rate: float = 0.0  # control steps a second; 0: as the sources tell
    keep_duplicates: bool = False  # episodes that are there twice are imported twice


def import_demonstrations(config: ImportConfig, directory: pathlib.Path) -> tuple[Dataset, bool]:
    """The dataset at `directory`, and whether it existed already. An interrupted import continues where it stopped.

    Raises:
        UserError: nothing to import, a broken episode without `skip_bad`, or a directory that holds something else.
    """
    sources, left_out = open_sources(config.paths, config.split, config.skip_bad, config.columns)
    if not sources:
        raise ConfigError(f"nothing is left to import: {left_out[0]}")
    shapes = _shapes(config, sources)
    sources, unlike = _alike(sources, shapes, config.skip_bad)
    chosen = _chosen(config, sources)
    config.instructions.check([(source.path, episode.name, episode.number) for source, episode in chosen])
    origin = _origin(config, sources, shapes)
    if directory.exists():
        dataset = open_dataset(directory)
        check_source(dataset.path, dataset.source, {**origin, "keep_duplicates": config.keep_duplicates})
        return dataset, True
    with EpisodeJournal(directory.with_name(directory.name + ".episodes"), origin) as journal:
        before = journal.left_out()
        if before and not config.skip_bad:
            raise ConfigError(
                f"{journal.path} was begun with --skip-bad and left out {len(before)}, the first: {before[0]}; give "
                "--skip-bad again, or delete that file to import all of them anew"
            )
        source = {**origin, "keep_duplicates": config.keep_duplicates}
        if config.columns.tolerance_s:  # episodes that need none are the same with it
            source["tolerance_s"] = config.columns.tolerance_s
        source["left_out"] = left_out + unlike  # the episodes' own are added as they are met
        episodes = _episodes(config, chosen, shapes, journal, source)
        dataset = write_dataset(directory, episodes, source, jpeg=config.jpeg)
        journal.remove()
    return dataset, False


def _episodes(
    config: ImportConfig, chosen: Sequence[Chosen], shapes: Shapes, journal: EpisodeJournal, source: dict[str, Any]
) -> Iterator[JournaledEpisode]:
    """The journal's episodes, then new ones, which are added to it. What is left out is added to `source`."""
    source["left_out"] += journal.left_out()
    sizes: dict[str, tuple[int, ...]] = {}  # of the frames of the first episode
    duplicates = Duplicates()
    for known in journal.episodes():
        sizes = sizes or _sizes(known)
        if not config.keep_duplicates:  # nor those that an earlier call kept
            duplicates.check(known, _where(chosen[known.seed]))
        duplicates.add(known, _where(chosen[known.seed]))
        yield known
    with Progress("import", len(chosen), "episode", {"left out": "d"}, start=journal.tried, interval_s=5.0) as progress:
        for number, (place, reference) in enumerate(chosen):
            if number < journal.tried:
                continue
            try:
                told = config.instructions.of(place.path, reference.name, reference.number)
                episode = read_episode(place, reference, number, shapes, told)
                _check_sizes(_sizes(episode), sizes, _where((place, reference)))
                if not config.keep_duplicates:
                    duplicates.check(episode, _where((place, reference)))
            except BadData as error:
                if not config.skip_bad:
                    raise BadData(f"{error}; --skip-bad leaves it out") from None
                journal.leave_out(str(error))
                source["left_out"].append(str(error))
                episode = None
            progress.report(number + 1, {"left out": len(source["left_out"])})
            if episode:
                sizes = sizes or _sizes(episode)
                duplicates.add(episode, _where((place, reference)))
                journal.append(episode)
                yield episode
    if not journal.kept:
        left_out = source["left_out"]
        raise ConfigError(f"nothing is left to import: {len(left_out)} left out, the first: {left_out[0]}")


def _where(chosen: Chosen) -> str:
    source, reference = chosen
    return f"{source.path}, {reference.name}"


def _sizes(episode: JournaledEpisode) -> dict[str, tuple[int, ...]]:
    return {camera: frames.shape[1:3] for camera, frames in episode.images.items()}


def _check_sizes(got: Mapping[str, tuple[int, ...]], first: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuses frames that are not of the first episode's size."""
    for camera, size in first.items():
        if got[camera] != size:
            shown, expected = ("×".join(map(str, pixels)) for pixels in (got[camera], size))
            raise BadData(
                f"{where}: {camera} has frames of {shown}, expected {expected} as in the first episode; "
                "--image-size=N brings all to one size"
            )


def _shapes(config: ImportConfig, sources: Sequence[Source]) -> Shapes:
    """The widths that most sources have, and the cameras of the first source that has any."""
    cameras = config.cameras or next((tuple(source.cameras) for source in sources if source.cameras), ())
    if not cameras:
        if sources[0].pictures:
            raise ConfigError(_unread(sources[0]))
        raise ConfigError(
            f"{sources[0].path} has no images; expected at least one camera (for RoboCasa, the *_im128 files), or "
            "--images=CAMERA:COLUMN where they have names of their own"
        )
    widths = collections.Counter((source.action_dim, source.state_dim) for source in sources)
    (action_dim, state_dim), _ = widths.most_common(1)[0]
    return Shapes(cameras, action_dim, state_dim, config.stride, config.chunk, config.image_size)


def _alike(sources: Sequence[Source], shapes: Shapes, skip_bad: bool) -> tuple[list[Source], list[str]]:
    """The sources that go into one dataset, and a line for each that does not."""
    kept: list[Source] = []
    unlike: list[str] = []
    for source in sources:
        missing = [camera for camera in shapes.cameras if camera not in source.cameras]
        timed = next((other for other in kept if other.fps), source)  # the first that tells its rate
        if missing and source.pictures and not source.cameras:
            line = _unread(source)
        elif missing:
            line = f"{source.path} has no camera {missing[0]}; it has {', '.join(source.cameras) or 'none'}"
        elif (source.action_dim, source.state_dim) != (shapes.action_dim, shapes.state_dim):
            line = (
                f"{source.path} has actions of width {source.action_dim} and states of {source.state_dim}, "
                f"expected {shapes.action_dim} and {shapes.state_dim} as its fellows"
            )
        elif source.fps and source.fps != timed.fps:
            line = f"{source.path} has {source.fps:g} steps a second, {timed.path} {timed.fps:g}: import them apart"
        else:
            kept.append(source)
            continue
        if not skip_bad:
            raise BadData(line)
        unlike.append(line)
    if not kept:
        raise ConfigError(f"nothing is left to import: {unlike[0]}")
    return kept, unlike


def _unread(source: Source) -> str:
    example = ",".join(f"CAMERA:{picture}" for picture in source.pictures)
    return (
        f"{source.path}: images are read from obs/*_image and the state from RoboCasa's robot0_* observations; this "
        f"file has pictures in {', '.join(source.pictures)}: name the columns, --images={example} --state=COLUMN,COLUMN"
    )


def _chosen(config: ImportConfig, sources: Sequence[Source]) -> list[Chosen]:
    """The episodes of the tasks asked for, in the order of the sources."""
    every = [(source, episode) for source in sources for episode in source.episodes]
    known = dict.fromkeys(episode.task for _, episode in every)
    for task in config.tasks:
        if task not in known:
            shown = ", ".join(list(known)[:12]) + (", …" if len(known) > 12 else "")
            raise ConfigError(f"option --tasks: {task!r} is not there; known: {shown}")
    counts: dict[str, int] = {}
    chosen = []
    for source, episode in every:
        counts[episode.task] = counts.get(episode.task, 0) + 1
        wanted = not config.tasks or episode.task in config.tasks
        if wanted and (not config.episodes or counts[episode.task] <= config.episodes):
            chosen.append((source, episode))
    return chosen


def _origin(config: ImportConfig, sources: Sequence[Source], shapes: Shapes) -> dict[str, Any]:
    """The sources' identities, and all settings that the records depend on."""
    return {
        "made_by": "import",
        "sources": [{**source.facts(), "order": source.order} for source in sources],
        "fps": config.rate or next((source.fps for source in sources if source.fps), None),
        "cameras": list(shapes.cameras),
        "image_size": shapes.image_size,
        "jpeg": config.jpeg,
        "stride": shapes.stride,
        "chunk": shapes.chunk,
        "tasks": list(config.tasks),
        "episodes_per_task": config.episodes,
        "split": config.split,
        **({"instructions": config.instructions.to_json()} if config.instructions != OWN else {}),
        **({"task_changes": "split"} if config.columns.split_tasks else {}),
    }


def check_source(path: pathlib.Path, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a dataset that another command made.

    Raises:
        ConfigError: names the first difference.
    """
    if differs := difference(got, wanted):
        raise ConfigError(f"{path} exists with {differs}; choose another --out")
