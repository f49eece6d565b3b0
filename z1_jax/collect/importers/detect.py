"""Which format lies at a path."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence

from z1_jax.collect.importers.base import STANDARD, BadData, Columns, Source, reading
from z1_jax.collect.importers.lerobot import LeRobotDirectory
from z1_jax.collect.importers.libero import LiberoFile, is_libero
from z1_jax.collect.importers.rlds import RldsDirectory, is_rlds
from z1_jax.collect.importers.robomimic import RobomimicFile
from z1_jax.errors import UserError

_HDF5 = (".hdf5", ".h5")


def open_sources(
    paths: Sequence[pathlib.Path], split: str, skip_bad: bool, columns: Columns = STANDARD
) -> tuple[list[Source], list[str]]:
    """(sources found at the paths, in the order of their names; a line for each broken one that was left out).

    Args:
        paths: HDF5 files, LeRobot and RLDS directories, or directories anywhere above such.
        columns: names of the sources' columns; the time stamps' tolerance and tasks that change are LeRobot's alone.
        skip_bad: leave out what cannot be opened; otherwise it raises.

    Raises:
        BadData: a source is broken.
        UserError: nothing that can be imported is there.
    """
    sources: list[Source] = []
    flaws: list[str] = []
    places: dict[pathlib.Path, pathlib.Path] = {}  # by where they really are: paths may overlap
    for path in paths:
        for found in _places(path):
            places.setdefault(found.resolve(), found)
    for place in places.values():
        try:
            with reading(str(place)):
                source = _reader(place, columns)(place, split, columns)
            if source.flaws and not skip_bad:
                raise BadData(source.flaws[0])
            flaws += source.flaws
            sources.append(source)
        except BadData as error:
            if not skip_bad:
                raise
            flaws.append(str(error))
    return sources, flaws


def _reader(place: pathlib.Path, columns: Columns) -> Callable[[pathlib.Path, str, Columns], Source]:
    if place.is_dir() and not is_rlds(place):
        return LeRobotDirectory
    if columns.tolerance_s or columns.split_tasks:
        option = "--tolerance-s" if columns.tolerance_s else "--task-changes=split"
        raise BadData(f"option {option}: {place} is {'RLDS' if place.is_dir() else 'HDF5'}; it is for LeRobot datasets")
    if place.is_dir():
        return RldsDirectory
    return LiberoFile if is_libero(place) else RobomimicFile


def _places(path: pathlib.Path) -> list[pathlib.Path]:
    """HDF5 files, LeRobot and RLDS directories at or below `path`."""
    if path.is_file():
        if path.suffix.lower() not in _HDF5:
            raise UserError(f"option --from: {path} is no HDF5 file (.hdf5, .h5), and no directory")
        return [path]
    if not path.is_dir():
        raise UserError(f"option --from: {path} does not exist; expected an HDF5 file or a directory")
    if (path / "manifest.json").is_file():
        raise UserError(f"option --from: {path} is a dataset already; train on it with --config.demos.dataset={path}")
    if (path / "meta" / "info.json").is_file() or is_rlds(path):
        return [path]
    found = sorted(_below(path, set()))
    if not found:
        half = any((path / part).is_dir() for part in ("meta", "data", "videos", "images"))
        why = "was only half written: it has no meta/info.json" if half else "holds nothing to import"
        raise UserError(
            f"option --from: {path} {why}; expected .hdf5 files, a LeRobot dataset (meta/info.json) or RLDS "
            "(features.json)"
        )
    return found


def _below(folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """HDF5 files, LeRobot and RLDS directories below a folder; links are followed, each folder is entered once."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    if (folder / "meta" / "info.json").is_file() or is_rlds(folder):
        yield folder
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _below(entry, seen)
        elif entry.suffix.lower() in _HDF5 and entry.is_file():
            yield entry
